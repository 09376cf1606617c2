package agent

import (
	"context"
	"errors"
	"path"

	"github.com/prebake/prebake/fetcher/internal/cdi"
	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/ldcache"
)

// ldFile exists if this program has added the library folder to the node's ld.so.conf.
const ldFile = ".prebake/ld-so-conf"

// exposeLibraries makes the libraries available to the node's own programs.
func (a *Agent) exposeLibraries(ctx context.Context, store *install.Store) {
	note := func() error { return store.WriteFile(ldFile, nil) }
	err := ldcache.Add(ctx, a.parts.Node, path.Join(a.cfg.InstallDir, "lib64"), note)
	if err != nil && !errors.Is(err, ldcache.ErrNone) {
		a.parts.Log.WarnContext(ctx, "could not register the libraries with ldconfig", "err", err)
	}
}

// hideLibraries undoes exposeLibraries for a driver that is no longer active. If added is true, it also removes the
// library folder from ld.so.conf.
func (a *Agent) hideLibraries(ctx context.Context, added bool) {
	err := ldcache.Refresh(ctx, a.parts.Node)
	if added {
		err = ldcache.Remove(ctx, a.parts.Node, path.Join(a.cfg.InstallDir, "lib64"))
	}
	if err != nil && !errors.Is(err, ldcache.ErrNone) {
		a.parts.Log.WarnContext(ctx, "could not remove the libraries from ldconfig", "err", err)
	}
}

// addedLibraries reports whether this program added the library folder to ld.so.conf.
func addedLibraries(store *install.Store) bool {
	raw, err := store.ReadFile(ldFile)
	return err == nil && raw != nil
}

// describeGPUs writes the CDI description of the GPUs for container runtimes. If no driver is loaded, or another one
// than the installed one, describeGPUs removes the description.
func (a *Agent) describeGPUs(ctx context.Context, v gpucheck.Verdict) {
	err := func() error {
		if _, loaded := v.Modules["nvidia"]; !loaded || v.State == gpucheck.Drifted { // the installed libraries do not fit
			return cdi.Remove(a.parts.Node)
		}
		gpus, err := cdi.GPUs(a.node)
		if err != nil || len(gpus) == 0 {
			return err
		}
		present := map[string]bool{}
		for name := range v.Modules {
			present[name] = true
		}
		nodes, err := devnode.Plan(a.node, present)
		if err != nil {
			return err
		}
		var names []string
		for _, n := range nodes {
			names = append(names, n.Name)
		}
		_, err = cdi.Write(a.parts.Node, cdi.Spec(gpus, a.cfg.InstallDir, names))
		return err
	}()
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not describe the GPUs to container runtimes", "err", err)
	}
}
