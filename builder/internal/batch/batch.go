// Package batch makes the cells of a plan side by side: it fetches each kernel and each driver once, starts cells in
// the order that warms caches best, tries again what may pass, and sums up. One cell that fails blocks no other.
//
// Cells of one fingerprint, driver and flavour are the same build: one of them
// is running at a time, so the first one compiles and the others find the work done, or fail as it did. The user space
// of a driver is staged once too, by the lock that the cache holds for each of its trees; the order of starts only
// avoids that a cell waits there.
//
// It refuses to know how a cell is made and where it is published: functions
// that are handed in do that.
package batch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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

// Config is what a batch needs.
type Config struct {
	// Make makes one cell. It returns a Result with an error too, as far as it
	// came; log gets everything that tools print.
	Make func(ctx context.Context, c plan.Cell, log io.Writer, line *timeline.Run) (*pipeline.Result, error)
	// Kernel fetches a kernel's inputs into the cache and returns its fingerprint.
	// say receives progress, a line at a time.
	Kernel func(ctx context.Context, k target.Kernel, say func(string)) (target.Fingerprint, error)
	// Driver fetches a release into the cache and returns the flavours that it has.
	Driver func(ctx context.Context, version string, arch target.Arch, say func(string)) ([]target.Flavour, error)
	// Published returns the digest of a cell that every destination has, signed
	// for this very build, and "" where one has not. It is asked before
	// anything is fetched. Nil: nothing is published.
	Published func(ctx context.Context, c plan.Cell) (digest string, err error)
	// Failures knows failures that would only happen again; nil knows none.
	Failures failureStore
	// Parallel is how many cells are made at once; 0 means one.
	Parallel int
	// Attempts is how often a cell is begun whose failure may pass; 0 means 3.
	Attempts int
	// Wait is the pause before a second attempt, longer before a third; 0 means 10 seconds.
	Wait time.Duration
	// Logs is the folder for a log of each cell.
	Logs string
	// Stopping ends the taking of cells while those under way go on; nil never does.
	Stopping <-chan struct{}
	// Watch is told what happens, in order, never concurrently; may be nil.
	Watch func(Event)
}

// failureStore keeps failures that would only happen again from the same inputs.
type failureStore interface {
	Find(ctx context.Context, c plan.Cell) (Failure, bool)
	Remember(ctx context.Context, c plan.Cell, f Failure) error
}

// Failure is what is known of a cell that cannot be made.
type Failure struct {
	Class fault.Kind `json:"class"`
	Error string     `json:"error"`
	Hint  string     `json:"hint,omitempty"`
	// Lacking says that the driver's release does not have the flavour.
	Lacking bool `json:"lacking,omitempty"`
}

// FailureOf is what there is to know of an error.
func FailureOf(err error) Failure {
	f := Failure{Class: fault.Of(err), Error: err.Error(), Hint: fault.Hint(err)}
	var e *fault.Error
	if errors.As(err, &e) && e.Kind == fault.APIBreak {
		f.Error = e.Error() // the compiler's own line, without the way that it came
	}
	return f
}

// Permanent reports whether the same inputs fail the same way each time. A load
// test does not count, whatever it fails of: its machine may have been too busy,
// and other settings do without.
func Permanent(kind fault.Kind, res *pipeline.Result) bool {
	if res != nil {
		for _, p := range res.Phases {
			if p.Name == "load test" && p.Of == "" && p.Failed {
				return false
			}
		}
	}
	return kind == fault.APIBreak || kind == fault.Unsupported || kind == fault.CheckFailed
}

// maxLookups bounds how many cells are looked up at once, and fetchers how many
// kernels and drivers are fetched at the same time, beside the cells being made.
const (
	maxLookups = 8
	fetchers   = 2
)

// Run makes what is missing of a plan and returns what happened to every cell.
// When ctx ends, running cells are cancelled, and so is the rest.
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
	_ = group.Wait() // the functions above return nil
	f.skipRest(ctx)
	return f.report(p)
}

// Status says of every cell what is known without making anything. A destination
// that does not answer is an error: what it has is not known to be missing.
func Status(ctx context.Context, cfg Config, p *plan.Plan) (*Report, error) {
	f := newRunner(cfg, p)
	f.lookUp(ctx)
	if f.lookupErr != nil {
		return nil, fmt.Errorf("look for published cells: %w", f.lookupErr)
	}
	return f.report(p), nil
}

// lookUp settles the cells that are published and those whose failure is known.
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
	_ = group.Wait() // the functions above return nil
}

func (f *runner) check(ctx context.Context, j *job) {
	if f.cfg.Published != nil {
		switch digest, err := f.cfg.Published(ctx, j.Cell); {
		case err != nil: // the build meets the same trouble, if it stays
			f.mu.Lock()
			f.lookupErr = cmp.Or(f.lookupErr, err)
			f.mu.Unlock()
			note := FailureOf(fmt.Errorf("look up whether it is published: %w", err))
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

// fetch gets what the open cells need, in their order: a kernel, then its
// drivers, so that the first cell can start early. After a stop signal, it gives up:
// nobody will begin what it fetches.
func (f *runner) fetch(ctx context.Context) {
	defer f.fetched()
	ctx, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-f.cfg.Stopping: // nil never answers
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
				f.arrived(ctx, in, func() { in.fingerprint = fp }, err)
				return nil
			})
		}
		if in := f.claim(j.driver); in != nil {
			group.Go(func() error {
				say := f.progress(j, "driver "+j.Cell.Driver.Version)
				flavours, err := retry(ctx, f.cfg, func() ([]target.Flavour, error) {
					return f.cfg.Driver(ctx, j.Cell.Driver.Version, j.Cell.Kernel.Arch, say)
				})
				f.arrived(ctx, in, func() { in.flavours = flavours }, err)
				return nil
			})
		}
	}
	_ = group.Wait() // the functions above return nil
}

// progress tells the watcher what is being fetched.
func (f *runner) progress(j *job, what string) func(string) {
	return func(text string) { f.emit(Event{Job: j.Job, Kind: Fetch, Text: what + ": " + text}) }
}

// retry repeats what may pass.
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

// make makes one cell once.
func (f *runner) make(ctx context.Context, j *job) {
	f.emit(Event{Job: j.Job, Kind: Started})
	begin := time.Now()
	res, err := f.logged(ctx, j)
	if err != nil && ctx.Err() != nil {
		err = fault.Wrap(fault.Cancelled, err, "")
	}
	f.made(ctx, j, res, err, time.Since(begin))
}

// logged makes one cell with its log in a file, phases told.
func (f *runner) logged(ctx context.Context, j *job) (res *pipeline.Result, err error) {
	log, err := os.OpenFile(j.Log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if errors.Is(err, os.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(j.Log), 0o755); err == nil {
			log, err = os.Create(j.Log)
		}
	}
	if err != nil {
		return nil, fault.Disk(fmt.Errorf("open log: %w", err), "free space for logs")
	}
	defer func() {
		err = errors.Join(err, log.Close())
	}()
	line := &timeline.Run{Watch: func(e timeline.Event) { f.emit(Event{Job: j.Job, Kind: Phase, Phase: e}) }}
	return f.cfg.Make(ctx, j.Cell, log, line)
}
