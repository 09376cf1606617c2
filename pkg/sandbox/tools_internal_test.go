package sandbox

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestDigestTools checks that the digest changes if `make` has other content or is missing. Another time stamp of
// `make` must not change it.
func TestDigestTools(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	make := filepath.Join(dir, "make")
	digest := func(text string) string {
		t.Helper()
		if err := os.WriteFile(make, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(make, filepath.Join(dir, "gmake")); err != nil && !os.IsExist(err) {
			t.Fatal(err)
		}
		d, err := digestTools(dir, []string{"gmake", "sh"})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := digest("#!/bin/sh\necho 4.3\n")
	if again := digest("#!/bin/sh\necho 4.3\n"); again != first {
		t.Error("the same tools have two digests")
	}
	if other := digest("#!/bin/sh\necho 4.4\n"); other == first {
		t.Error("another make has the same digest")
	}
	if err := os.Remove(make); err != nil {
		t.Fatal(err)
	}
	if none, err := digestTools(dir, []string{"gmake", "sh"}); err != nil || none == first {
		t.Errorf("digest without make = %s, %v; want another one", none, err)
	}
}

// TestHostTools checks that HostTools returns a digest on this machine. The files that a program needs must include the
// loader and the C library.
func TestHostTools(t *testing.T) {
	t.Parallel()
	start := time.Now()
	if d, err := HostTools(); err != nil || len(d) != 64 {
		t.Errorf("HostTools = %q, %v", d, err)
	}
	t.Logf("in %v", time.Since(start))
	folders, err := libraryFolders()
	if err != nil {
		t.Fatal(err)
	}
	needed, err := neededFiles("/proc/self/exe", folders)
	if err != nil || len(needed) > 3 {
		t.Errorf("neededFiles(this program) = %v, %v", needed, err)
	}
	libraries, err := neededFiles("/usr/bin/env", folders)
	if err != nil || len(libraries) < 2 {
		t.Errorf("neededFiles(env) = %v, %v; want the loader and the C library", libraries, err)
	}
}
