// Package worker takes builds from the queue, runs them, and reports their results to the server. Server and queue both
// store the state of a build. The worker decides each result once and sends it to both.
//
// Config.Make runs a build. The kind of the fault decides whether a failed build is tried again.
package worker

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/gofrs/flock"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/telemetry"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Config has the settings of a worker.
type Config struct {
	// ID is the worker's name for people. State is a folder for the logs of running builds; a lock in it keeps a second
	// worker out. ID and State together are the worker's name in the queue. A worker that starts takes over the builds
	// under its name, so workers on different machines must have different IDs.
	ID, State string
	// QueueURL is sqlite:///path or postgres://...
	QueueURL string
	// Concurrency is the number of builds that run at the same time. 0 means one.
	Concurrency int
	// ServerTimeout limits how long the worker tries to report the end of a build. 0 means one minute.
	ServerTimeout time.Duration
	Server        *api.Client
	// Make runs one build, and writes the output of all tools to log. If the build fails, Make returns an error, and a
	// Result with everything up to the failure.
	Make func(ctx context.Context, r pipeline.Request, log io.Writer, line *timeline.Run) (*pipeline.Result, error)
	Log  *slog.Logger
	// Grace is how long running builds may continue after a stop. A longer build is cancelled and goes back to the
	// queue. 0 means that builds are cancelled at once.
	Grace time.Duration
	// Cancel ends the grace period when it is closed. It may be nil.
	Cancel <-chan struct{}
	// Heartbeat is the time between reports of a running build. 0 means [api.HeartbeatInterval].
	Heartbeat time.Duration
	// LogEvery is the time between two parts of a growing log. 0 means two seconds.
	LogEvery time.Duration
	// KeptEvery is the time between two attempts to send the logs for which the server had no space. 0 means one minute.
	KeptEvery time.Duration
	// Telemetry receives the phases and results of builds, and the length of the queue. It may be nil.
	Telemetry *telemetry.Telemetry
}

// startTimeout limits how long the worker tries to report the start of a build, for example while the server restarts.
// After this time the build goes back to the queue, and loses its place there.
const startTimeout = 20 * time.Second

// shutdownTimeout is how long reports may take after a stop of the worker.
const shutdownTimeout = 20 * time.Second

type worker struct {
	Config
	// stopping ends when the worker must take no more builds. The function stop ends it with a reason.
	stopping context.Context
	stop     context.CancelCauseFunc
	// hard ends when running builds must end, too: at the end of the grace period.
	hard context.Context
}

// Run takes builds from the queue and runs them until ctx ends. Then it takes no more builds, and lets running builds
// finish within the grace period. Builds that are still running after it are cancelled, and go back to the queue. If
// the server refuses the worker itself, for example because of a wrong token, Run stops in the same way and returns
// that error.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg.ServerTimeout <= 0 {
		cfg.ServerTimeout = time.Minute
	}
	if err := os.MkdirAll(cfg.State, 0o755); err != nil {
		return fault.Wrap(
			fault.Usage,
			fmt.Errorf("make the state folder: %w", err),
			"give --state-dir a folder that this user may write",
		)
	}
	lock := flock.New(filepath.Join(cfg.State, "worker.lock"))
	switch locked, err := lock.TryLock(); {
	case err != nil:
		return fmt.Errorf("lock the file %s: %w", lock.Path(), err)
	case !locked:
		return fault.New(fault.Busy, "another worker uses "+cfg.State,
			"give each worker a folder of its own with --state-dir")
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	q, err := queue.Open(ctx, cfg.QueueURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	q.SetLogger(cfg.Log)
	// The queue's grace is longer than Grace, so that this package cancels the builds before the queue does.
	q.SetGrace(cfg.Grace + 2*shutdownTimeout)
	cfg.Telemetry.Queue(q.Depth)
	defer cfg.Telemetry.Queue(nil)
	w := &worker{Config: cfg}
	w.stopping, w.stop = context.WithCancelCause(ctx)
	hard, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	w.hard = hard
	var end sync.WaitGroup
	end.Go(func() { w.end(cancel) })
	defer end.Wait()
	defer cancel(nil)
	defer w.stop(nil)
	w.sendPendingLogs(ctx)
	end.Go(w.sendKeptLogs)
	cfg.Log.InfoContext(ctx, "worker started", "worker", cfg.ID)
	name, err := cfg.queueName()
	if err != nil {
		return err
	}
	if err := q.Work(w.stopping, name, max(1, cfg.Concurrency), w.build); err != nil {
		return err
	}
	if ctx.Err() == nil { // the worker stopped by itself
		return context.Cause(w.stopping)
	}
	return nil
}

// end cancels the running builds when the worker was stopped and the grace period has ended.
func (w *worker) end(cancel context.CancelCauseFunc) {
	select {
	case <-w.stopping.Done():
	case <-w.hard.Done():
		return
	}
	grace := time.NewTimer(w.Grace)
	defer grace.Stop()
	select {
	case <-grace.C:
	case <-w.Cancel:
	case <-w.hard.Done(): // everything has ended
	}
	cancel(fault.New(fault.Cancelled, "the worker was stopped", ""))
}

// queueName returns the worker's name in the queue. While the folder State is locked, no other process of this machine
// uses this name.
func (cfg Config) queueName() (string, error) {
	state, err := filepath.Abs(cfg.State)
	if err != nil {
		return "", fmt.Errorf("choose the worker's name in the queue: %w", err)
	}
	sum := sha256.Sum256([]byte(state))
	return fmt.Sprintf("%.80s-%x", cfg.ID, sum[:4]), nil
}

// build runs one build and reports its result to the server. The returned error tells the queue whether to run the
// build again.
func (w *worker) build(ctx context.Context, job api.BuildJob, attempt int) error {
	log := w.Log.With(
		"build",
		job.Build,
		"kernel",
		job.BuildID+"/"+job.Board,
		"driver",
		job.Driver+"-"+job.Flavour,
		"attempt",
		attempt,
	)
	if err := w.reportStart(ctx, job.Build, attempt); err != nil {
		log.WarnContext(ctx, "build not started", "err", err)
		return err
	}
	log.InfoContext(ctx, "build started")
	res, err := w.runBuild(ctx, job, attempt, log)
	// A build that fails after the grace period counts as stopped by the worker, whatever its error is.
	stopped := err != nil && w.hard.Err() != nil
	if stopped {
		err = queue.Requeue(fault.Wrap(fault.Cancelled, fmt.Errorf("the worker was stopped: %w", err), ""))
	}
	update := outcome(res, err, stopped, attempt >= queue.MaxAttempts)
	// Another builder may have the build by now. The attempt's number keeps this update from ending the other attempt.
	update.Attempt = attempt

	patience := w.ServerTimeout
	if w.stopping.Err() != nil {
		patience = min(patience, shutdownTimeout)
	}
	// The end is reported even if the worker was stopped in the meantime.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	if rerr := w.reportEnd(ctx, log, job.Build, update); rerr != nil {
		log.WarnContext(ctx, "build not reported", "state", update.State, "err", rerr)
		if fault.Is(rerr, fault.NotFound) { // see reportStart
			return queue.Requeue(rerr)
		}
		if stopped || !mayPass(rerr) {
			return errors.Join(err, rerr)
		}
		// A build whose end was not reported must run again. The cache makes that run short.
		return fault.Wrap(fault.Transient, rerr, "")
	}
	switch update.State {
	case api.Published:
		log.InfoContext(ctx, "build published", "digest", update.Digest)
	case api.Queued:
		log.WarnContext(ctx, "build queued again", "err", err)
	default:
		log.ErrorContext(ctx, "build failed", "state", update.State, "class", update.Class, "err", err)
	}
	return err
}

// reportStart reports the start of the build, which may begin only if the server accepts the report.
func (w *worker) reportStart(ctx context.Context, build int64, attempt int) error {
	patience, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	defer context.AfterFunc(w.stopping, cancel)()
	var busy error
	err := retryUntilDone(patience, func() error {
		_, err := w.Server.UpdateBuild(ctx, build, api.BuildUpdate{State: api.Building, Worker: w.ID, Attempt: attempt})
		// Another build of the cell is open. Waiting here does not help.
		if fault.Is(err, fault.Busy) {
			busy, err = err, nil
		}
		return err
	})
	if err == nil && busy == nil {
		return nil
	}
	err = errors.Join(err, busy)
	err = fmt.Errorf("report the start of build %d: %w", build, err)
	switch kind := fault.Of(err); {
	// The start of every other build would fail in the same way, so the worker stops.
	case kind == fault.Usage || kind == fault.Unauthorized || kind == fault.Forbidden:
		err = fault.Wrap(kind, err, "check --server and --token; if you use --token-file, check the token in that file")
		w.stop(err)
		return queue.Requeue(err)
	// A server that does not know the build may have the wrong catalogue. If it has the right one, it removes the job.
	case kind == fault.NotFound, kind != fault.Busy && mayPass(err):
		return queue.Requeue(err)
	}
	// The server refused the start. A build that has ended leaves the queue. If another build of the cell is
	// open (fault.Busy), the queue counts the attempt and offers this build later.
	return err
}

func (w *worker) logPath(build int64) string {
	return filepath.Join(w.State, fmt.Sprintf("build-%d.log", build))
}

// runBuild runs the build. If the worker is stopped, it cancels the build at the end of the grace period.
func (w *worker) runBuild(ctx context.Context, job api.BuildJob, attempt int, log *slog.Logger) (*pipeline.Result,
	error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(w.hard, func() { cancel(context.Cause(w.hard)) })()
	defer context.AfterFunc(w.stopping, func() {
		if w.Grace > 0 {
			log.InfoContext(ctx, "build continues until the grace period ends", "grace", w.Grace)
		}
	})()
	res, err := w.make(ctx, job, attempt, cancel, log)
	if cause := context.Cause(ctx); err != nil && fault.Is(cause, fault.Cancelled) && w.hard.Err() == nil {
		// The server's response to a report cancelled the build, whatever the build's error is.
		err = fault.Wrap(fault.Cancelled, cause, "")
	}
	return res, err
}

// make runs the build, writes its log to a file and reports its phases.
func (w *worker) make(
	ctx context.Context,
	job api.BuildJob,
	attempt int,
	end context.CancelCauseFunc,
	log *slog.Logger,
) (res *pipeline.Result, err error) {
	out, err := os.Create(w.logPath(job.Build))
	if err != nil {
		return &pipeline.Result{}, fault.Disk(fmt.Errorf("open the log of the build: %w", err),
			"free space on the disk of the log")
	}
	defer func() {
		if cerr := out.Close(); cerr != nil {
			log.WarnContext(ctx, "build log incomplete", "err", cerr)
		}
	}()
	reports := w.newReporter(job.Build, attempt, end, log)
	defer reports.close()
	stop := make(chan struct{})
	var follower sync.WaitGroup
	follower.Go(func() { w.follow(ctx, job.Build, stop, log) })
	defer follower.Wait()
	defer close(stop)
	line := &timeline.Run{Watch: func(e timeline.Event) {
		if e.Done == nil && e.Text == "" {
			reports.setPhase(e.Phase)
		}
	}}
	ctx, tell := w.Telemetry.Cell(ctx, telemetry.Cell{
		Kernel: job.BuildID + "/" + job.Board, Driver: job.Driver, Flavour: job.Flavour, Build: job.Build, Attempt: attempt,
	}, line)
	defer func() { tell(err) }()
	return w.Make(ctx, pipeline.Request{
		BuildID: job.BuildID, Board: job.Board, Driver: target.Wish(job.Driver), Flavour: target.Flavour(job.Flavour),
		KernelMirror: job.KernelMirror, DriverMirror: job.DriverMirror,
	}, out, line)
}

// outcome returns the update for the server. stopped is true if a stop of the worker cancelled the build. last is true
// if the queue drops the build after a failure.
func outcome(res *pipeline.Result, err error, stopped, last bool) api.BuildUpdate {
	update := api.BuildUpdate{Phases: res.Phases, Fingerprint: res.Fingerprint}
	if res.Kernel.BuildID != "" {
		update.Kernel = &res.Kernel
	}
	if err == nil {
		update.State, update.Digest = api.Published, res.Digest
		if len(res.Repositories) > 0 {
			update.Repository = res.Repositories[0]
		}
		return update
	}
	kind := fault.Of(err)
	update.Class, update.Error, update.Hint = kind.String(), errorText(err), fault.Hint(err)
	switch {
	case stopped:
		update.State = api.Queued // handed back, even in the last attempt
	case kind == fault.Cancelled:
		update.State = api.Cancelled
	case kind.Retryable() && !last:
		update.State = api.Queued // waits in the queue again, with the reason of this attempt
	default:
		update.State = api.Failed
	}
	return update
}

// errorText returns the text that tables show for an error. For an API break it is only the compiler's line, without
// the context that callers added.
func errorText(err error) string {
	var e *fault.Error
	if errors.As(err, &e) && e.Kind == fault.APIBreak {
		return e.Error()
	}
	return err.Error()
}
