package tarball_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/builder/internal/tarball"
)

// TestNamesSurviveACrash checks that Publish syncs each folder after it has added the folder's last name. Without the
// fsync, a name could be gone after a crash.
func TestNamesSurviveACrash(t *testing.T) {
	t.Parallel()
	s, _ := newSigner(t)
	top := t.TempDir()
	certain := map[string]bool{}
	b, err := tarball.OpenFolder(filepath.Join(top, "new", "bucket"), func(d *os.File) error {
		entries, err := os.ReadDir(d.Name())
		for _, e := range entries {
			certain[filepath.Join(d.Name(), e.Name())] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	if _, err := tarball.Publish(t.Context(), b, newRelease(t, s, open, "")); err != nil {
		t.Fatal(err)
	}
	objects := 0
	err = filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil || name == top:
			return err
		case !certain[name]:
			t.Errorf("%s can be lost", name)
		case d.Name() == ".prebake": // the lock inside it need not survive
			return fs.SkipDir
		case d.Type().IsRegular():
			objects++
		}
		return nil
	})
	if err != nil || objects < 5 {
		t.Errorf("%d objects, %v; want those of a release", objects, err)
	}
}
