package jobs_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/server/internal/jobs"
)

// world is both sides of the sweep, and what it did.
type world struct {
	open     []api.Build
	standing map[int64]queue.Standing
	did      []string
}

func (w *world) OpenBuilds(context.Context) ([]api.Build, error) { return w.open, nil }
func (w *world) Enqueue(_ context.Context, b api.Build) error {
	w.did = append(w.did, "enqueue")
	return nil
}
func (w *world) Abandon(_ context.Context, id int64, why string) error {
	if id == 13 {
		return errors.New("it is published and cannot become failed")
	}
	w.did = append(w.did, "abandon: "+why)
	return nil
}
func (w *world) Lookup(_ context.Context, id int64) (queue.Standing, error) {
	return w.standing[id], nil
}

func TestSweep(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		state api.State
		at    queue.Standing
		want  []string
	}{
		{"crashed before it was queued", api.Queued, queue.Standing{}, []string{"enqueue"}},
		{"waits", api.Queued, queue.Standing{Found: true, State: "available"}, nil},
		{"runs", api.Building, queue.Standing{Found: true, State: "running"}, nil},
		{"between two attempts", api.Building, queue.Standing{Found: true, State: "retryable", Error: "x"}, nil},
		{"job is gone", api.Building, queue.Standing{}, []string{"abandon: the queue lost the build's job"}},
		{"worker died five times", api.Building, queue.Standing{Found: true, Over: true, State: "discarded", Attempt: 5, Error: "the worker ended in mid-build"},
			[]string{"abandon: the job ended as discarded after 5 attempts: the worker ended in mid-build"}},
		{"ended without a report", api.Queued, queue.Standing{Found: true, Over: true, State: "completed", Attempt: 1},
			[]string{"abandon: the job ended as completed after 1 attempts: the worker reported no outcome"}},
	}
	for _, row := range rows {
		w := &world{open: []api.Build{{ID: 1, State: row.state}}, standing: map[int64]queue.Standing{1: row.at}}
		s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
		if err := s.Sweep(t.Context()); err != nil {
			t.Errorf("%s: Sweep() = %v", row.name, err)
		}
		if d := cmp.Diff(row.want, w.did); d != "" {
			t.Errorf("%s: Sweep() did (-want +got):\n%s", row.name, d)
		}
	}
}

// One build that cannot be swept keeps no other from it.
func TestSweepGoesOn(t *testing.T) {
	t.Parallel()
	over := queue.Standing{Found: true, Over: true, State: "discarded", Attempt: 5, Error: "x"}
	w := &world{open: []api.Build{{ID: 13, State: api.Building}, {ID: 1, State: api.Queued}}, standing: map[int64]queue.Standing{13: over}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
	if err := s.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), "build 13") {
		t.Errorf("Sweep() = %v; want the trouble with build 13", err)
	}
	if d := cmp.Diff([]string{"enqueue"}, w.did); d != "" {
		t.Errorf("Sweep() did (-want +got):\n%s", d)
	}
}

func TestRunEndsWithContext(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithCancel(t.Context())
	stop()
	s := jobs.Sweeper{Catalogue: &world{}, Queue: &world{}, Log: slog.New(slog.DiscardHandler)}
	if err := s.Run(ctx); err != nil {
		t.Errorf("Run() = %v; want nil", err)
	}
}
