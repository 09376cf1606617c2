package worker_test

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestCompileHearsOfItsEnd checks that the context of a running build ends when the server says that the build is
// cancelled, or that another attempt has begun.
func TestCompileHearsOfItsEnd(t *testing.T) {
	t.Parallel()
	for name, tell := range map[string]func(s *server){
		"called off": func(s *server) { s.build = api.Build{ID: 7, State: api.Cancelled} },
		"taken over": func(s *server) {
			s.refuse = func(u api.BuildUpdate) *api.Problem {
				if u.State == "" { // a report during the build, not the final one
					return &api.Problem{Kind: fault.Mismatch, Detail: "attempt 2 of it is under way, not 1"}
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
			defer stop()
			heard := make(chan error, 1)
			r := newRig(t, func(ctx context.Context, _ io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
				<-ctx.Done()
				heard <- context.Cause(ctx)
				time.AfterFunc(500*time.Millisecond, stop) // after the end was reported
				return &pipeline.Result{}, ctx.Err()
			})
			r.cfg.Heartbeat = 10 * time.Millisecond
			tell(r.server)
			if err := worker.Run(ctx, r.cfg); err != nil {
				t.Fatal(err)
			}
			select {
			case cause := <-heard:
				if !fault.Is(cause, fault.Cancelled) {
					t.Errorf("the compile ended for %v; want cancelled", cause)
				}
			default:
				t.Fatal("the compile did not end")
			}
			r.server.mu.Lock()
			defer r.server.mu.Unlock()
			if n := len(r.server.states); n != 2 || r.server.states[1].State != api.Cancelled ||
				r.server.states[1].Attempt != 1 {
				t.Errorf("reported %+v; want building and cancelled, of attempt 1", r.server.states)
			}
			if at, err := r.queue.Lookup(t.Context(), 7); err != nil || !at.Ended {
				t.Errorf("Lookup() = %+v, %v; want a job that is over", at, err)
			}
		})
	}
}
