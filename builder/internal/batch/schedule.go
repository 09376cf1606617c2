package batch

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// input is a kernel or a driver release that several cells need.
type input struct {
	claimed     bool // a fetch of the input has started
	arrived     bool // the fetch has ended; err is its error
	err         error
	fingerprint target.Fingerprint // set for a kernel
	flavours    []target.Flavour   // set for a driver
}

// job is the runner's state of one cell.
type job struct {
	*Job
	kernel, driver *input
	running        bool
	alone          bool      // the cell ran out of memory, so its next attempt runs without other cells
	notBefore      time.Time // earliest time of the next attempt
	pauses         *backoff.ExponentialBackOff
}

// buildKey identifies the cells of the same build (see the package comment).
type buildKey struct {
	fingerprint target.Fingerprint
	driver      target.Driver
}

func (j *job) buildKey() buildKey { return buildKey{j.kernel.fingerprint, j.Cell.Driver} }

// ready reports whether the cell can be built: both inputs arrived, and the driver has the flavour. The caller holds
// runner.mu.
func (j *job) ready() bool {
	return j.kernel.arrived && j.driver.arrived && j.kernel.err == nil && j.driver.err == nil &&
		slices.Contains(j.driver.flavours, j.Cell.Driver.Flavour)
}

type runner struct {
	cfg  Config
	jobs []*job

	eventMu sync.Mutex // keeps events in order

	mu        sync.Mutex
	changed   chan struct{}     // closed and replaced at each change, to wake waiting workers
	done      int               // number of cells that have a state
	ended     bool              // no further input will arrive
	warm      map[any]bool      // fingerprints and driver versions of finished cells
	failed    map[buildKey]*job // builds whose compile fails each time
	lookupErr error             // the first error of a lookup
}

func newRunner(cfg Config, p *plan.Plan) *runner {
	f := &runner{cfg: cfg, changed: make(chan struct{}), warm: map[any]bool{}, failed: map[buildKey]*job{}}
	inputs := map[string]*input{}
	of := func(name string) *input {
		if inputs[name] == nil {
			inputs[name] = &input{}
		}
		return inputs[name]
	}
	for i, c := range p.Cells {
		j := &job{Job: &Job{Index: i, Cell: c}, pauses: cfg.pauses()}
		if c.Problem == nil {
			j.Log = filepath.Join(cfg.Logs, logName(c))
			j.kernel, j.driver = of("kernel "+c.Kernel.String()), of(fmt.Sprintf("driver %s %s", c.Driver.Version,
				c.Kernel.Arch))
		}
		f.jobs = append(f.jobs, j)
	}
	return f
}

// wake wakes all workers that wait in next. The caller holds f.mu.
func (f *runner) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *runner) stopping(ctx context.Context) bool {
	select {
	case <-f.cfg.Stopping: // a nil channel never receives
		return true
	default:
		return ctx.Err() != nil
	}
}

// claim returns the input if a cell needs it and no other fetch has claimed it, otherwise nil.
func (f *runner) claim(in *input) *input {
	f.mu.Lock()
	defer f.mu.Unlock()
	needed := slices.ContainsFunc(f.jobs, func(j *job) bool { return j.State == "" && (j.kernel == in || j.driver == in) })
	if in == nil || in.claimed || !needed {
		return nil
	}
	in.claimed = true
	return in
}

// endFetch records the end of a fetch; the callback stores what the fetch returned. A cell gets its final state if it
// cannot be built any more: the fetch failed, the driver lacks the flavour, or another cell of the same build has
// failed.
func (f *runner) endFetch(ctx context.Context, in *input, keep func(), err error) {
	f.mu.Lock()
	in.arrived, in.err = true, err
	keep()
	var lost, lacking, same []*job
	for _, j := range f.jobs {
		switch {
		case j.State != "" || j.kernel != in && j.driver != in:
		case err != nil:
			lost = append(lost, j)
		case j.driver == in && !slices.Contains(in.flavours, j.Cell.Driver.Flavour):
			lacking = append(lacking, j)
		case j.kernel == in && f.failed[j.buildKey()] != nil:
			same = append(same, j)
		}
	}
	f.wake()
	f.mu.Unlock()
	for _, j := range same {
		f.failAlike(ctx, j)
	}
	for _, j := range lost {
		f.fail(j, err)
	}
	for _, j := range lacking {
		lack := Failure{
			Class: fault.Unsupported,
			Error: fmt.Sprintf("driver %s has no modules of flavour %s", j.Cell.Driver.Version, j.Cell.Driver.Flavour),
			Hint:  "choose another flavour of this driver, in the wish list or with --flavour", Lacking: true,
		}
		f.remember(ctx, j, lack)
		f.finish(j, stateOf(j.Cell, lack), &lack)
	}
}

// endFetches records that no further input will arrive.
func (f *runner) endFetches() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.wake()
}

// next waits until a cell can start and returns the best one. It returns nil if no cell is left, or after the stop
// signal.
func (f *runner) next(ctx context.Context) *job {
	for {
		if f.stopping(ctx) {
			return nil
		}
		f.mu.Lock()
		j, wait, open := f.pick(time.Now())
		changed := f.changed
		if j != nil {
			j.running = true
			j.Attempts++
		}
		f.mu.Unlock()
		if j != nil || !open {
			return j
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = time.After(wait)
		}
		select {
		case <-changed:
		case <-timer:
		case <-f.cfg.Stopping:
		case <-ctx.Done():
		}
	}
}

// pick returns the best cell that may start now, or nil. The result wait is the time until the next pause ends; 0 means
// no pause. The result open is true if a cell can start now or later. The caller holds f.mu.
func (f *runner) pick(now time.Time) (best *job, wait time.Duration, open bool) {
	running := map[buildKey]bool{}
	busy := map[any]bool{}
	count, alone := 0, false
	for _, j := range f.jobs {
		if j.running {
			count++
			alone = alone || j.alone
			running[j.buildKey()] = true
			busy[j.kernel.fingerprint], busy[j.Cell.Driver.Version] = true, true
		}
	}
	bestCost := 0
	for _, j := range f.jobs {
		if j.State != "" || j.running {
			continue
		}
		if !j.ready() {
			open = open || !f.ended
			continue
		}
		open = true
		if pause := j.notBefore.Sub(now); pause > 0 {
			if wait == 0 || pause < wait {
				wait = pause
			}
			continue
		}
		if running[j.buildKey()] || f.failed[j.buildKey()] != nil || alone || j.alone && count > 0 {
			continue
		}
		if cost := f.cost(j, busy); best == nil || cost < bestCost {
			best, bestCost = j, cost
		}
	}
	return best, wait, open
}

// cost returns the rank of a cell that may start. The lowest cost starts first; cells with equal cost start in the
// plan's order. The cost is high if a running cell is the first with the same kernel or driver: both would do the same
// work. The cost is low if kernel and driver are warm: a finished cell left results in the cache.
func (f *runner) cost(j *job, busy map[any]bool) int {
	cost := 0
	for weight, key := range []any{j.Cell.Driver.Version, j.kernel.fingerprint} {
		switch {
		case f.warm[key]:
		case busy[key]:
			cost += 8 << weight
		default:
			cost += 1 << weight
		}
	}
	if j.Cell.EarlyWarning {
		cost += 4 // among equal cells, early warnings start last
	}
	return cost
}

// endAttempt records the outcome of one attempt. It makes all changes under one lock, so that no other worker can start
// the same cell, or another cell of the same build, between two changes.
func (f *runner) endAttempt(ctx context.Context, j *job, res *pipeline.Result, err error, took time.Duration) {
	f.mu.Lock()
	j.running = false
	j.Seconds += took.Seconds()
	if res != nil {
		j.Phases = res.Phases
		j.Known = err != nil && res.Remembered
	}
	if err == nil {
		state := Published
		if res != nil {
			j.Digest = res.Digest
			if res.Reused {
				state = Existed
			}
		}
		f.warm[j.kernel.fingerprint], f.warm[j.Cell.Driver.Version] = true, true
		f.put(j, state, nil)
		f.mu.Unlock()
		f.emit(Event{Job: j.Job, Kind: Settled})
		return
	}
	kind, known := fault.Of(err), FailureOf(err)
	if kind.Retryable() && kind != fault.Cancelled && j.Attempts < f.cfg.Attempts {
		j.notBefore = time.Now().Add(j.pauses.NextBackOff())
		j.alone = j.alone || kind == fault.OutOfMemory
		f.wake()
		f.mu.Unlock()
		f.emit(Event{Job: j.Job, Kind: Again, Failure: &known})
		return
	}
	f.put(j, stateOf(j.Cell, known), &known)
	var same []*job
	if sharedByBuild(kind, res) {
		key := j.buildKey()
		f.failed[key] = j
		for _, other := range f.jobs {
			if other.State == "" && !other.running && other.kernel.arrived && other.buildKey() == key {
				same = append(same, other)
			}
		}
	}
	f.mu.Unlock()
	f.emit(Event{Job: j.Job, Kind: Settled})
	if Permanent(kind, res) {
		f.remember(ctx, j, known)
	}
	for _, twin := range same {
		f.failAlike(ctx, twin)
	}
}

// failAlike sets the state of a cell to the failure of another cell of the same build, which did not compile.
func (f *runner) failAlike(ctx context.Context, twin *job) {
	f.mu.Lock()
	first := f.failed[twin.buildKey()]
	twin.Like = first.Cell.Kernel.String()
	known := *first.Failure
	f.mu.Unlock()
	f.remember(ctx, twin, known)
	f.finish(twin, stateOf(twin.Cell, known), &known)
}

func (f *runner) remember(ctx context.Context, j *job, known Failure) {
	if f.cfg.Failures == nil || ctx.Err() != nil {
		return
	}
	if merr := f.cfg.Failures.Remember(ctx, j.Cell, known); merr != nil {
		note := FailureOf(fmt.Errorf("store in the cache that the cell failed: %w", merr))
		f.emit(Event{Job: j.Job, Kind: Note, Failure: &note})
	}
}

// stateOf returns the state of a cell that ended with this failure. If the release lacks the flavour, the cell is
// Failed if its own wish names the flavour. It is Unavailable if only the general list of flavours names the flavour.
func stateOf(c plan.Cell, known Failure) State {
	switch {
	case known.Class == fault.Cancelled:
		return Cancelled
	case known.Lacking && c.Listed:
		return Unavailable
	}
	return Failed
}

func (f *runner) fail(j *job, err error) {
	known := FailureOf(err)
	f.finish(j, stateOf(j.Cell, known), &known)
}

func (f *runner) finish(j *job, state State, known *Failure) {
	f.mu.Lock()
	open := f.put(j, state, known)
	f.mu.Unlock()
	if open {
		f.emit(Event{Job: j.Job, Kind: Settled})
	}
}

// put sets the state of a cell that has none yet, and reports whether it did so. The caller holds f.mu.
func (f *runner) put(j *job, state State, known *Failure) bool {
	if j.State != "" {
		return false
	}
	j.State, j.Failure = state, known
	f.done++
	f.wake()
	return true
}

// skipRest cancels the cells that never started, and the cells whose next attempt did not start.
func (f *runner) skipRest(ctx context.Context) {
	cause := context.Cause(ctx)
	for _, j := range f.jobs {
		text := "the cell was not started: the run was stopped"
		if cause == nil && !f.stopping(ctx) {
			text = "the cell was not started: no reason was given" // only a bug in pick leads here
		}
		f.fail(j, fault.New(fault.Cancelled, text, "run the command again: the command does not build finished cells again"))
	}
}

func (f *runner) emit(e Event) {
	f.eventMu.Lock()
	defer f.eventMu.Unlock()
	f.mu.Lock()
	e.Done, e.Total = f.done, len(f.jobs)
	copied := *e.Job // the watcher gets its own copy
	e.Job = &copied
	f.mu.Unlock()
	if f.cfg.Watch != nil {
		f.cfg.Watch(e)
	}
}
