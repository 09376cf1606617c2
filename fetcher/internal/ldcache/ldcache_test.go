package ldcache_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/ldcache"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/testkit/ondisk"
)

// library returns the path of a library of this machine that ldconfig can find.
func library(t *testing.T) string {
	t.Helper()
	const pattern = "/lib/*-linux-gnu/libm.so.6"
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Skipf("this machine has no %s, which Debian's package libc6 contains", pattern)
	}
	return found[0]
}

func write(t *testing.T, name string, data []byte, mode os.FileMode) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, data, mode)); err != nil {
		t.Fatal(err)
	}
}

// TestCache runs this machine's ldconfig in the root of a fake node. It checks the lines in etc/ld.so.conf, and reads
// the cache back.
func TestCache(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: ldconfig runs in the node's root")
	}
	ldconfig, err := os.ReadFile("/sbin/ldconfig") // Debian's ldconfig is statically linked
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("this machine has no /sbin/ldconfig, which Debian's package libc-bin contains")
	}
	if err != nil {
		t.Fatal(err)
	}
	lib, err := os.ReadFile(library(t))
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	write(t, filepath.Join(root, "usr/sbin/ldconfig"), ldconfig, 0o755)
	write(t, filepath.Join(root, "etc/ld.so.conf"), []byte("include /etc/ld.so.conf.d/*.conf\n# theirs\n"), 0o644)
	write(t, filepath.Join(root, "nv/lib64/libm.so.6"), lib, 0o755)
	if err := os.Symlink("usr/sbin", filepath.Join(root, "sbin")); err != nil {
		t.Fatal(err)
	}
	node, err := noderoot.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	listed := func() string {
		out, err := exec.CommandContext(t.Context(), "/sbin/ldconfig", "-p", "-C",
			filepath.Join(root, "etc/ld.so.cache")).Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	config := func() string {
		raw, err := os.ReadFile(filepath.Join(root, "etc/ld.so.conf"))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	for i := range 3 {
		added := false
		note := func() error { added = true; return nil }
		if err := ldcache.Add(t.Context(), node, "/nv/lib64", note); err != nil || added != (i == 0) {
			t.Fatalf("Add = %v, noted %t", err, added)
		}
	}
	if !strings.Contains(listed(), "/nv/lib64/libm.so.6") {
		t.Errorf("the cache lacks the library:\n%s", listed())
	}
	if want := "include /etc/ld.so.conf.d/*.conf\n# theirs\n/nv/lib64\n"; config() != want {
		t.Errorf("ld.so.conf is %q; want %q", config(), want)
	}
	// Remove must also remove the lines that Google's installer adds at each run.
	write(t, filepath.Join(root, "etc/ld.so.conf"), []byte(config()+"/nv/lib64\n"), 0o644)
	if err := ldcache.Remove(t.Context(), node, "/nv/lib64"); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(listed(), "/nv/lib64") || config() != "include /etc/ld.so.conf.d/*.conf\n# theirs\n" {
		t.Errorf("afterwards ld.so.conf is %q and the cache\n%s", config(), listed())
	}
	left, err := filepath.Glob(filepath.Join(root, "etc/.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left in etc: %v, %v", left, err)
	}
}

func TestNoLdconfig(t *testing.T) {
	t.Parallel()
	node, err := noderoot.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := ldcache.Add(t.Context(), node, "/x", func() error { return nil }); !errors.Is(err, ldcache.ErrNone) {
		t.Errorf("Add without an ldconfig = %v; want ErrNone", err)
	}
}

// TestFails checks the error if ldconfig of the node cannot run.
func TestFails(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: ldconfig runs in the node's root")
	}
	root, node := brokenNode(t)
	if err := ldcache.Add(t.Context(), node, "/x", func() error { return nil }); err == nil ||
		!strings.Contains(err.Error(), "run the node's /sbin/ldconfig") {
		t.Errorf("Add with a broken ldconfig = %v; want an error", err)
	}
	if raw, err := os.ReadFile(filepath.Join(root, "etc/ld.so.conf")); err != nil || string(raw) != "/x\n" {
		t.Errorf("ld.so.conf is %q, %v", raw, err)
	}
}

// brokenNode returns a node whose ldconfig does not run, and the folder of its root.
func brokenNode(t *testing.T) (string, *noderoot.Root) {
	t.Helper()
	root := t.TempDir()
	write(t, filepath.Join(root, "sbin/ldconfig"), []byte("no program"), 0o755)
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	node, err := noderoot.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = node.Close() }) // a failed close of a folder loses no data
	return root, node
}

// TestOutlivesPowerCut checks that Add flushes etc/ld.so.conf of the node to the disk. Otherwise a power cut may leave
// an empty file, without the lines of other installers. At first, the node has no such file, because some file systems
// flush a file by themselves when it replaces another one.
func TestOutlivesPowerCut(t *testing.T) {
	t.Parallel()
	root, node := brokenNode(t)
	// ldconfig fails to run, but only after the file was written.
	if err := ldcache.Add(t.Context(), node, "/x", func() error { return nil }); err == nil {
		t.Error("Add with a broken ldconfig = nil; want an error")
	}
	ondisk.Check(t, filepath.Join(root, "etc/ld.so.conf"))
}
