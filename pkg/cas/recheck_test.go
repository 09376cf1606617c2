package cas_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

func TestRecheck(t *testing.T) {
	t.Parallel()
	c, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fill := func(_ context.Context, dir string) error {
		if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "sub", "file"), []byte("content"), 0o644)
	}
	tree, _, err := c.Tree(t.Context(), "kind", "key", fill)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{tree, filepath.Join(tree, "sub"), t.TempDir(), c.Dir()} {
		if err := c.Recheck(t.Context(), path); err != nil {
			t.Errorf("Recheck(%s) = %v; want nil", path, err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "sub", "file"), []byte("cOntent"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"damaged", "gone"} {
		if err := c.Recheck(t.Context(), filepath.Join(tree, "sub")); !fault.Is(err, fault.Transient) {
			t.Errorf("Recheck of a %s tree = %v; want %v", want, err, fault.Transient)
		}
	}
	if _, cached, err := c.Tree(t.Context(), "kind", "key", fill); cached || err != nil {
		t.Errorf("Tree after it = cached %v, %v; want it made again", cached, err)
	}
}
