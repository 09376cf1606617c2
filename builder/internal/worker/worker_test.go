package worker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/timeline"
)

func TestOutcomes(t *testing.T) {
	t.Parallel()
	begun := func(attempt int) api.BuildUpdate {
		return api.BuildUpdate{State: api.Building, Worker: "w1", Attempt: attempt}
	}
	published := api.BuildUpdate{State: api.Published, Kernel: &result.Kernel, Fingerprint: result.Fingerprint,
		Digest: result.Digest, Repository: "here/driver"}
	ended := func(state api.State, kind fault.Kind, text, hint string) api.BuildUpdate {
		return api.BuildUpdate{State: state, Class: kind.String(), Error: text, Hint: hint, Kernel: &result.Kernel,
			Fingerprint: result.Fingerprint}
	}
	line := "nvidia/nv-pci.c:1:2: error: too few arguments"
	rows := []struct {
		name  string
		tries []makeFunc
		want  []api.BuildUpdate
		queue queue.JobState
		log   string
	}{
		{"success", []makeFunc{works}, []api.BuildUpdate{begun(1), published},
			queue.JobState{Found: true, Ended: true, State: "completed", Attempt: 1}, "all is well\n"},
		{"API break shows the compiler's line",
			[]makeFunc{fails(fmt.Errorf("compile: compile x for y: %w", fault.New(fault.APIBreak, line, "newer driver")))},
			[]api.BuildUpdate{begun(1), ended(api.Failed, fault.APIBreak, line, "newer driver")},
			queue.JobState{Found: true, Ended: true, State: "cancelled", Attempt: 1}, "log of a failure\n"},
		{"a bug is final", []makeFunc{fails(errors.New("nil map"))},
			[]api.BuildUpdate{begun(1), ended(api.Failed, fault.Internal, "nil map", "")},
			queue.JobState{Found: true, Ended: true, State: "cancelled", Attempt: 1}, "log of a failure\n"},
		{"trouble passes", []makeFunc{fails(fault.New(fault.Transient, "mirror is away", "wait")), works},
			[]api.BuildUpdate{begun(1), ended(api.Queued, fault.Transient, "mirror is away", "wait"), begun(2), published},
			queue.JobState{Found: true, Ended: true, State: "completed", Attempt: 2}, "all is well\n"},
		{"called off", []makeFunc{fails(fault.New(fault.Cancelled, "not needed", ""))},
			[]api.BuildUpdate{begun(1), ended(api.Cancelled, fault.Cancelled, "not needed", "")},
			queue.JobState{Found: true, Ended: true, State: "cancelled", Attempt: 1}, "log of a failure\n"},
	}
	for _, row := range rows {
		for i := range row.want { // a final update has the attempt's number of the update before it
			if i > 0 && row.want[i].State != api.Building {
				row.want[i].Attempt = row.want[i-1].Attempt
			}
		}
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, row.tries...)
			if err := r.run(t, len(row.want)); err != nil {
				t.Fatalf("Run = %v", err)
			}
			for i := range r.server.states {
				r.server.states[i].Phases = nil
			}
			if diff := cmp.Diff(row.want, r.server.states); diff != "" {
				t.Errorf("the server heard (-want +got):\n%s", diff)
			}
			if r.server.log != row.log {
				t.Errorf("log = %q; want %q", r.server.log, row.log)
			}
			r.checkQueue(t, row.queue)
			r.checkNoLogs(t)
		})
	}
}

func TestPhasesAreTold(t *testing.T) {
	t.Parallel()
	r := newRig(t, works)
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"source"}, r.server.phases); diff != "" {
		t.Errorf("phases (-want +got):\n%s", diff)
	}
}

// TestLastAttempt checks that the worker reports a failure if the last attempt fails, because the queue then drops the
// job.
func TestLastAttempt(t *testing.T) {
	t.Parallel()
	// Earlier attempts were lost together with their workers, so the next attempt is the last one.
	r := newRig(t, fails(fault.New(fault.OutOfMemory, "killed", "")))
	loseAttempts(t, r, queue.MaxAttempts-1)
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	if got := r.server.states[1]; got.State != api.Failed || got.Class != fault.OutOfMemory.String() ||
		r.server.states[0].Attempt != queue.MaxAttempts {
		t.Errorf("the server heard %+v; want the last attempt failed with out-of-memory", r.server.states)
	}
	r.checkQueue(t, queue.JobState{Found: true, Ended: true, State: "discarded", Attempt: queue.MaxAttempts})
}

// loseAttempts uses up attempts of a build. In each attempt, a worker begins the build and then loses its connection to
// the queue's database.
func loseAttempts(t *testing.T, r *rig, attempts int) {
	t.Helper()
	name, err := r.cfg.QueueName()
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	var ended sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	for range attempts {
		q, err := queue.Open(t.Context(), r.cfg.QueueURL)
		if err != nil {
			t.Fatal(err)
		}
		started := make(chan struct{})
		ended.Go(func() {
			// Work returns an error, because the test closes the queue's database.
			_ = q.Work(ctx, name, 1, func(context.Context, api.BuildJob, int) error {
				close(started)
				<-gone
				return nil
			})
		})
		<-started
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { stop(); close(gone); ended.Wait() })
}

// TestStopHandsBack checks that a stopped worker gives its build back to the queue. The build must be queued again, and
// the attempt must not count, whatever error the build returned.
func TestStopHandsBack(t *testing.T) {
	t.Parallel()
	var stop context.CancelFunc
	r := newRig(t, func(ctx context.Context, _ io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
		stop()
		<-ctx.Done()
		return &pipeline.Result{}, errors.New("bwrap: killed")
	}, works)
	var ctx context.Context
	ctx, stop = context.WithCancel(t.Context())
	defer stop()
	if err := worker.Run(ctx, r.cfg); err != nil {
		t.Fatalf("Run = %v", err)
	}
	if got := r.server.states[len(r.server.states)-1]; got.State != api.Queued || got.Class != fault.Cancelled.String() {
		t.Errorf("the server heard %+v; want queued, cancelled", got)
	}
	r.checkQueue(t, queue.JobState{Found: true, State: "available", Attempt: 0})
	r.checkNoLogs(t)
	r.server.states = nil
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	if got := r.server.states; got[0].Attempt != 1 || got[1].State != api.Published {
		t.Errorf("after the stop the server heard %+v; want attempt 1, published", got)
	}
}

// TestServerAway has a server that does not answer. If it does not answer before a build, no attempt may count. If it
// does not answer after a build, the build runs again, and the worker reports the second result.
func TestServerAway(t *testing.T) {
	t.Parallel()
	t.Run("at the start", func(t *testing.T) {
		t.Parallel()
		r := newRig(t)
		r.server.refuse = func(api.BuildUpdate) *api.Problem {
			return &api.Problem{Kind: fault.Transient, Detail: "database is locked"}
		}
		if err := r.run(t, 1); err != nil {
			t.Fatal(err)
		}
		r.checkQueue(t, queue.JobState{Found: true, State: "available", Attempt: 0})
		if r.tries != 0 {
			t.Errorf("the pipeline ran %d times; want none", r.tries)
		}
	})
	t.Run("at the end", func(t *testing.T) {
		t.Parallel()
		broken := fails(fault.New(fault.APIBreak, "a.c:1:1: error: x", ""))
		r := newRig(t, broken, broken)
		r.cfg.ServerTimeout = 1900 * time.Millisecond // shorter than the pause before the worker repeats a report
		lost := false
		r.server.refuse = func(u api.BuildUpdate) *api.Problem {
			if u.State == api.Failed && !lost {
				lost = true
				return &api.Problem{Kind: fault.Internal, Detail: "disk I/O error"}
			}
			return nil
		}
		if err := r.run(t, 4); err != nil {
			t.Fatal(err)
		}
		if n := len(r.server.states); n != 3 || r.server.states[2].Class != fault.APIBreak.String() {
			t.Errorf("the server heard %+v; want the failure at last", r.server.states)
		}
		r.checkQueue(t, queue.JobState{Found: true, Ended: true, State: "cancelled", Attempt: 2})
		r.checkNoLogs(t)
	})
}

// TestServerRefusesBuild checks that a build that the server refuses does not begin, and that the queue does not offer
// it again.
func TestServerRefusesBuild(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.server.refuse = func(api.BuildUpdate) *api.Problem {
		return &api.Problem{Kind: fault.Mismatch, Detail: "it is published and cannot become building"}
	}
	if err := r.run(t, 1); err != nil {
		t.Fatal(err)
	}
	r.checkQueue(t, queue.JobState{Found: true, Ended: true, State: "cancelled", Attempt: 1})
}

// TestWrongTokenEndsWorker checks that a worker with a wrong token ends, and that it uses up no attempt of a build.
func TestWrongTokenEndsWorker(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.server.refuse = func(api.BuildUpdate) *api.Problem {
		return &api.Problem{Kind: fault.Usage, Detail: "this call needs the server's token"}
	}
	err := worker.Run(t.Context(), r.cfg)
	if !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "--token") {
		t.Errorf("Run = %v, hint %q; want a usage error that names --token", err, fault.Hint(err))
	}
	r.checkQueue(t, queue.JobState{Found: true, State: "available", Attempt: 0})
}

func TestSecondWorkerIsRefused(t *testing.T) {
	t.Parallel()
	var second error
	var r *rig
	r = newRig(t, func(ctx context.Context, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
		second = worker.Run(ctx, r.cfg)
		return works(ctx, log, line)
	})
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	if !fault.Is(second, fault.Busy) || fault.Hint(second) == "" {
		t.Errorf("Run in a state folder that is in use = %v; want busy and a hint", second)
	}
}

// TestSameIDElsewhere runs two workers on one machine with the same ID and different folders. The second must not take
// over the builds of the first.
func TestSameIDElsewhere(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var r *rig
	r = newRig(t, func(ctx context.Context, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
		second := r.cfg
		second.State = t.TempDir()
		ctx2, other := context.WithCancel(ctx)
		defer other()
		// The second worker stops after it has had time to ask the queue twice.
		second.Log = slog.New(onStart{slog.DiscardHandler, func() { time.AfterFunc(time.Second, other) }})
		if err := worker.Run(ctx2, second); err != nil && ctx2.Err() == nil {
			t.Errorf("second worker: %v", err)
		}
		return works(ctx, log, line)
	})
	r.server.refuse = func(u api.BuildUpdate) *api.Problem {
		if u.State == api.Published {
			stop()
		}
		return nil
	}
	if err := worker.Run(ctx, r.cfg); err != nil {
		t.Fatal(err)
	}
	if n := len(r.server.states); n != 2 || r.tries != 1 {
		t.Errorf("the server heard %+v in %d tries; want one build", r.server.states, r.tries)
	}
}

// onStart is a log handler that calls f when a worker logs that it has started.
type onStart struct {
	slog.Handler
	f func()
}

func (onStart) Enabled(context.Context, slog.Level) bool { return true }

func (s onStart) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "worker started" {
		s.f()
	}
	return nil
}

// TestLogOfKilledBuild checks the log of a build during which the worker was killed. The worker's next start must send
// it, unless another worker has had the build since then.
func TestLogOfKilledBuild(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		build  api.Build
		noRead fault.Kind
		want   string
		kept   bool // whether the worker keeps the log for its next start
	}{
		{"still ours", api.Build{ID: 7, State: api.Building, Worker: "w1"}, 0, "last words", false},
		{"another's", api.Build{ID: 7, State: api.Building, Worker: "w2"}, 0, "", false},
		{"over", api.Build{ID: 7, State: api.Published, Worker: "w1"}, 0, "", false},
		{"unknown", api.Build{}, fault.NotFound, "", false},
		{"wrong token", api.Build{}, fault.Unauthorized, "", true},
		{"token of another role", api.Build{}, fault.Forbidden, "", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			if err := os.MkdirAll(r.cfg.State, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(r.cfg.State, "build-7.log"), []byte("last words"), 0o644); err != nil {
				t.Fatal(err)
			}
			r.server.build, r.server.noRead = row.build, row.noRead
			r.server.refuse = func(api.BuildUpdate) *api.Problem { return &api.Problem{Kind: fault.Transient} }
			if err := r.run(t, 1); err != nil {
				t.Fatal(err)
			}
			if r.server.log != row.want {
				t.Errorf("log = %q; want %q", r.server.log, row.want)
			}
			if row.kept {
				if _, err := os.Stat(filepath.Join(r.cfg.State, "build-7.log")); err != nil {
					t.Errorf("the log is not kept: %v", err)
				}
				return
			}
			r.checkNoLogs(t)
		})
	}
}

// TestLongLog checks that the worker sends only the end of a log if the log is longer than the server accepts.
func TestLongLog(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(_ context.Context, log io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
		if err := log.(*os.File).Truncate(api.MaxBuildLog); err != nil {
			t.Error(err)
		}
		if _, err := log.(*os.File).WriteAt([]byte("the end"), api.MaxBuildLog); err != nil {
			t.Error(err)
		}
		res := result
		return &res, nil
	})
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	if n := len(r.server.log); n != api.MaxBuildLog || !strings.HasSuffix(r.server.log, "the end") {
		t.Errorf("log of %d bytes; want the last %d", n, api.MaxBuildLog)
	}
}

// TestLogWhileUnderWay checks that the worker sends the log of a running build in parts. A server that lost its copy
// must get the whole log again.
func TestLogWhileUnderWay(t *testing.T) {
	t.Parallel()
	var r *rig
	r = newRig(t, func(ctx context.Context, log io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
		text := ""
		for _, line := range []string{"first\n", "second\n", "third\n"} {
			text += line
			if _, err := io.WriteString(log, line); err != nil {
				t.Error(err)
			}
			for r.live() != text && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			if line == "second\n" {
				r.server.mu.Lock()
				r.server.live = nil
				r.server.mu.Unlock()
			}
		}
		res := result
		return &res, ctx.Err()
	})
	r.cfg.LogEvery = time.Millisecond
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	if want := "first\nsecond\nthird\n"; r.server.log != want || r.live() != want {
		t.Errorf("the log is %q, and was %q at the end; want %q", r.server.log, r.live(), want)
	}
}

func (r *rig) live() string {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return string(r.server.live)
}

// TestServerStartsAgain lets the server refuse the first report of a build, as a server that is starting does. This
// must cost the build no attempt.
func TestServerStartsAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t, works)
	asked := 0
	r.server.refuse = func(u api.BuildUpdate) *api.Problem {
		if asked++; asked == 1 {
			return &api.Problem{Kind: fault.Transient, Detail: "starting"}
		}
		return nil
	}
	if err := r.run(t, 3); err != nil {
		t.Fatal(err)
	}
	if got := r.server.states; len(got) != 2 || got[0].Attempt != 1 || got[1].State != api.Published {
		t.Errorf("the server heard %+v; want the build begun in attempt 1 and published", got)
	}
	r.checkQueue(t, queue.JobState{Found: true, Ended: true, State: "completed", Attempt: 1})
}

// TestUnknownBuild runs a build that the server does not know, at its start or at its end. The server may have the
// wrong catalogue, so the job must stay in the queue, without a lost attempt.
func TestUnknownBuild(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]api.State{"start": api.Building, "end": api.Published} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, works)
			r.server.refuse = func(u api.BuildUpdate) *api.Problem {
				if u.State == refused {
					return &api.Problem{Kind: fault.NotFound, Detail: "build 7 does not exist"}
				}
				return nil
			}
			states := 1
			if name == "end" {
				states = 2
			}
			if err := r.run(t, states); err != nil {
				t.Fatal(err)
			}
			if at, err := r.queue.Lookup(t.Context(), 7); err != nil || at.Ended || at.Attempt != 0 {
				t.Errorf("Lookup() = %+v, %v; want a waiting job without attempts", at, err)
			}
		})
	}
}
