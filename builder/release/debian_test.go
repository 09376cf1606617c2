package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

// entries returns the entries of a tar by name: the content of a file, or "-> " and the target of a link.
func entries(t *testing.T, text []byte) map[string]string {
	t.Helper()
	all := map[string]string{}
	for tr := tar.NewReader(bytes.NewReader(text)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := all[h.Name]; twice {
			t.Errorf("the tar has %s twice", h.Name)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("the owner of %s is %d:%d %q; want 0:0 and no name", h.Name, h.Uid, h.Gid, h.Uname)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			all[h.Name] = string(content)
		case tar.TypeSymlink:
			all[h.Name] = "-> " + h.Linkname
		}
	}
}

func TestRoot(t *testing.T) {
	t.Parallel()
	c := smallConfig(t)
	packages, err := readLock(c.lock)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.fetch(t.Context(), packages); err != nil {
		t.Fatal(err)
	}
	var first, second bytes.Buffer
	for _, to := range []*bytes.Buffer{&first, &second} {
		if err := writeRoot(t.Context(), to, "amd64", ofArch(packages, runtime.GOARCH)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two root file systems of the same packages differ")
	}
	got := entries(t, first.Bytes())
	status := got["var/lib/dpkg/status"]
	delete(got, "var/lib/dpkg/status")
	want := map[string]string{
		"bin": "-> usr/bin", "lib": "-> usr/lib", "lib64": "-> usr/lib64", "sbin": "-> usr/sbin",
		"usr/bin/dash": "shell", "usr/bin/sh": "-> dash", "usr/bin/mawk": "awk",
		"usr/bin/awk": "-> /etc/alternatives/awk", "etc/alternatives/awk": "-> /usr/bin/mawk",
		"usr/bin/nawk": "-> /etc/alternatives/nawk", "etc/alternatives/nawk": "-> /usr/bin/mawk",
		certificateDir + "/A.crt": "first\n", certificateDir + "/B.crt": "second", certificateFile: "first\nsecond\n",
		"usr/share/doc/ca-certificates/copyright": "licence",
		masterDir + "/passwd.master":              "root:x:0:0\n", masterDir + "/group.master": "root:x:0:\n",
		"etc/passwd": "root:x:0:0\n", "etc/group": "root:x:0:\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("root file system (-want +got):\n%s", diff)
	}
	// dpkg-query, Debian's own tool, must be able to read the package list.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "status"), []byte(status), 0o600); err != nil {
		t.Fatal(err)
	}
	listed, err := output(t.Context(), "", nil, "dpkg-query", "--admindir", dir, "--show",
		"--showformat", "${Package} ${Version} ${db:Status-Status}\n")
	list := "base-passwd 1:2+3 installed\nca-certificates 1:2+3 installed\nmawk 1:2+3 installed\n"
	if err != nil || string(listed) != list {
		t.Errorf("dpkg-query = %q, %v; want %q", listed, err, list)
	}
}

func TestRootRefuses(t *testing.T) {
	t.Parallel()
	c := smallConfig(t)
	lock := debFile(t, c.archives[0], "one", "all", map[string]string{"bin/tool": "1"}, nil) +
		debFile(t, c.archives[0], "two", "all", map[string]string{"usr/bin/tool": "2"}, nil)
	if err := os.WriteFile(c.lock, []byte(lock), 0o600); err != nil {
		t.Fatal(err)
	}
	packages, err := readLock(c.lock)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.fetch(t.Context(), packages); err != nil {
		t.Fatal(err)
	}
	err = writeRoot(t.Context(), io.Discard, "amd64", packages)
	if err == nil || !strings.Contains(err.Error(), "usr/bin/tool") {
		t.Errorf("writeRoot of two packages with the same file = %v; want an error that names it", err)
	}
	// The lock file and the package itself must have the same architecture.
	other := slices.Clone(packages)
	other[0].arch = "arm64"
	if err := c.fetch(t.Context(), other); !fault.Is(err, fault.Mismatch) {
		t.Errorf("fetch of a package for all as one for arm64 = %v; want %v", err, fault.Mismatch)
	}
	// A file whose SHA-256 differs from packages.lock counts as missing.
	c.cache = t.TempDir()
	if err := os.WriteFile(filepath.Join(c.archives[0], packages[0].path), []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.fetch(t.Context(), packages); !fault.Is(err, fault.InputMissing) {
		t.Errorf("fetch from an archive with other bytes = %v; want %v", err, fault.InputMissing)
	}
	if left, err := os.ReadDir(c.cache); err != nil || len(left) != 1 {
		t.Errorf("the cache has %v, %v; want the one package that is right", left, err)
	}
}

// TestRootTakesNoRights checks that the root file system keeps no set-user-ID bit, no set-group-ID bit and no file
// capability of a Debian package.
func TestRootTakesNoRights(t *testing.T) {
	t.Parallel()
	var in, out bytes.Buffer
	tw := tar.NewWriter(&in)
	if err := tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: "./usr/bin/su", Mode: 0o6755,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"},
	}); err != nil {
		t.Fatal(err)
	}
	r := &rootFS{tw: tar.NewWriter(&out), seen: map[string]bool{}}
	if err := errors.Join(tw.Close(), r.copyAll(tar.NewReader(&in)), r.tw.Close()); err != nil {
		t.Fatal(err)
	}
	h, err := tar.NewReader(&out).Next()
	if err != nil || h.Name != "usr/bin/su" || h.Mode != 0o755 || len(h.PAXRecords) != 0 {
		t.Errorf("copyAll of a set-user-ID file = %+v, %v; want mode 755 and no extended attributes", h, err)
	}
}

func TestReadLockRefuses(t *testing.T) {
	t.Parallel()
	sum := strings.Repeat("a", 64)
	for name, line := range map[string]string{
		"fields":    "amd64 " + sum + " 1",
		"sum":       "amd64 " + sum[1:] + " 1 pool/a.deb",
		"no size":   "amd64 " + sum + " 0 pool/a.deb",
		"too much":  "amd64 " + sum + " 999999999999 pool/a.deb",
		"outside":   "amd64 " + sum + " 1 pool/../../a.deb",
		"elsewhere": "amd64 " + sum + " 1 /etc/a.deb",
	} {
		file := filepath.Join(t.TempDir(), "lock")
		if err := os.WriteFile(file, []byte("# x\n"+line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := readLock(file); !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("%s: readLock = %v, %v; want %v that names line 2", name, got, err, fault.Usage)
		}
	}
}

// TestLock checks that packages.sh asks for the packages that Dockerfile.builder installs, and that packages.lock lists
// these packages for both architectures.
func TestLock(t *testing.T) {
	t.Parallel()
	all, err := readLock("packages.lock")
	if err != nil {
		t.Fatal(err)
	}
	dockerfile, err := os.ReadFile("../../Dockerfile.builder")
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("packages.sh")
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(dockerfile),
		"AS builder\nRUN apt-get update \\\n && apt-get install -y --no-install-recommends \\\n")
	list, _, ok := strings.Cut(list, "\\\n")
	names := strings.Fields(list)
	if !ok || len(names) == 0 {
		t.Fatalf("Dockerfile.builder installs %q; want a list of packages", list)
	}
	if want := "packages=('?essential' " + strings.Join(names, " ") + ")\n"; !strings.Contains(string(script), want) {
		t.Errorf("packages.sh asks for other packages than Dockerfile.builder; want %q", want)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		for _, name := range append(names, "base-files", "bash", "coreutils", "dash", "libc6", "mawk") {
			found := false
			for _, p := range ofArch(all, arch) {
				found = found || strings.HasPrefix(filepath.Base(p.path), name+"_")
			}
			if !found {
				t.Errorf("packages.lock has no %s for %s; write it again: make release-packages", name, arch)
			}
		}
	}
}
