package cas_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

// TestTreeIsReadOnce checks when Tree makes a tree again: only if the content of a file has changed. It must do so even
// if the file's size and times are the same as before.
func TestTreeIsReadOnce(t *testing.T) {
	t.Parallel()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	made := 0
	tree := func() (string, bool) {
		t.Helper()
		dir, cached, err := cache.Tree(t.Context(), "kind", "key", func(_ context.Context, dir string) error {
			made++
			return os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
		return dir, cached
	}
	dir, _ := tree()
	file := filepath.Join(dir, "file")
	old := func() {
		t.Helper()
		if err := os.Chtimes(file, time.Unix(1, 0), time.Unix(2, 0)); err != nil {
			t.Fatal(err)
		}
	}
	old()
	if _, cached := tree(); !cached {
		t.Error("a tree with other times is made again")
	}
	for range 3 {
		if _, cached := tree(); !cached {
			t.Error("a tree that nobody touched is made again")
		}
		if err := cache.Recheck(t.Context(), dir); err != nil {
			t.Error(err)
		}
	}
	if err := cache.Reread(t.Context(), dir); err != nil {
		t.Error(err)
	}
	// The new content has the size of the old content, and the file gets its old times again.
	if err := os.WriteFile(file, []byte("CONTENT"), 0o644); err != nil {
		t.Fatal(err)
	}
	old()
	if err := cache.Recheck(t.Context(), dir); !fault.Is(err, fault.Transient) {
		t.Errorf("Recheck of a damaged tree = %v; want transient", err)
	}
	if _, cached := tree(); cached || made != 2 {
		t.Errorf("Tree returned a damaged tree: it was made %d times; want 2", made)
	}
}
