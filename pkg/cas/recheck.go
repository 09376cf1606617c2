package cas

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Recheck compares the tree that path is in with its seal once more. A long
// job that read from a tree asks when it is done, and before it trusts what it
// made: [Cache.Tree] compared before it began. A tree that was damaged meanwhile
// is removed, and the error is [fault.Transient]: the same job may succeed.
// Paths outside of all trees are none of the cache's, and pass.
func (c *Cache) Recheck(ctx context.Context, path string) error { return c.recheck(ctx, path, false) }

// Reread is Recheck that reads every byte again. It finds what a disk changed
// behind everybody's back, and belongs before something irrevocable, such as a
// signature.
func (c *Cache) Reread(ctx context.Context, path string) error { return c.recheck(ctx, path, true) }

func (c *Cache) recheck(ctx context.Context, path string, whole bool) error {
	rel, err := filepath.Rel(filepath.Join(c.dir, treesDir), path)
	if err != nil {
		return fmt.Errorf("check %s again: %w", path, err)
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
		trouble = "it is gone"
	default:
		if err := c.discard(kind, key, tree, trouble); err != nil {
			return err
		}
	}
	return fault.New(fault.Transient,
		fmt.Sprintf("cached tree %s/%s was damaged while it was in use: %s", kind, key, trouble),
		"run the command again: it makes the tree again; check the disk of "+c.dir)
}
