package worker_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestStopInMidBuild stops the worker during a build. If the build ends within the grace period, its result counts.
// Otherwise it is cancelled and goes back to the queue, and the attempt does not count.
func TestStopInMidBuild(t *testing.T) {
	t.Parallel()
	waits := func(ctx context.Context, _ io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
		<-ctx.Done()
		if !fault.Is(context.Cause(ctx), fault.Cancelled) {
			return &pipeline.Result{}, errors.New("the build was cancelled, but not with the cause fault.Cancelled")
		}
		return &pipeline.Result{}, context.Cause(ctx)
	}
	// goesOn returns a makeFunc for a build that must not be cancelled at once by the stop. After the stop, the build
	// begins a phase and waits until the server has heard of it. Then it continues with the given makeFunc.
	goesOn := func(then makeFunc, heard <-chan struct{}) makeFunc {
		return func(ctx context.Context, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
			err := line.Do("goes on", func() (string, error) {
				select {
				case <-ctx.Done():
					return "", errors.New("the build was cancelled at once")
				case <-heard:
					return "", nil
				}
			})
			if err != nil {
				return &pipeline.Result{}, err
			}
			return then(ctx, log, line)
		}
	}
	backInLine := queue.JobState{Found: true, State: "available", Attempt: 0}
	rows := []struct {
		name   string
		grace  time.Duration
		second bool // whether a second stop signal arrives
		goesOn bool
		run    makeFunc
		state  api.State
		class  string
		queue  queue.JobState
	}{
		{"finishes", time.Hour, false, true, works, api.Published, "",
			queue.JobState{Found: true, Ended: true, State: "completed", Attempt: 1}},
		{"fails by itself", time.Hour, false, true, fails(fault.New(fault.APIBreak, "a.c:1:1: error: x", "newer")),
			api.Failed, "api-break", queue.JobState{Found: true, Ended: true, State: "cancelled", Attempt: 1}},
		{"grace is over", time.Millisecond, false, false, waits, api.Queued, "cancelled", backInLine},
		{"no grace", 0, false, false, waits, api.Queued, "cancelled", backInLine},
		{"second signal", time.Hour, true, false, waits, api.Queued, "cancelled", backInLine},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			again, heard := make(chan struct{}), make(chan struct{})
			do := row.run
			if row.goesOn {
				do = goesOn(do, heard)
			}
			r := newRig(t, func(ctx context.Context, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
				stop()
				if row.second {
					close(again)
				}
				return do(ctx, log, line)
			})
			r.cfg.Grace, r.cfg.Cancel = row.grace, again
			r.server.refuse = func(u api.BuildUpdate) *api.Problem {
				if u.Phase == "goes on" {
					close(heard)
				}
				return nil
			}
			// A second build waits in the queue. The worker that stops must not begin it.
			if err := r.queue.Insert(t.Context(),
				api.BuildJob{Build: 8, BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open"},
				0); err != nil {
				t.Fatal(err)
			}
			if err := worker.Run(ctx, r.cfg); err != nil {
				t.Fatalf("Run = %v", err)
			}
			last := r.server.states[len(r.server.states)-1]
			if last.State != row.state || last.Class != row.class || r.tries != 1 {
				t.Errorf("after %d tries the server heard %+v; want %s %s", r.tries, last, row.state, row.class)
			}
			r.checkQueue(t, row.queue)
			if got, err := r.queue.Lookup(t.Context(), 8); err != nil || got.Attempt != 0 || got.Ended {
				t.Errorf("the second build = %+v, %v; want it to wait in the queue", got, err)
			}
			r.checkNoLogs(t)
		})
	}
}
