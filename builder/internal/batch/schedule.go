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
	claimed, here bool
	err           error
	fingerprint   target.Fingerprint // of a kernel
	flavours      []target.Flavour   // of a driver
}

// job is a cell on its way.
type job struct {
	*Job
	kernel, driver *input
	running        bool
	alone          bool      // ran out of memory beside others
	notBefore      time.Time // of the next attempt
	pauses         *backoff.ExponentialBackOff
}

// buildKey tells builds with one outcome.
type buildKey struct {
	fingerprint target.Fingerprint
	driver      target.Driver
}

func (j *job) buildKey() buildKey { return buildKey{j.kernel.fingerprint, j.Cell.Driver} }

// ready reports whether all is there that the cell needs; runner.mu is held.
func (j *job) ready() bool {
	return j.kernel.here && j.driver.here && j.kernel.err == nil && j.driver.err == nil &&
		slices.Contains(j.driver.flavours, j.Cell.Driver.Flavour)
}

type runner struct {
	cfg  Config
	jobs []*job

	eventMu sync.Mutex // orders events

	mu        sync.Mutex
	changed   chan struct{}     // closed and replaced at each change
	done      int               // cells that have a state
	ended     bool              // no more inputs will arrive
	warm      map[any]bool      // fingerprints and driver versions that a cell was made of
	failed    map[buildKey]*job // builds that would fail the same way again
	lookupErr error             // the first answer that lookUp did not get
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

// wake wakes those who wait in next. f.mu is held.
func (f *runner) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *runner) stopping(ctx context.Context) bool {
	select {
	case <-f.cfg.Stopping: // nil never answers
		return true
	default:
		return ctx.Err() != nil
	}
}

// claim returns the input if it is needed and nobody fetches it yet.
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

// arrived takes an input, or fails the cells that wait for it.
func (f *runner) arrived(ctx context.Context, in *input, keep func(), err error) {
	f.mu.Lock()
	in.here, in.err = true, err
	keep()
	var lost, lacking, twins []*job
	for _, j := range f.jobs {
		switch {
		case j.State != "" || j.kernel != in && j.driver != in:
		case err != nil:
			lost = append(lost, j)
		case j.driver == in && !slices.Contains(in.flavours, j.Cell.Driver.Flavour):
			lacking = append(lacking, j)
		case j.kernel == in && f.failed[j.buildKey()] != nil:
			twins = append(twins, j)
		}
	}
	f.wake()
	f.mu.Unlock()
	for _, j := range twins {
		f.failAlike(ctx, j)
	}
	for _, j := range lost {
		f.fail(j, err)
	}
	for _, j := range lacking {
		lack := Failure{
			Class: fault.Unsupported,
			Error: fmt.Sprintf("driver %s: the release has no %s modules", j.Cell.Driver.Version, j.Cell.Driver.Flavour),
			Hint:  "ask for another flavour of it", Lacking: true,
		}
		f.remember(ctx, j, lack)
		f.finish(j, stateOf(j.Cell, lack), &lack)
	}
}

// fetched says that whatever has not arrived by now never will.
func (f *runner) fetched() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.wake()
}

// next waits for the cell that is best made now; nil says that there is none
// left.
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

// pick chooses among the cells that may start now. wait is until the next
// pause is over; open says that there may be something to do later. f.mu is
// held.
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

// cost orders the cells that may start: one whose kernel or driver another
// cell is just warming up would do the same work beside it, so it comes late;
// one whose kernel and driver are warm comes early. What costs the same keeps
// the plan's order, which is kernel by kernel.
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
		cost += 4 // what alarms goes first, among equals
	}
	return cost
}

// made takes the outcome of one attempt. A worker that looks for work meanwhile
// must begin neither the cell again nor another cell of the same build.
func (f *runner) made(ctx context.Context, j *job, res *pipeline.Result, err error, took time.Duration) {
	f.mu.Lock()
	j.running = false
	j.Seconds += took.Seconds()
	if res != nil {
		j.Phases = res.Phases
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
	var twins []*job
	if Permanent(kind, res) {
		key := j.buildKey()
		f.failed[key] = j
		for _, other := range f.jobs {
			if other.State == "" && !other.running && other.kernel.here && other.buildKey() == key {
				twins = append(twins, other)
			}
		}
	}
	f.mu.Unlock()
	f.emit(Event{Job: j.Job, Kind: Settled})
	if Permanent(kind, res) {
		f.remember(ctx, j, known)
	}
	for _, twin := range twins {
		f.failAlike(ctx, twin)
	}
}

// failAlike settles a cell as the one that is the same build.
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
		note := FailureOf(fmt.Errorf("failure not recorded: %w", merr))
		f.emit(Event{Job: j.Job, Kind: Note, Failure: &note})
	}
}

// stateOf tells failures from what is none: a flavour that the release does not
// have, and that nobody asked for by name.
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

// put gives a cell its state, and reports whether it had none; f.mu is held.
func (f *runner) put(j *job, state State, known *Failure) bool {
	if j.State != "" {
		return false
	}
	j.State, j.Failure = state, known
	f.done++
	f.wake()
	return true
}

// skipRest settles what was never begun, or not begun again.
func (f *runner) skipRest(ctx context.Context) {
	cause := context.Cause(ctx)
	for _, j := range f.jobs {
		text := "not started: the run was stopped"
		if cause == nil && !f.stopping(ctx) {
			text = "not started: no reason was given" // a bug in pick
		}
		f.fail(j, fault.New(fault.Cancelled, text, "run the command again: it keeps what is done"))
	}
}

func (f *runner) emit(e Event) {
	f.eventMu.Lock()
	defer f.eventMu.Unlock()
	f.mu.Lock()
	e.Done, e.Total = f.done, len(f.jobs)
	copied := *e.Job // the watcher's own
	e.Job = &copied
	f.mu.Unlock()
	if f.cfg.Watch != nil {
		f.cfg.Watch(e)
	}
}
