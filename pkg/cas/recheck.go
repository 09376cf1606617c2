package cas

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Recheck checks again that the cached tree that contains path matches its seal. Call Recheck at the end of a long job
// that read the tree. If the tree was damaged meanwhile, Recheck removes it, and the error is of kind Transient. For a
// path outside of all trees, Recheck returns nil.
func (c *Cache) Recheck(ctx context.Context, path string) error { return c.recheck(ctx, path, false) }

// Reread is like [Cache.Recheck], but reads every byte again. It finds errors of the disk that change no metadata. Call
// it before a step that cannot be undone, such as a signature.
func (c *Cache) Reread(ctx context.Context, path string) error { return c.recheck(ctx, path, true) }

func (c *Cache) recheck(ctx context.Context, path string, whole bool) error {
	rel, err := filepath.Rel(filepath.Join(c.dir, treesDir), path)
	if err != nil {
		return fmt.Errorf("check the cached file %s again: %w", path, err)
	}
	parts := strings.SplitN(rel, string(filepath.Separator), 3)
	if len(parts) < 2 || !filepath.IsLocal(rel) {
		return nil
	}
	kind, key := parts[0], parts[1]
	tree := filepath.Join(c.dir, treesDir, kind, key)
	if whole {
		c.mu.Lock()
		delete(c.read, tree)
		c.mu.Unlock()
	}
	ok, trouble, err := c.intact(ctx, kind, key, tree)
	switch {
	case ok || err != nil:
		return err
	case trouble == "":
		trouble = "the tree does not exist any more"
	default:
		if err := c.discard(kind, key, tree, trouble); err != nil {
			return err
		}
	}
	return fault.New(fault.Transient,
		fmt.Sprintf("cached tree %s/%s was damaged while it was in use: %s", kind, key, trouble),
		"run the command again, which makes the tree again; check the disk of "+c.dir)
}
