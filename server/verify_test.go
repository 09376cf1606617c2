package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// passes stands in for the registry. The first pass over all blobs takes a day, and the second one fails. Each next
// pass is due 30 days after the beginning of the last one.
type passes struct {
	began []time.Time
	rate  int64
}

func (p *passes) NextPass() time.Time {
	if n := len(p.began); n > 0 && n != 2 {
		return p.began[n-1].Add(30 * day)
	}
	return time.Time{}
}

func (p *passes) Verify(ctx context.Context, rate int64, _ func(ocistore.Damage)) (ocistore.Verified, error) {
	p.began, p.rate = append(p.began, time.Now()), rate
	switch len(p.began) {
	case 1:
		select {
		case <-ctx.Done():
		case <-time.After(day):
		}
	case 2:
		return ocistore.Verified{}, errors.New("the disk is away")
	}
	return ocistore.Verified{}, ctx.Err()
}

// TestVerifyEachMonth checks that the first pass over all blobs begins some minutes after the start of the server, and
// the next ones when they are due. A pass that failed must be repeated after an hour.
func TestVerifyEachMonth(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, stop := context.WithTimeout(t.Context(), 40*day)
		defer stop()
		var p passes
		if err := verify(ctx, &p, 5, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
		if len(p.began) != 3 || p.rate != 5 || p.began[0].Sub(start) < 2*time.Minute ||
			p.began[0].Sub(start) > 5*time.Minute {
			t.Fatalf("verify() from %v began passes at %v, with rate %d; want 3, the first within 2 to 5 minutes, with rate 5",
				start, p.began, p.rate)
		}
		want := []time.Time{p.began[0].Add(30 * day), p.began[0].Add(30*day + time.Hour)}
		if d := cmp.Diff(want, p.began[1:]); d != "" {
			t.Errorf("verify() began further passes (-want +got):\n%s", d)
		}
	})
	var p passes
	if err := verify(t.Context(), &p, 0, slog.New(slog.DiscardHandler)); err != nil || len(p.began) != 0 {
		t.Errorf("verify() with rate 0 = %v, and began %d passes; want none", err, len(p.began))
	}
}
