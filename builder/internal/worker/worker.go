// Package worker takes builds from the queue, runs the pipeline for each, and
// tells the server how they go. It refuses to decide whether a failure is
// worth another try: the fault's kind says so, and the queue keeps count.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/gofrs/flock"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Config is what a worker needs beside the pipeline's own settings.
type Config struct {
	// ID names this worker to queue and server. Only one process may use it at
	// a time; a lock in State sees to that.
	ID string
	// State is a folder for the lock and for logs of running builds.
	State string
	// QueueURL is sqlite:///path or postgres://...
	QueueURL string
	// Concurrency is how many builds run side by side; 0 is one.
	Concurrency int
	Server      *api.Client
	Pipeline    pipeline.Config
	Log         *slog.Logger
	// Watch shows progress of every build; may be nil.
	Watch func(timeline.Event)
}

// Run works until ctx ends. A build in progress at that moment is handed back
// to the queue.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := os.MkdirAll(cfg.State, 0o755); err != nil {
		return err
	}
	lock := flock.New(filepath.Join(cfg.State, "worker.lock"))
	switch locked, err := lock.TryLock(); {
	case err != nil:
		return fmt.Errorf("lock %s: %w", lock.Path(), err)
	case !locked:
		return fault.New(fault.Busy, "another worker uses "+cfg.State, "give each worker its own --state folder and --id")
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	q, err := queue.Open(ctx, cfg.QueueURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	cfg.Log.InfoContext(ctx, "worker started", "worker", cfg.ID)
	return q.Work(ctx, cfg.ID, max(1, cfg.Concurrency), func(ctx context.Context, job api.BuildJob, attempt int) error {
		return cfg.build(ctx, job, attempt)
	})
}

// build runs one job and reports it. What it returns decides about a retry.
func (cfg Config) build(ctx context.Context, job api.BuildJob, attempt int) error {
	log := cfg.Log.With("job", job.Build, "build", job.BuildID+"/"+job.Board, "driver", job.Driver+"-"+job.Flavour)
	logPath := filepath.Join(cfg.State, fmt.Sprintf("build-%d.log", job.Build))
	out, err := os.Create(logPath)
	if err != nil {
		return fault.Wrap(fault.Internal, err, "")
	}
	defer os.Remove(logPath)
	defer out.Close()

	reports := newReporter(cfg.Server, job.Build, log)
	line := &timeline.Run{Watch: func(e timeline.Event) {
		if cfg.Watch != nil {
			cfg.Watch(e)
		}
		if e.Done == nil && e.Text == "" {
			reports.phase(e.Phase)
		}
	}}
	if _, err := cfg.Server.UpdateBuild(ctx, job.Build, api.BuildUpdate{State: api.Building, Worker: cfg.ID, Attempt: attempt}); err != nil {
		reports.close()
		return fmt.Errorf("report start: %w", err)
	}
	log.InfoContext(ctx, "build started", "attempt", attempt)
	res, buildErr := pipeline.Run(ctx, cfg.Pipeline, pipeline.Request{
		BuildID: job.BuildID, Board: job.Board, Driver: target.Wish(job.Driver), Flavour: target.Flavour(job.Flavour),
		KernelMirror: job.KernelMirror, DriverMirror: job.DriverMirror,
	}, out, line)
	reports.close()

	// The end is reported even when the worker was told to stop meanwhile.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	return errors.Join(buildErr, cfg.finish(ctx, log, job, logPath, res, buildErr))
}

func (cfg Config) finish(ctx context.Context, log *slog.Logger, job api.BuildJob, logPath string, res *pipeline.Result, buildErr error) error {
	f, err := os.Open(logPath)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := cfg.Server.PutBuildLog(ctx, job.Build, f); err != nil {
		return fmt.Errorf("report log: %w", err)
	}
	update := api.BuildUpdate{Phases: res.Phases, Fingerprint: res.Fingerprint, Digest: res.Digest}
	if res.Kernel.BuildID != "" {
		update.Kernel = &res.Kernel
	}
	switch kind := fault.Of(buildErr); {
	case buildErr == nil:
		update.State = api.Published
		if len(res.Repositories) > 0 {
			update.Repository = res.Repositories[0]
		}
		log.InfoContext(ctx, "build published", "digest", res.Digest)
	case kind.Retryable():
		// Back in line: queued again, with the reason of the last try.
		update.State, update.Class, update.Error, update.Hint = api.Queued, kind.String(), buildErr.Error(), fault.Hint(buildErr)
		log.WarnContext(ctx, "build put back", "err", buildErr)
	default:
		update.State, update.Class, update.Error, update.Hint = api.Failed, kind.String(), buildErr.Error(), fault.Hint(buildErr)
		log.ErrorContext(ctx, "build failed", "class", kind.String(), "err", buildErr)
	}
	if _, err := cfg.Server.UpdateBuild(ctx, job.Build, update); err != nil {
		return fmt.Errorf("report end: %w", err)
	}
	return nil
}

// reporter sends phase changes without holding up the build: only the newest
// one matters, and a lost one harms nobody.
type reporter struct {
	next chan string
	done sync.WaitGroup
}

func newReporter(server *api.Client, build int64, log *slog.Logger) *reporter {
	r := &reporter{next: make(chan string, 1)}
	r.done.Go(func() {
		for phase := range r.next {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			if _, err := server.UpdateBuild(ctx, build, api.BuildUpdate{Phase: phase}); err != nil {
				log.DebugContext(ctx, "phase not reported", "err", err)
			}
			cancel()
		}
	})
	return r
}

func (r *reporter) phase(name string) {
	select {
	case <-r.next: // an older one that nobody took
	default:
	}
	r.next <- name
}

func (r *reporter) close() {
	close(r.next)
	r.done.Wait()
}
