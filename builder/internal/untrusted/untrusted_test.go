package untrusted_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/untrusted"
)

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	mkdir(t, filepath.Dir(path))
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, to, path string) {
	t.Helper()
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

// TestHostile replaces a file by links, pipes and other entries that attack the reader. The package must not return any
// byte of the host's files, and must not wait.
func TestHostile(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	dir := filepath.Join(top, "left")
	write(t, filepath.Join(top, "secret"), "the key")
	write(t, filepath.Join(dir, "sub/file"), "content")
	symlink(t, "../secret", filepath.Join(dir, "up"))
	symlink(t, filepath.Join(top, "secret"), filepath.Join(dir, "absolute"))
	symlink(t, "/proc/self/environ", filepath.Join(dir, "environ"))
	symlink(t, "sub/file", filepath.Join(dir, "inner"))
	symlink(t, "sub", filepath.Join(dir, "folder"))
	symlink(t, "..", filepath.Join(dir, "parent"))
	symlink(t, "loop", filepath.Join(dir, "loop"))
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := untrusted.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for name, want := range map[string]error{
		"up": untrusted.ErrKind, "absolute": untrusted.ErrKind, "environ": untrusted.ErrKind, "inner": untrusted.ErrKind,
		"folder/file": untrusted.ErrKind, "parent/secret": untrusted.ErrKind, "loop": untrusted.ErrKind,
		"pipe": untrusted.ErrKind,
		"sub":  untrusted.ErrKind, "sub/file/x": untrusted.ErrKind, "none": fs.ErrNotExist, "sub/none": fs.ErrNotExist,
		"../secret": fs.ErrInvalid, "/etc/passwd": fs.ErrInvalid, "": fs.ErrInvalid,
	} {
		if text, err := d.Read(name, 100); !errors.Is(err, want) || len(text) != 0 {
			t.Errorf("Read(%q) = %q, %v; want %v", name, text, err, want)
		}
		to := filepath.Join(t.TempDir(), "copy")
		if _, err := d.Copy(to, name, 100); !errors.Is(err, want) {
			t.Errorf("Copy(%q) = %v; want %v", name, err, want)
		}
		if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Copy(%q) left a file", name)
		}
	}
	if text, err := d.Read("sub/file", 7); err != nil || string(text) != "content" {
		t.Errorf("Read of a file = %q, %v", text, err)
	}
	if _, err := d.Read("sub/file", 6); !errors.Is(err, untrusted.ErrLarge) {
		t.Errorf("Read of a file over the limit = %v; want %v", err, untrusted.ErrLarge)
	}
	files, err := d.Files()
	if diff := cmp.Diff([]string{"sub/file"}, files); err != nil || diff != "" {
		t.Errorf("Files = %v (-want +got):\n%s", err, diff)
	}
	if _, err := untrusted.Open(filepath.Join(dir, "folder")); !errors.Is(err, untrusted.ErrKind) {
		t.Errorf("Open of a link = %v; want %v", err, untrusted.ErrKind)
	}
}

// TestCopy checks that a copy is a new file: Copy must not overwrite a file or follow a link.
func TestCopy(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	write(t, filepath.Join(top, "left/file"), "content")
	symlink(t, filepath.Join(top, "elsewhere"), filepath.Join(top, "link"))
	d, err := untrusted.Open(filepath.Join(top, "left"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	sum, err := d.Copy(filepath.Join(top, "copy"), "file", 100)
	if want := "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"; err != nil || sum != want {
		t.Errorf("Copy = %s, %v; want %s", sum, err, want)
	}
	for _, to := range []string{"copy", "link"} {
		if _, err := d.Copy(filepath.Join(top, to), "file", 100); !errors.Is(err, fs.ErrExist) {
			t.Errorf("Copy to %s = %v; want %v", to, err, fs.ErrExist)
		}
	}
}
