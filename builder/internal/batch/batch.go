// Package batch builds the cells of a plan, several at a time, and reports the outcome of each cell. It fetches each
// kernel and each driver once, and starts cells in the order that uses the caches best. After a failure that may be
// temporary, it tries the cell again. A failed cell does not block any other cell.
//
// Cells with the same fingerprint, driver and flavour lead to the same artifact. They are called cells of the same
// build. Only one of them runs at a time. If it succeeds, the others reuse its artifact. If it does not compile, the
// others fail with the same error. Cells of the same driver wait for each other while one of them unpacks the driver's
// user space, so the runner prefers a cell of another driver.
//
// The functions in Config decide how a cell is built and where its artifact is published.
package batch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Config has the functions and settings of a batch.
type Config struct {
	// Make builds one cell and writes the output of all tools to log. After an error, the Result has the facts and
	// phases up to the failure.
	Make func(ctx context.Context, c plan.Cell, log io.Writer, line *timeline.Run) (*pipeline.Result, error)
	// Kernel fetches a kernel's inputs into the cache and returns its fingerprint. It calls say with its progress, one
	// line at a time.
	Kernel func(ctx context.Context, k target.Kernel, say func(string)) (target.Fingerprint, error)
	// Driver fetches a driver release into the cache and returns the flavours in it. It calls say like Kernel.
	Driver func(ctx context.Context, version string, arch target.Arch, say func(string)) ([]target.Flavour, error)
	// Published returns the digest of a cell's artifact, or "" if a destination lacks it. The artifact must be signed
	// for the cell's COS build. Run calls Published before it fetches anything. If Published is nil, no cell counts as
	// published.
	Published func(ctx context.Context, c plan.Cell) (digest string, err error)
	// Failures stores permanent failures: with the same inputs, the cell would fail in the same way again. If Failures
	// is nil, no failure is stored.
	Failures failureStore
	// Parallel is the number of cells that are built at the same time; 0 means one.
	Parallel int
	// Attempts is the number of attempts for a cell whose failure may be temporary; 0 means 3.
	Attempts int
	// Wait is the pause before the second attempt; 0 means 10 seconds. Later pauses are longer.
	Wait time.Duration
	// Logs is the folder for the cells' logs, one file for each cell.
	Logs string
	// Stopping is the stop signal. When the caller closes it, running cells continue, and no further cell starts. It may
	// be nil.
	Stopping <-chan struct{}
	// Watch receives the events, in order and one at a time. It may be nil.
	Watch func(Event)
}

// failureStore stores permanent failures by the inputs that caused them.
type failureStore interface {
	Find(ctx context.Context, c plan.Cell) (Failure, bool)
	Remember(ctx context.Context, c plan.Cell, f Failure) error
}

// Failure describes why a cell could not be built.
type Failure struct {
	Class fault.Kind `json:"class"`
	Error string     `json:"error"`
	Hint  string     `json:"hint,omitempty"`
	// Lacking is true if the driver's release does not have the flavour.
	Lacking bool `json:"lacking,omitempty"`
}

// FailureOf returns the description of an error.
func FailureOf(err error) Failure {
	f := Failure{Class: fault.Of(err), Error: err.Error(), Hint: fault.Hint(err)}
	var e *fault.Error
	if errors.As(err, &e) && e.Kind == fault.APIBreak {
		f.Error = e.Error() // only the compiler's line, without the context that callers added
	}
	return f
}

// Permanent reports whether the same inputs would fail in the same way each time. A failed load test is never
// permanent: the virtual machine may have been too slow, or other settings may need no load test. The failure of a
// renewal (the rebuild of an artifact that is too old) is not permanent either, because a build with the same inputs
// succeeded before. The pipeline stores such a failure for some time.
func Permanent(kind fault.Kind, res *pipeline.Result) bool {
	if res != nil {
		if res.Renewal || res.Remembered {
			return false
		}
		for _, p := range res.Phases {
			if p.Name == "load test" && p.Of == "" && p.Failed {
				return false
			}
		}
	}
	return kind == fault.APIBreak || kind == fault.Unsupported || kind == fault.CheckFailed
}

// sharedByBuild reports whether all cells of the same build would fail with this permanent failure. These cells share
// only the compile. Their sources, signatures, checks and destinations also depend on the COS build.
func sharedByBuild(kind fault.Kind, res *pipeline.Result) bool {
	if !Permanent(kind, res) {
		return false
	}
	if res != nil {
		for _, p := range res.Phases {
			if p.Failed && p.Of == "" {
				return p.Name == "compile"
			}
		}
	}
	return kind == fault.APIBreak // no phase is known, but only a compile fails with this kind
}

// maxLookups is the number of cells that are looked up at the same time, and fetchers the number of kernels and drivers
// that are fetched at the same time.
const (
	maxLookups = 8
	fetchers   = 2
)

// Run builds the missing cells of a plan and returns the state of every cell. When ctx ends, Run stops the running
// cells, and every open cell becomes cancelled.
func Run(ctx context.Context, cfg Config, p *plan.Plan) *Report {
	if cfg.Parallel <= 0 {
		cfg.Parallel = 1
	}
	if cfg.Attempts <= 0 {
		cfg.Attempts = 3
	}
	if cfg.Wait <= 0 {
		cfg.Wait = 10 * time.Second
	}
	f := newRunner(cfg, p)
	f.lookUp(ctx)
	var group errgroup.Group
	group.Go(func() error { f.fetch(ctx); return nil })
	for range cfg.Parallel {
		group.Go(func() error {
			for {
				j := f.next(ctx)
				if j == nil {
					return nil
				}
				f.make(ctx, j)
			}
		})
	}
	_ = group.Wait() // no error: the functions above return nil
	f.skipRest(ctx)
	return f.report(p)
}

// Status returns the state of every cell and builds no cell. If Published returns an error for a cell, Status returns
// an error.
func Status(ctx context.Context, cfg Config, p *plan.Plan) (*Report, error) {
	f := newRunner(cfg, p)
	f.lookUp(ctx)
	if f.lookupErr != nil {
		return nil, fmt.Errorf("look for published cells: %w", f.lookupErr)
	}
	return f.report(p), nil
}

// lookUp sets the state of the cells that Run need not build: published cells, stored failures, and cells with a
// problem in the plan.
func (f *runner) lookUp(ctx context.Context) {
	var group errgroup.Group
	group.SetLimit(maxLookups)
	for _, j := range f.jobs {
		if j.Cell.Problem != nil {
			state := Failed
			if j.Cell.Problem.Unavailable {
				state = Unavailable
			}
			known := FailureOf(j.Cell.Problem.Err)
			f.finish(j, state, &known)
			continue
		}
		group.Go(func() error {
			f.check(ctx, j)
			return nil
		})
	}
	_ = group.Wait() // no error: the functions above return nil
}

func (f *runner) check(ctx context.Context, j *job) {
	if f.cfg.Published != nil {
		switch digest, err := f.cfg.Published(ctx, j.Cell); {
		case err != nil: // the cell stays open
			f.mu.Lock()
			f.lookupErr = cmp.Or(f.lookupErr, err)
			f.mu.Unlock()
			note := FailureOf(fmt.Errorf("look up whether the cell is published: %w", err))
			f.emit(Event{Job: j.Job, Kind: Note, Failure: &note})
		case digest != "":
			f.mu.Lock()
			j.Digest = digest
			f.mu.Unlock()
			f.finish(j, Existed, nil)
			return
		}
	}
	if f.cfg.Failures == nil || ctx.Err() != nil {
		return
	}
	if known, ok := f.cfg.Failures.Find(ctx, j.Cell); ok {
		f.mu.Lock()
		j.Known = true
		f.mu.Unlock()
		f.finish(j, stateOf(j.Cell, known), &known)
	}
}

// fetch fetches the inputs of the open cells in the plan's order: for each cell its kernel, then its driver. After the
// stop signal, it stops.
func (f *runner) fetch(ctx context.Context) {
	defer f.endFetches()
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-f.cfg.Stopping: // a nil channel never receives
			cancel()
		case <-ctx.Done():
		}
	})
	defer watch.Wait()
	defer cancel()
	var group errgroup.Group
	group.SetLimit(fetchers)
	for _, j := range f.jobs {
		if f.stopping(ctx) {
			break
		}
		if in := f.claim(j.kernel); in != nil {
			group.Go(func() error {
				say := f.progress(j, "kernel "+j.Cell.Kernel.String())
				fp, err := retry(ctx, f.cfg, func() (target.Fingerprint, error) { return f.cfg.Kernel(ctx, j.Cell.Kernel, say) })
				f.endFetch(ctx, in, func() { in.fingerprint = fp }, err)
				return nil
			})
		}
		if in := f.claim(j.driver); in != nil {
			group.Go(func() error {
				say := f.progress(j, "driver "+j.Cell.Driver.Version)
				flavours, err := retry(ctx, f.cfg, func() ([]target.Flavour, error) {
					return f.cfg.Driver(ctx, j.Cell.Driver.Version, j.Cell.Kernel.Arch, say)
				})
				f.endFetch(ctx, in, func() { in.flavours = flavours }, err)
				return nil
			})
		}
	}
	_ = group.Wait() // no error: the functions above return nil
}

// progress returns a function that reports the progress of a fetch as events of the given cell.
func (f *runner) progress(j *job, what string) func(string) {
	return func(text string) { f.emit(Event{Job: j.Job, Kind: Fetch, Text: what + ": " + text}) }
}

// retry repeats a call while its failure may be temporary, up to cfg.Attempts calls in all.
func retry[T any](ctx context.Context, cfg Config, call func() (T, error)) (T, error) {
	v, err := backoff.Retry(ctx, func() (T, error) {
		v, err := call()
		if err != nil && !fault.Of(err).Retryable() || fault.Is(err, fault.Cancelled) {
			return v, backoff.Permanent(err)
		}
		return v, err
	}, backoff.WithBackOff(cfg.pauses()), backoff.WithMaxTries(uint(cfg.Attempts)), backoff.WithMaxElapsedTime(0))
	var permanent *backoff.PermanentError
	if errors.As(err, &permanent) {
		err = permanent.Unwrap()
	}
	if err != nil && ctx.Err() != nil {
		err = fault.Wrap(fault.Cancelled, err, "")
	}
	return v, err
}

func (cfg Config) pauses() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.Multiplier, b.MaxInterval, b.RandomizationFactor = cfg.Wait, 3, 30*cfg.Wait, 0
	return b
}

// logName is the file name of a cell's log.
func logName(c plan.Cell) string { return c.String() + ".log" }

// make tries once to build a cell, and records the outcome.
func (f *runner) make(ctx context.Context, j *job) {
	f.emit(Event{Job: j.Job, Kind: Started})
	begin := time.Now()
	res, err := f.makeLogged(ctx, j)
	if err != nil && ctx.Err() != nil {
		err = fault.Wrap(fault.Cancelled, err, "")
	}
	f.endAttempt(ctx, j, res, err, time.Since(begin))
}

// makeLogged builds one cell, writes its log to a file and reports its phases. Until the build ends, the log of the
// previous attempt is kept under another name.
func (f *runner) makeLogged(ctx context.Context, j *job) (res *pipeline.Result, err error) {
	before := strings.TrimSuffix(j.Log, ".log") + ".before.log"
	if err := os.Rename(j.Log, before); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.Disk(fmt.Errorf("keep the log of the cell's previous attempt: %w", err),
			"free space on the disk of the log")
	}
	log, err := os.OpenFile(j.Log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if errors.Is(err, os.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(j.Log), 0o755); err == nil {
			log, err = os.Create(j.Log)
		}
	}
	if err != nil {
		return nil, fault.Disk(fmt.Errorf("open the log of the build: %w", err), "free space on the disk of the log")
	}
	defer func() {
		err = errors.Join(err, log.Close())
		// A build that only repeats an earlier failure does not replace the log of that failure. Errors are ignored: at worst
		// one log too many stays, or one is missing.
		if res != nil && res.Remembered {
			_ = os.Rename(before, j.Log)
		} else {
			_ = os.Remove(before)
		}
	}()
	line := &timeline.Run{Watch: func(e timeline.Event) { f.emit(Event{Job: j.Job, Kind: Phase, Phase: e}) }}
	return f.cfg.Make(ctx, j.Cell, log, line)
}
