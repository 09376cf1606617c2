package jobs_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/server/internal/jobs"
)

// countingWorld is a world that counts the questions about single builds.
type countingWorld struct {
	*world
	asked int
}

func (c *countingWorld) Lookup(ctx context.Context, id int64) (queue.JobState, error) {
	c.asked++
	return c.world.Lookup(ctx, id)
}

func (c *countingWorld) Build(ctx context.Context, id int64) (api.Build, error) {
	c.asked++
	return c.world.Build(ctx, id)
}

// TestSweepAsksOnce checks that a sweep reads all open builds together and asks for no single one. In an earlier
// release, an idle server with 2,000 builds used a large part of a core.
func TestSweepAsksOnce(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	w := &countingWorld{world: &world{standing: map[int64]queue.JobState{}}}
	for id := range int64(2000) {
		b := api.Build{ID: id, State: api.Queued}
		w.standing[id] = queue.JobState{Found: true, State: "available"}
		if id%10 == 0 {
			b.State, b.HeartbeatAt = api.Building, &now
			w.standing[id] = queue.JobState{Found: true, State: "running"}
		}
		w.open = append(w.open, b)
	}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	if err := s.Sweep(t.Context()); err != nil || w.asked != 0 || len(w.did) != 0 {
		t.Errorf("Sweep() of 2000 open builds = %v, asked for %d of them, did %v; want none and nothing", err, w.asked, w.did)
	}
}
