package agent

import (
	"context"
	"errors"
	"path"

	"github.com/prebake/prebake/fetcher/internal/install"
)

// makeRoom frees space on a full disk, and then writes the records. It removes leftovers of staging, and all drivers
// and layers except these: the current and the previous driver, drivers that this node compiled, and drivers that a
// record names. full is the error of the write on the full disk.
func (a *Agent) makeRoom(ctx context.Context, store *install.Store, all attempts, full error) error {
	sets, err := store.Sets()
	if err != nil {
		return errors.Join(full, err)
	}
	var keep []string // digests
	for _, set := range sets {
		if set.Origin == install.MadeHere {
			keep = append(keep, set.Digest)
		}
	}
	for digest, at := range all {
		keep = append(keep, digest)
		for _, pointer := range []string{at.Before.Current, at.Before.Previous} {
			keep = append(keep, "sha256:"+path.Base(pointer))
		}
	}
	err = store.Sweep(keep...)
	if werr := a.writeAttempts(store, all); werr != nil {
		return errors.Join(werr, err)
	}
	a.parts.Log.WarnContext(ctx, "removed unused drivers and leftovers, because the disk was full", "err", err)
	a.reserve(ctx, store)
	return nil
}
