package pipeline

import (
	"context"
	"errors"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

// OpenFresh returns an empty cache for the products of the builds of one pass, and a function that closes and removes
// the cache. A pass is one run over a wish list, or one command. The cells of a pass share the compiled objects in this
// cache (see Config.Fresh).
//
// A build with this cache is as safe as a build without any cache, because nothing in it is older than the pass:
//
//   - The cache is a new folder below the given cache. Only this user may enter the folder, and nobody can predict its
//     name.
//   - No later run can read the folder, because the returned function removes it. If the program is killed, the next
//     [cas.Open] of the given cache removes the folder, before that run reads anything.
//   - Everything in it was made during the pass, by this program, from inputs that were compared with their digests.
//     Each key covers everything that decides the content, so a cell that compiled alone would get the same content.
//   - A wrong product of one compile may fail further cells of the pass, but is never published: the builds with this
//     cache publish only bytes that are published already, and refuse all others.
func OpenFresh(cache *cas.Cache) (fresh *cas.Cache, remove func() error, err error) {
	dir, cleanup, err := cache.TempDir("products-")
	if err != nil {
		return nil, nil, err
	}
	if fresh, err = cas.Open(dir); err != nil {
		return nil, nil, errors.Join(err, cleanup())
	}
	fresh.Notify, fresh.Count = cache.Notify, cache.Count
	return fresh, func() error { return errors.Join(fresh.Close(), cleanup()) }, nil
}

// startFresh sets Config.Fresh as the cache for the rest of this build: the build stores its products there, and reuses
// only products from there. If Config.Fresh is nil, startFresh opens an empty cache. The returned function ends the use
// of the cache.
func (r *run) startFresh() (end func(), err error) {
	fresh, remove := r.cfg.Fresh, func() error { return nil }
	if fresh == nil {
		if fresh, remove, err = OpenFresh(r.cfg.Cache); err != nil {
			return nil, err
		}
	}
	r.products, r.again, r.res.Renewal = fresh, true, true
	release := fresh.Begin()
	return func() {
		for _, cleanup := range r.modulesMade {
			_ = cleanup() // a failure is ignored: the end of the pass removes the folder
		}
		release()
		_ = remove() // a failure is ignored: the next Open of the cache removes the folder
	}, nil
}

// moduleTree calls [cas.Cache.Tree] for modules, except in a renewal (see Config.RebuildAfter). The provenance of a
// renewal must be about files that this build compiled, so cached modules are no use to it. It gets a folder that is
// removed after the build.
func (r *run) moduleTree(ctx context.Context, kind, key string,
	fill func(ctx context.Context, dir string) error) (dir string, cached bool, err error) {
	if !r.again {
		return r.products.Tree(ctx, kind, key, fill)
	}
	dir, cleanup, err := r.products.TempDir(kind + "-")
	if err != nil {
		return "", false, err
	}
	r.modulesMade = append(r.modulesMade, cleanup)
	if err = fill(ctx, dir); fault.Is(err, fault.Internal) {
		err = fault.CacheDisk(err)
	}
	return dir, false, err
}
