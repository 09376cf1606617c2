package main

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// verifyAgain is the minimum pause between two passes over a registry's blobs, and the pause after an error.
const verifyAgain = time.Hour

// verifier compares the content of a registry with its digests.
type verifier interface {
	NextPass() time.Time
	Verify(ctx context.Context, rate int64, found func(ocistore.Damage)) (ocistore.Verified, error)
}

// verify reads all blobs of a registry at intervals, at most rate bytes per second, until ctx is done. The first pass
// begins soon after the start, or when it is due. With rate 0, verify reads none.
func verify(ctx context.Context, r verifier, rate int64, log *slog.Logger) error {
	if rate == 0 {
		return nil
	}
	for least := collectFirst + rand.N(collectSpread); ; least = verifyAgain {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(least, time.Until(r.NextPass()))):
		}
		begin := time.Now()
		out, err := r.Verify(ctx, rate, func(d ocistore.Damage) { warnOfDamage(ctx, log, d) })
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			log.WarnContext(ctx, "verification of blobs incomplete", "err", err)
		default:
			log.InfoContext(ctx, "blobs verified", "blobs", out.Blobs, "bytes", out.Bytes, "damaged", out.Damaged, "took",
				time.Since(begin).Round(time.Second))
		}
	}
}
