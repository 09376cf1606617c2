package pipeline

import (
	"context"
	"errors"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

// OpenFresh returns an empty cache for what the builds of one pass make, and a function that closes and removes it. A
// pass is one run over a wish list, or one command. Cells of a pass share compiled objects in it (see Config.Fresh).
//
// To build with it is as safe as to compile from nothing, because nothing in it is older than the pass:
//
//   - It is a new folder below the given cache. Only this user may enter it, and its name is not known before.
//   - No later run can read it. The returned function removes it. If the program is killed, the next [cas.Open] of the
//     given cache removes it, before that run reads anything.
//   - Everything in it was made during the pass, by this program, from inputs that were compared with their digests.
//     Each key covers all that decides the content, so a cell that compiled alone would make the same.
//   - A compile that went wrong may spoil further cells of the pass, but not more: the builds with this cache publish
//     only the bytes that are published already, and refuse all others.
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

// startFresh makes the rest of this build put what it makes into Config.Fresh, and take nothing from elsewhere. The
// returned function ends the use of that cache.
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

// moduleTree is [cas.Cache.Tree] for modules. A build because of age gets a folder that lives as long as the build: its
// provenance must be about files that it compiled, so no other build would use its modules.
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
