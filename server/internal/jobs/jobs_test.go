package jobs_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/server/internal/jobs"
)

// world stands in for the catalogue and the queue of a sweep. It records what the sweep does.
type world struct {
	open     []api.Build
	standing map[int64]queue.JobState
	ended    map[int64]api.State // states of builds that are not open
	finished time.Time           // when those builds ended; zero means not known
	unknown  int64               // the number of a build that the catalogue does not have
	empty    bool                // the catalogue has no builds at all
	away     bool
	readOnly bool          // Release fails
	slow     time.Duration // how long Open takes
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
func (w *world) Build(_ context.Context, id int64) (api.Build, error) {
	if id == w.unknown {
		return api.Build{}, fault.New(fault.NotFound, "build does not exist", "")
	}
	b := api.Build{ID: id, State: w.ended[id]}
	if !w.finished.IsZero() {
		b.FinishedAt = &w.finished
	}
	return b, nil
}
func (w *world) Update(_ context.Context, _ int64, u api.BuildUpdate) (api.Build, error) {
	w.did = append(w.did, "put back: "+u.Class)
	return api.Build{}, nil
}
func (w *world) Cancel(context.Context, int64) error { w.did = append(w.did, "cancel"); return nil }
func (w *world) SetPriority(_ context.Context, id int64, priority int) error {
	w.did = append(w.did, fmt.Sprintf("raise %d to %d", id, priority))
	return nil
}
func (w *world) End(context.Context, int64) error        { w.did = append(w.did, "end"); return nil }
func (w *world) HasBuilds(context.Context) (bool, error) { return !w.empty, nil }
func (w *world) Remove(_ context.Context, builds ...int64) (int, error) {
	w.did = append(w.did, fmt.Sprintf("remove %v", builds))
	return len(builds), nil
}
func (w *world) Release(context.Context, ...int64) error {
	if w.readOnly {
		return errors.New("the database is read-only")
	}
	w.did = append(w.did, "release")
	return nil
}
func (w *world) Open(context.Context) (map[int64]queue.JobState, error) {
	if w.away {
		return nil, errors.New("no database")
	}
	time.Sleep(w.slow)
	all := map[int64]queue.JobState{}
	for id, at := range w.standing {
		if at.Found && !at.Ended {
			all[id] = at
		}
	}
	return all, nil
}
func (w *world) Lookup(_ context.Context, id int64) (queue.JobState, error) {
	return w.standing[id], nil
}

func TestSweep(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		state api.State
		at    queue.JobState
		want  []string
	}{
		{"crashed before it was queued", api.Queued, queue.JobState{}, []string{"enqueue"}},
		{"waits", api.Queued, queue.JobState{Found: true, State: "available"}, nil},
		{"runs", api.Building, queue.JobState{Found: true, State: "running"}, nil},
		{"between two attempts", api.Building, queue.JobState{Found: true, State: "retryable", Error: "x"}, nil},
		{"job is gone, but perhaps not its builder", api.Building, queue.JobState{}, nil},
		{"worker died five times", api.Building,
			queue.JobState{Found: true, Ended: true, State: "discarded", Attempt: 5, Error: "the worker ended during the build"},
			[]string{"abandon: the job ended as discarded after 5 attempts: the worker ended during the build"}},
		{"ended without a report", api.Queued, queue.JobState{Found: true, Ended: true, State: "completed", Attempt: 1},
			[]string{"abandon: the job ended as completed after 1 attempts: the worker reported no result"}},
	}
	for _, row := range rows {
		w := &world{open: []api.Build{{ID: 1, State: row.state}}, standing: map[int64]queue.JobState{1: row.at}}
		s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
		if err := s.Sweep(t.Context()); err != nil {
			t.Errorf("%s: Sweep() = %v", row.name, err)
		}
		if d := cmp.Diff(row.want, w.did); d != "" {
			t.Errorf("%s: Sweep() did (-want +got):\n%s", row.name, d)
		}
	}
}

// TestSweepGoesOn checks that an error with one build does not keep the sweep from the other builds.
func TestSweepGoesOn(t *testing.T) {
	t.Parallel()
	over := queue.JobState{Found: true, Ended: true, State: "discarded", Attempt: 5, Error: "x"}
	w := &world{open: []api.Build{{ID: 13, State: api.Building}, {ID: 1, State: api.Queued}},
		standing: map[int64]queue.JobState{13: over}}
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

// TestSweepNoticesDeadBuilders checks that a builder counts as dead if it has not reported for 30 seconds, but not if
// no report could reach the server.
func TestSweepNoticesDeadBuilders(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	now, beat := noon, noon
	w := &world{open: []api.Build{{ID: 1, State: api.Building, HeartbeatAt: &beat}},
		standing: map[int64]queue.JobState{1: {Found: true, State: "running"}}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	sweep := func(at time.Duration, want ...string) {
		t.Helper()
		now, w.did = noon.Add(at), nil
		_ = s.Sweep(t.Context()) // one of the steps must return an error
		if d := cmp.Diff(want, w.did); d != "" {
			t.Errorf("after %v, Sweep() did (-want +got):\n%s", at, d)
		}
	}
	sweep(0)
	sweep(29 * time.Second)
	sweep(31*time.Second, "release", "put back: transient")
	w.away = true
	sweep(50 * time.Second)
	w.away = false
	sweep(10 * time.Minute) // no report could arrive for ten minutes
	sweep(10*time.Minute + 14*time.Second)
	beat = noon.Add(10*time.Minute + 15*time.Second)
	sweep(10*time.Minute + 40*time.Second)
	sweep(11 * time.Minute)
	sweep(11*time.Minute+11*time.Second, "release", "put back: transient")
}

// TestSweepTrustsNoClock checks a builder that reports regularly. The times of its reports come from another server
// whose clock is an hour behind. The builder must not count as dead.
func TestSweepTrustsNoClock(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	now, beat := noon, noon
	w := &world{open: []api.Build{{ID: 1, State: api.Building, HeartbeatAt: &beat}},
		standing: map[int64]queue.JobState{1: {Found: true, State: "running"}}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	for after := time.Duration(0); after < 2*time.Minute; after += 10 * time.Second {
		now = noon.Add(after)
		beat = now.Add(-time.Hour)
		if err := s.Sweep(t.Context()); err != nil || len(w.did) != 0 {
			t.Fatalf("after %v, Sweep() = %v and did %v; want nothing", after, err, w.did)
		}
	}
}

// TestSweepNoticesAfterRestart restarts a server after a builder died. The server must first wait for a report, but
// must notice within about a minute that the builder is dead.
func TestSweepNoticesAfterRestart(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	w := &world{open: []api.Build{{ID: 1, State: api.Building, HeartbeatAt: &noon}},
		standing: map[int64]queue.JobState{1: {Found: true, State: "running"}}}
	now := noon.Add(31 * time.Second)
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	for _, step := range []struct {
		at   time.Duration
		want []string
	}{{31 * time.Second, nil}, {61 * time.Second, nil}, {62 * time.Second, []string{"release", "put back: transient"}}} {
		now = noon.Add(step.at)
		if err := s.Sweep(t.Context()); err != nil || !cmp.Equal(w.did, step.want) {
			t.Errorf("%v after the last report, Sweep() = %v and did %v; want %v", step.at, err, w.did, step.want)
		}
	}
}

// TestSweepNoticesBesideTrouble checks that an error with one build does not hide that the builder of another build is
// dead.
func TestSweepNoticesBesideTrouble(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	now := noon
	w := &world{open: []api.Build{{ID: 13, State: api.Building, HeartbeatAt: &noon},
		{ID: 1, State: api.Building, HeartbeatAt: &noon}},
		standing: map[int64]queue.JobState{
			13: {Found: true, Ended: true, State: "discarded"}, 1: {Found: true, State: "running"},
		}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	for range 5 {
		if err := s.Sweep(t.Context()); err == nil {
			t.Fatal("build 13 was swept; want trouble with it each time")
		}
		now = now.Add(10 * time.Second)
	}
	if d := cmp.Diff([]string{"release", "put back: transient"}, w.did); d != "" {
		t.Errorf("five sweeps did (-want +got):\n%s", d)
	}
}

// TestSweepRaises checks that the sweep gives waiting jobs the higher priorities of the catalogue. They may differ
// after a crash between the writes to catalogue and queue.
func TestSweepRaises(t *testing.T) {
	t.Parallel()
	waits := func(priority int) queue.JobState {
		return queue.JobState{Found: true, State: "available", Priority: priority}
	}
	w := &world{open: []api.Build{{ID: 1, State: api.Queued, Priority: 1}, {ID: 2, State: api.Queued, Priority: 2},
		{ID: 3, State: api.Queued}, {ID: 4, State: api.Building, Priority: 1}},
		standing: map[int64]queue.JobState{1: waits(2), 2: waits(2), 3: waits(1), 4: waits(4)}}
	now := time.Now()
	w.open[3].HeartbeatAt = &now
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
	if err := s.Sweep(t.Context()); err != nil || !cmp.Equal(w.did, []string{"raise 1 to 1"}) {
		t.Errorf("Sweep() = %v and did %v; want build 1 raised", err, w.did)
	}
}

// TestSweepTakesOutCancelled checks that the sweep removes the job of a cancelled build from the queue, but no other
// job.
func TestSweepTakesOutCancelled(t *testing.T) {
	t.Parallel()
	w := &world{ended: map[int64]api.State{1: api.Cancelled, 2: api.Published},
		standing: map[int64]queue.JobState{1: {Found: true, State: "available"}, 2: {Found: true, State: "running"}}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
	if err := s.Sweep(t.Context()); err != nil || !cmp.Equal(w.did, []string{"cancel"}) {
		t.Errorf("Sweep() = %v and did %v; want one cancel", err, w.did)
	}
}

// TestSweepEndsJobsOfFinishedBuilds checks a builder that died after its last report and before the end of its job. The
// sweep must end the job after 30 seconds.
func TestSweepEndsJobsOfFinishedBuilds(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	now := noon
	w := &world{finished: noon, ended: map[int64]api.State{1: api.Published},
		standing: map[int64]queue.JobState{1: {Found: true, State: "running"}}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	for after, want := range map[time.Duration][]string{10 * time.Second: nil, 31 * time.Second: {"end"}} {
		now, w.did = noon.Add(after), nil
		if err := s.Sweep(t.Context()); err != nil || !cmp.Equal(w.did, want) {
			t.Errorf("%v after its end, Sweep() = %v and did %v; want %v", after, err, w.did, want)
		}
	}
}

// TestSweepOfUnknownBuilds checks that the sweep removes the job of a build that the catalogue does not have. Such jobs
// exist after an older catalogue was restored. A catalogue without any build is probably the wrong one, and the sweep
// must then change nothing.
func TestSweepOfUnknownBuilds(t *testing.T) {
	t.Parallel()
	w := &world{unknown: 2, empty: true, standing: map[int64]queue.JobState{2: {Found: true, State: "available"}}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler)}
	for _, step := range []struct {
		empty bool
		want  []string
	}{{true, nil}, {true, nil}, {false, []string{"remove [2]"}}} {
		w.empty = step.empty
		if err := s.Sweep(t.Context()); err != nil || !cmp.Equal(w.did, step.want) {
			t.Errorf("catalogue empty %t: Sweep() = %v and did %v; want %v", step.empty, err, w.did, step.want)
		}
	}
}

// TestSweepAfterLostJob checks a running build whose job is lost, and whose builder is dead. The build must be queued
// again.
func TestSweepAfterLostJob(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	now := noon
	w := &world{open: []api.Build{{ID: 1, State: api.Building, HeartbeatAt: &noon}}}
	s := jobs.Sweeper{Catalogue: w, Queue: w, Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}
	for _, step := range []struct {
		at   time.Duration
		want []string
	}{{0, nil}, {30 * time.Second, nil}, {31 * time.Second, []string{"release", "put back: transient"}}} {
		now = noon.Add(step.at)
		if err := s.Sweep(t.Context()); err != nil || !cmp.Equal(w.did, step.want) {
			t.Errorf("after %v, Sweep() = %v and did %v; want %v", step.at, err, w.did, step.want)
		}
	}
}
