package jobs_test

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/server/internal/jobs"
)

// TestSweepAfterOutage checks builders whose reports the server could not store or receive for a while. After the
// outage, a builder must get time for a new report. Without one, it must count as dead.
func TestSweepAfterOutage(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	released := []string{"release", "put back: transient"}
	type step struct {
		at       int // seconds after noon
		readOnly bool
		beat     bool // whether the builder has reported since the last sweep
		want     []string
	}
	for _, row := range []struct {
		name  string
		steps []step
	}{
		{"writes fail, the builder lives", []step{{at: 0}, {at: 20, readOnly: true}, {at: 40, readOnly: true},
			{at: 60, readOnly: true}, {at: 65}, {at: 70, beat: true}, {at: 95}, {at: 101, want: released}}},
		{"writes fail, the builder is dead", []step{{at: 0}, {at: 20, readOnly: true}, {at: 40, readOnly: true},
			{at: 60, readOnly: true}, {at: 65}, {at: 90}, {at: 91, want: released}}},
		{"stall, the builder lives", []step{{at: 0}, {at: 5}, {at: 65}, {at: 70, beat: true}, {at: 95}}},
		{"stall, the builder is dead", []step{{at: 0}, {at: 5}, {at: 65}, {at: 90}, {at: 96, want: released}}},
	} {
		now, beat := noon, noon
		w := &world{open: []api.Build{{ID: 1, State: api.Building, HeartbeatAt: &beat}},
			standing: map[int64]queue.JobState{1: {Found: true, State: "running"}}}
		s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
		for _, step := range row.steps {
			now = noon.Add(time.Duration(step.at) * time.Second)
			w.did, w.readOnly = nil, step.readOnly
			if step.beat {
				beat = now
			}
			_ = s.Sweep(t.Context()) // an error is expected while writes fail
			if d := cmp.Diff(step.want, w.did); d != "" {
				t.Errorf("%s: after %d s, Sweep() did (-want +got):\n%s", row.name, step.at, d)
			}
		}
	}
}

// TestSlowSweepsFindDead checks that even sweeps that take long, with long pauses between them, find a dead builder.
func TestSlowSweepsFindDead(t *testing.T) {
	t.Parallel()
	for slow, within := range map[time.Duration]time.Duration{
		10 * time.Second: 5 * time.Minute,
		40 * time.Second: 10 * time.Minute, // the pause has a limit
	} {
		synctest.Test(t, func(t *testing.T) {
			beat := time.Now()
			w := &world{open: []api.Build{{ID: 1, State: api.Building, HeartbeatAt: &beat}}, slow: slow,
				standing: map[int64]queue.JobState{1: {Found: true, State: "running"}}}
			ctx, stop := context.WithTimeout(t.Context(), within)
			defer stop()
			s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
			if err := s.Run(ctx); err != nil {
				t.Fatal(err)
			}
			if len(w.did) == 0 {
				t.Errorf("sweeps of %v found no dead builder within %v", slow, within)
			}
		})
	}
}
