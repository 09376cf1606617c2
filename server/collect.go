package main

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// The first collection comes soon after the start, because the disk may be full. Its exact time is random within
// collectSpread, so that servers that start together do not all read one disk at once. collectEvery is the pause
// between two collections.
const (
	collectFirst  = 2 * time.Minute
	collectSpread = 3 * time.Minute
	collectEvery  = 6 * time.Hour
)

// collector removes unreferenced content of a registry.
type collector interface {
	Collect(ctx context.Context, now time.Time) (ocistore.Collected, error)
}

// collect deletes unreferenced content of the registry at intervals, until ctx is done.
func collect(ctx context.Context, r collector, log *slog.Logger) error {
	for next := collectFirst + rand.N(collectSpread); ; next = collectEvery {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(next):
		}
		out, err := r.Collect(ctx, time.Now())
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			log.WarnContext(ctx, "collection incomplete", "err", err)
		case out.Blobs > 0:
			log.InfoContext(ctx, "blobs collected", "blobs", out.Blobs, "bytes", out.Bytes)
		}
		for _, d := range out.Restored {
			log.InfoContext(ctx, "blob restored", "digest", d, "hint",
				"the blob can be read again; check the disk and the memory")
		}
		for _, d := range out.Damaged {
			log.WarnContext(ctx, "manifest damaged", "digest", d, "hint", "push this manifest again, or delete it")
		}
		for _, d := range out.DamagedBlobs {
			warnOfDamage(ctx, log, d)
		}
	}
}

// warnOfDamage writes damaged or lost content of the registry to the log, with the next step.
func warnOfDamage(ctx context.Context, log *slog.Logger, d ocistore.Damage) {
	if d.Kept != "" {
		log.WarnContext(ctx, "blob not verified", "path", d.Kept, "err", d.Cause,
			"hint", "look at the disk, and at the owner and the mode of this path; the server tries again each hour")
		return
	}
	hint := "push this manifest again, or delete it and request its build again: docs/how-to/back-up.md"
	if d.Manifests == 0 {
		hint = "no manifest needs this blob, so there is nothing to do"
	}
	keys := []any{"digest", d.Digest, "manifest", d.Manifest, "manifests", d.Manifests, "hint", hint}
	if d.Cause != nil {
		keys = append(keys, "err", d.Cause)
	}
	log.WarnContext(ctx, "blob damaged", keys...)
}
