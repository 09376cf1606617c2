package main

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// times stands in for the registry. It records when collections run.
type times []time.Time

func (c *times) Collect(_ context.Context, now time.Time) (ocistore.Collected, error) {
	*c = append(*c, now)
	return ocistore.Collected{}, nil
}

// TestCollectSoon checks that the first collection of unneeded blobs runs some minutes after the start of the server,
// and the next ones every six hours.
func TestCollectSoon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, stop := context.WithTimeout(t.Context(), 7*time.Hour)
		defer stop()
		var runs times
		if err := collect(ctx, &runs, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		if len(runs) != 2 || runs[0].Sub(start) < 2*time.Minute || runs[0].Sub(start) > 5*time.Minute ||
			runs[1].Sub(runs[0]) != 6*time.Hour {
			t.Errorf("collect() from %v ran at %v; want within 2 to 5 minutes, and 6 hours later", start, runs)
		}
	})
}
