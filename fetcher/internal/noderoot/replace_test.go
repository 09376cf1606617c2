package noderoot_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/testkit/ondisk"
)

// TestReplace checks that Replace writes the content and flushes it to the disk. If Replace fails, nothing must have
// changed.
func TestReplace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "own"), 0o755), os.Mkdir(filepath.Join(dir, "taken"), 0o755),
		os.WriteFile(filepath.Join(dir, "own/tmp"), []byte("left by a run that was killed"), 0o644)); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, text := range []string{"first", "second, longer", ""} {
		if err := noderoot.Replace(root, "file", "own/tmp", []byte(text)); err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(dir, "file")
		if raw, err := os.ReadFile(at); err != nil || string(raw) != text {
			t.Errorf("the file has %q, %v; want %q", raw, err, text)
		}
	}
	if err := noderoot.Replace(root, "taken", "own/tmp", nil); err == nil {
		t.Error("Replace of a folder = nil; want an error")
	}
	if err := noderoot.Replace(root, "none/file", "own/tmp", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Replace in a folder that does not exist = %v; want that", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "own/*")); err != nil || len(left) > 0 {
		t.Errorf("left %q, %v; want nothing", left, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "taken")); err != nil || !info.IsDir() {
		t.Errorf("the folder: %v; want it as before", err)
	}
	if err := noderoot.Replace(root, "new", "own/tmp", []byte("x")); err != nil {
		t.Fatal(err)
	}
	ondisk.Check(t, filepath.Join(dir, "new"))
}
