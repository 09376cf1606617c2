package agent

import (
	"context"
	"errors"
	"path"

	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/ldcache"
)

// ldFile notes that this program named the folder of libraries in the node's ld.so.conf.
const ldFile = ".prebake/ld-so-conf"

// exposeLibraries lets the node's own programs find the libraries. Pods do without.
func (a *Agent) exposeLibraries(ctx context.Context, store *install.Store) {
	added, err := ldcache.Add(ctx, a.parts.Node, path.Join(a.cfg.InstallDir, "lib64"))
	if added {
		err = errors.Join(err, store.WriteFile(ldFile, nil))
	}
	if err != nil && !errors.Is(err, ldcache.ErrNone) {
		a.parts.Log.WarnContext(ctx, "tell the node's programs of the libraries", "err", err)
	}
}

// concealLibraries is the opposite, for a driver that was taken out of force: all that was
// not there before goes.
func (a *Agent) concealLibraries(ctx context.Context, added bool) {
	err := ldcache.Refresh(ctx, a.parts.Node)
	if added {
		err = ldcache.Remove(ctx, a.parts.Node, path.Join(a.cfg.InstallDir, "lib64"))
	}
	if err != nil && !errors.Is(err, ldcache.ErrNone) {
		a.parts.Log.WarnContext(ctx, "take the libraries from the node's programs", "err", err)
	}
}

// addedLibraries reports whether this program named the folder.
func addedLibraries(store *install.Store) bool {
	raw, err := store.ReadFile(ldFile)
	return err == nil && raw != nil
}
