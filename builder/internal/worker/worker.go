// Package worker takes builds from the queue, has each one made, and tells the
// server how they go. Server and queue both store the state of one build, so every
// outcome is decided once, here, and sent to both: both get the same outcome.
//
// It refuses to know how a build is made, and to decide whether a failure is
// worth another try: the fault's kind says so.
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

// Config is what a worker needs.
type Config struct {
	// ID names this worker to people, and State is a folder for the logs of its
	// running builds. Together they name it to the queue: at its start, a worker
	// takes over what ran under that name. A lock in State keeps a second one
	// off. On different machines, IDs have to differ.
	ID, State string
	// QueueURL is sqlite:///path or postgres://...
	QueueURL string
	// Concurrency is how many builds run side by side; 0 means one.
	Concurrency int
	// ServerTimeout is how long a build that is over waits for a server that does
	// not answer; 0 means one minute.
	ServerTimeout time.Duration
	Server        *api.Client
	// Make makes one build. It returns a Result with an error too, as far as it
	// came; log gets everything that tools print.
	Make func(ctx context.Context, r pipeline.Request, log io.Writer, line *timeline.Run) (*pipeline.Result, error)
	Log  *slog.Logger
	// Grace is how long a running build may go on once the worker was told to
	// stop; what has not ended by then is cancelled and handed back. 0 is not
	// at all.
	Grace time.Duration
	// Cancel cuts the grace short when it is closed; nil never does.
	Cancel <-chan struct{}
	// Heartbeat is the pause between reports of a running build; 0 is [api.HeartbeatInterval].
	Heartbeat time.Duration
	// LogEvery is the pause between parts of a growing log; 0 means two seconds.
	LogEvery time.Duration
	// Telemetry receives builds and the queue's depth; may be nil.
	Telemetry *telemetry.Telemetry
}

// startTimeout is how long the start of a build waits for a server that does not
// answer, such as one that starts again. A build that is handed back loses its place
// in line.
const startTimeout = 20 * time.Second

// shutdownTimeout is how long reports may take once the worker was stopped.
const shutdownTimeout = 20 * time.Second

type worker struct {
	Config
	// stopping is done when no more builds are to be taken; stop says why.
	stopping context.Context
	stop     context.CancelCauseFunc
	// hard is done when running builds are to end, too.
	hard context.Context
}

// Run works until ctx ends. It then takes no more builds, lets those in
// progress end within the grace period, cancels what is left, and hands that
// back to the queue.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg.ServerTimeout <= 0 {
		cfg.ServerTimeout = time.Minute
	}
	if err := os.MkdirAll(cfg.State, 0o755); err != nil {
		return fault.Wrap(
			fault.Usage,
			fmt.Errorf("make state folder: %w", err),
			"give --state-dir a folder that this user may write",
		)
	}
	lock := flock.New(filepath.Join(cfg.State, "worker.lock"))
	switch locked, err := lock.TryLock(); {
	case err != nil:
		return fmt.Errorf("lock %s: %w", lock.Path(), err)
	case !locked:
		return fault.New(fault.Busy, "another worker uses "+cfg.State, "give each worker its own --state-dir folder")
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	q, err := queue.Open(ctx, cfg.QueueURL)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	q.SetLogger(cfg.Log)
	q.SetGrace(cfg.Grace + 2*shutdownTimeout) // so that it is this package that cancels
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
	cfg.Log.InfoContext(ctx, "worker started", "worker", cfg.ID)
	name, err := cfg.queueName()
	if err != nil {
		return err
	}
	if err := q.Work(w.stopping, name, max(1, cfg.Concurrency), w.build); err != nil {
		return err
	}
	if ctx.Err() == nil { // it stopped itself
		return context.Cause(w.stopping)
	}
	return nil
}

// end cancels the running builds once the worker was stopped and the
// grace period is over, or is cut short.
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
	case <-w.hard.Done(): // all is over
	}
	cancel(fault.New(fault.Cancelled, "the worker was stopped", ""))
}

// queueName is the name under which the queue knows the worker: no other
// process of this machine can have it while State is locked.
func (cfg Config) queueName() (string, error) {
	state, err := filepath.Abs(cfg.State)
	if err != nil {
		return "", fmt.Errorf("name worker: %w", err)
	}
	sum := sha256.Sum256([]byte(state))
	return fmt.Sprintf("%.80s-%x", cfg.ID, sum[:4]), nil
}

// build makes one build and reports it. What it returns decides about a retry.
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
		log.WarnContext(ctx, "build not begun", "err", err)
		return err
	}
	log.InfoContext(ctx, "build started")
	res, err := w.bounded(ctx, job, attempt, log)
	// Whatever it is, it came of being stopped.
	stopped := err != nil && w.hard.Err() != nil
	if stopped {
		err = queue.Requeue(fault.Wrap(fault.Cancelled, fmt.Errorf("the worker was stopped: %w", err), ""))
	}
	update := outcome(res, err, stopped, attempt >= queue.MaxAttempts)
	update.Attempt = attempt // another builder may have the build by now: its attempt is not ended by this one

	patience := w.ServerTimeout
	if w.stopping.Err() != nil {
		patience = min(patience, shutdownTimeout)
	}
	// The end is reported even when the worker was stopped meanwhile.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	if rerr := w.reportEnd(ctx, log, job.Build, update); rerr != nil {
		log.WarnContext(ctx, "build not reported", "state", update.State, "err", rerr)
		if stopped || !mayPass(rerr) {
			return errors.Join(err, rerr)
		}
		// What was not reported has to happen again; the cache makes it short.
		return fault.Wrap(fault.Transient, rerr, "")
	}
	switch update.State {
	case api.Published:
		log.InfoContext(ctx, "build published", "digest", update.Digest)
	case api.Queued:
		log.WarnContext(ctx, "build returned to the queue", "err", err)
	default:
		log.ErrorContext(ctx, "build failed", "state", update.State, "class", update.Class, "err", err)
	}
	return err
}

// reportStart tells the server that the build begins. Without its consent there
// is no build.
func (w *worker) reportStart(ctx context.Context, build int64, attempt int) error {
	patience, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	defer context.AfterFunc(w.stopping, cancel)()
	var busy error
	err := retryUntilDone(patience, func() error {
		_, err := w.Server.UpdateBuild(ctx, build, api.BuildUpdate{State: api.Building, Worker: w.ID, Attempt: attempt})
		if fault.Is(err, fault.Busy) { // another build of the cell is open, which does not pass soon
			busy, err = err, nil
		}
		return err
	})
	if err == nil && busy == nil {
		return nil
	}
	err = errors.Join(err, busy)
	err = fmt.Errorf("report start of build %d: %w", build, err)
	switch kind := fault.Of(err); {
	// every other build would fare the same
	case kind == fault.Usage || kind == fault.Unauthorized || kind == fault.Forbidden:
		err = fault.Wrap(kind, err, "check --server and --token")
		w.stop(err)
		return queue.Requeue(err)
	case kind != fault.Busy && mayPass(err):
		return queue.Requeue(err)
	}
	return err // the server knows better: the build is over, gone, or another one is open
}

func (w *worker) logPath(build int64) string {
	return filepath.Join(w.State, fmt.Sprintf("build-%d.log", build))
}

// bounded has the build made within the worker's life.
func (w *worker) bounded(ctx context.Context, job api.BuildJob, attempt int, log *slog.Logger) (*pipeline.Result,
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
		err = fault.Wrap(fault.Cancelled, cause, "") // whatever it is, it came of that
	}
	return res, err
}

// make has the build made, with its log in a file and its phases told.
func (w *worker) make(
	ctx context.Context,
	job api.BuildJob,
	attempt int,
	end context.CancelCauseFunc,
	log *slog.Logger,
) (res *pipeline.Result, err error) {
	out, err := os.Create(w.logPath(job.Build))
	if err != nil {
		return &pipeline.Result{}, fault.Disk(fmt.Errorf("open log: %w", err), "free space for logs")
	}
	defer func() {
		if cerr := out.Close(); cerr != nil {
			log.WarnContext(ctx, "log incomplete", "err", cerr)
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
			reports.phase(e.Phase)
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

// outcome is what the server is told; last says that the queue will not offer
// the build again.
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
		update.State = api.Queued // handed back, whatever the attempt
	case kind == fault.Cancelled:
		update.State = api.Cancelled
	case kind.Retryable() && !last:
		update.State = api.Queued // back in line, with the reason of this try
	default:
		update.State = api.Failed
	}
	return update
}

// errorText is what tables show of an error: of an API break the compiler's own
// line, without the way that it came.
func errorText(err error) string {
	var e *fault.Error
	if errors.As(err, &e) && e.Kind == fault.APIBreak {
		return e.Error()
	}
	return err.Error()
}
