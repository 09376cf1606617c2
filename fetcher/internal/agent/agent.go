// Package agent installs and loads the driver that a node should run, step by step:
// observe, resolve, verify, fetch, stage, install, load, validate. It refuses
// to give unverified bytes a final name, to touch a driver that is in use, and
// to leave a node worse than it was: when a step fails, what was in force
// before is in force again.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// Agent runs the steps on one node.
type Agent struct {
	cfg    Config
	parts  Parts
	node   fs.FS // the files of parts.Node
	loader *kmod.Loader
	xids   xidWatch
	// watcher is told what there is while a run waits; nil means nobody.
	watcher Watcher
	// checked has the layers that were compared with signed content in this run, and seen
	// those of earlier runs: a checkedLayer by its digest.
	checked, seen sync.Map
	// unverified has the sets that could not be verified in this run, by their digests.
	unverified sync.Map
}

// New returns an agent.
func New(cfg Config, parts Parts) *Agent {
	node := parts.Node.FS()
	return &Agent{cfg: cfg, parts: parts, node: node, loader: &kmod.Loader{System: parts.Kernel, Root: node}}
}

// Report is the result of one run.
type Report struct {
	Kernel target.Kernel  `json:"kernel"`
	Answer resolve.Answer `json:"resolution"`
	// SignedBy names the key or identity whose signature was accepted; empty when an
	// installed driver was kept without asking anybody.
	SignedBy string `json:"signedBy,omitempty"`
	// Signatures are all that counted, by whom and in which role.
	Signatures []trust.Signature `json:"signatures,omitempty"`
	// Changed says that another artifact is in force than before.
	Changed bool `json:"changed"`
	DryRun  bool `json:"dryRun,omitempty"`
	// Plan lists what was done, or with DryRun what would be done.
	Plan []string `json:"plan"`
	// Pending says that another driver is on the disk and still wanted; "" means that none is.
	Pending string `json:"pending,omitempty"`
	// Waiting lists what the owner asked for and only counts later.
	Waiting []string `json:"waiting,omitempty"`
	// FetchedBytes came over the network as layers; CachedBytes were there.
	FetchedBytes int64            `json:"fetchedBytes"`
	CachedBytes  int64            `json:"cachedBytes"`
	Modules      []kmod.Outcome   `json:"modules"`
	Verdict      gpucheck.Verdict `json:"verdict"`
	Phases       []timeline.Phase `json:"phases"`
}

func (r *Report) did(format string, args ...any) {
	r.Plan = append(r.Plan, fmt.Sprintf(format, args...))
}

// Run does all steps once. The report is never nil; it tells how far the run
// came. A verdict other than ready is an error of its kind.
func (a *Agent) Run(ctx context.Context) (*Report, error) {
	a.parts.Line = &timeline.Run{Watch: a.parts.Line.Watch, Now: a.parts.Line.Now} // of this run alone
	a.forget()
	r := &Report{DryRun: a.cfg.DryRun, Plan: []string{}, Modules: []kmod.Outcome{}}
	err := a.run(ctx, r)
	r.Phases = a.parts.Line.Phases()
	return r, err
}

// forget drops what a run knows of the disk.
func (a *Agent) forget() {
	a.checked.Range(func(digest, layer any) bool {
		a.seen.Store(digest, layer)
		return true
	})
	a.checked.Clear()
	a.unverified.Clear()
}

func (a *Agent) run(ctx context.Context, r *Report) (err error) {
	facts, err := a.observe(r)
	if err != nil {
		return err
	}
	store, err := a.openStore()
	if err != nil {
		return err
	}
	if store != nil {
		defer func() { err = errors.Join(err, store.Close()) }()
	}
	a.bootAllows(ctx, store, facts)
	defer func() {
		if err != nil {
			err = a.editBoot(ctx, r, store, facts, err)
		}
	}()
	// What the kernel is bound to refuse is said before anything is downloaded.
	if !a.cfg.NoLoad && len(facts.Modules) == 0 {
		if err := facts.Policy.Allows("nvidia", true); err != nil {
			return err
		}
	}
	if a.cfg.DryRun {
		return a.dryRun(ctx, r, facts, store)
	}
	var current *install.Set
	if err := a.locked(store, func() (err error) {
		current, err = a.start(ctx, r, store)
		return err
	}); err != nil {
		return err
	}
	// Nobody is kept waiting while this program waits for the farm.
	mayBuild := a.mayBuild(ctx, store, facts, current)
	answer, none := a.resolve(ctx, facts, mayBuild)
	r.Answer = answer
	end := a.parts.Now().Add(a.cfg.WaitIdle)
	for {
		plan := len(r.Plan)
		err := a.locked(store, func() error { return a.applyDecision(ctx, r, store, none) })
		if !a.waitIdle(ctx, err, end) {
			return err
		}
		r.Plan, r.Answer, r.FetchedBytes, r.CachedBytes = r.Plan[:plan], answer, 0, 0
	}
}

// mayBuild reports whether this node should compile for itself where nothing is published:
// not for a kernel in which a foreign driver stays, and not where what it wants is
// here and holds.
func (a *Agent) mayBuild(ctx context.Context, store *install.Store, facts *host.Facts, current *install.Set) bool {
	if a.parts.Local == nil || a.cfg.Pin != "" {
		return false
	}
	s, err := a.readState(ctx, store)
	if err != nil {
		return false
	}
	if s.keepsForeign() {
		return false
	}
	return !serves(current, a.question(facts)) || !a.verifiable(store, current, facts) && !s.runs(current)
}

// locked runs do while no other installer works on this node.
func (a *Agent) locked(store *install.Store, do func() error) (err error) {
	unlock, err := store.Lock(googleLock)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	return do()
}

// start ends what an earlier run left half done, and loads what is installed for this
// build into a kernel without a driver: a node comes up without asking anybody. A set
// that waits for such a kernel comes first, and the one before comes last.
func (a *Agent) start(ctx context.Context, r *Report, store *install.Store) (*install.Set, error) {
	if err := errors.Join(store.Recover(), a.recover(ctx, r, store)); err != nil {
		return nil, err
	}
	s, err := a.readState(ctx, store)
	if err != nil || a.cfg.NoLoad {
		return s.current, err
	}
	if len(s.facts.Modules) > 0 {
		if s.current != nil && s.runs(s.current) && fitsNode(s.current, s.facts) == nil && s.incomplete() {
			a.try(ctx, r, store, s, s.current)
		}
		return store.Current()
	}
	waiting := s.waiting()
	if waiting != nil && !serves(waiting, s.question) { // it was another wish
		waiting = nil
	}
	for _, set := range []*install.Set{waiting, s.current, s.previous} {
		if set == nil || fitsNode(set, s.facts) != nil || s.refused(set) != nil {
			continue
		}
		if a.try(ctx, r, store, s, set) {
			break
		}
		if s, err = a.readState(ctx, store); err != nil || len(s.facts.Modules) > 0 {
			break
		}
	}
	if s, err := a.readState(ctx, store); err == nil && len(s.facts.Modules) == 0 {
		if err := a.restoreForeign(ctx, r, store, s); err != nil {
			a.parts.Log.WarnContext(ctx, "activate the previous driver again", "err", err)
		}
	}
	return store.Current()
}

// try puts a set in force and reports whether it is loaded. What the farm has may do
// better where it is not; if not, applyDecision meets the error again.
func (a *Agent) try(ctx context.Context, r *Report, store *install.Store, s nodeState, set *install.Set) bool {
	d := s.put(set)
	if d.set == nil {
		return false
	}
	err := a.activate(ctx, r, store, s, d)
	if err != nil {
		a.parts.Log.WarnContext(ctx, "load installed driver", "driver", set.Driver, "digest", set.Digest, "err", err)
	}
	return err == nil || r.Verdict.Digest == set.Digest
}

// applyDecision puts in force what is to be, now that the farm has answered or has not.
func (a *Agent) applyDecision(ctx context.Context, r *Report, store *install.Store, none error) error {
	s, err := a.readState(ctx, store) // again: the wait for an answer may have been long
	if err != nil {
		return err
	}
	silent := none != nil
	if none == nil && !a.cfg.Retry {
		if at := s.attempts[r.Answer.Digest]; at != nil { // nobody fetches what is refused
			none = at.refused(r.Answer.Driver, s.another(r.Answer.Digest))
		}
	}
	if none == nil && s.keepsForeign() && !s.facts.Runs(r.Answer.Driver) { // nobody fetches what has to wait
		none = s.put(&install.Set{Driver: r.Answer.Driver}).err
	}
	if s.none = none; none == nil {
		s.wanted, s.none = a.fetchAndStage(ctx, r, store, s.facts, s.current)
		wanted, none := s.wanted, s.none
		if s, err = a.readState(ctx, store); err != nil { // and so may the download
			return err
		}
		s.wanted, s.none = wanted, none
	}
	excused := a.upToDate(r.Answer, s, silent)
	d := decide(s)
	var waiting []string // what stays on the disk though it is not in force
	if set := s.waiting(); set != nil {
		waiting = append(waiting, set.Digest)
		if serves(set, s.question) && (d.set == nil || d.set.Digest != set.Digest) {
			r.Pending = fmt.Sprintf("driver %s (%s) waits for a kernel without a driver, or for an idle GPU", set.Driver,
				short(set.Digest))
		}
	}
	if d.set == nil {
		if fault.Is(d.err, fault.Transient) {
			return a.addUnverified(s, d.err) // what was fetched so far is of use to the next run
		}
		d.err = a.addUnverified(s, d.err)
		if s.wanted != nil { // so is this, however often it is refused
			waiting = append(waiting, s.wanted.Digest)
		}
		return errors.Join(d.err, store.Sweep(waiting...))
	}
	if s.wanted == nil || d.set.Digest != s.wanted.Digest {
		reason := d.err
		if s.wanted != nil {
			waiting = append(waiting, s.wanted.Digest)
			if fault.Is(reason, fault.Busy) && len(s.facts.Modules) > 0 {
				if err := a.noteNext(store, s.wanted.Digest); err != nil {
					a.parts.Log.WarnContext(ctx, "record waiting driver", "err", err)
				}
			}
		}
		if excused {
			d.err = nil
		}
		r.Answer = keptAnswer(d.set)
		r.Answer.Reason = reason.Error()
		a.parts.Log.WarnContext(ctx, "kept installed driver", "driver", d.set.Driver, "digest", d.set.Digest, "err", reason)
	}
	if err := a.activate(ctx, r, store, s, d); err != nil {
		return errors.Join(err, d.err)
	}
	if fault.Is(d.err, fault.Transient) {
		return d.err // what was fetched so far is of use to the next run
	}
	return errors.Join(d.err, store.Sweep(waiting...))
}

// addUnverified adds why the installed driver was not loaded, where it does not hold: that is
// what has to be mended.
func (a *Agent) addUnverified(s nodeState, err error) error {
	if s.current == nil {
		return err
	}
	why, ok := a.unverified.Load(s.current.Digest)
	bad, _ := why.(error)
	if !ok || bad == nil || errors.Is(err, bad) {
		return err
	}
	return fault.Wrap(fault.Of(bad),
		fmt.Errorf("verify installed driver %s: %w; and then: %w", s.current.Driver, bad, err),
		cmp.Or(fault.Hint(bad), hintAgain))
}

// upToDate reports whether a node that has what it wishes for, as far as it can tell, is
// as it should be although the farm names nothing (silent), or cannot be reached. That
// an answer is hostile, or that the driver was yanked, is nothing to pass over.
func (a *Agent) upToDate(answer resolve.Answer, s nodeState, silent bool) bool {
	switch {
	case s.wanted != nil || !serves(s.current, s.question) || answer.State == api.Yanked:
		return false
	case fault.Is(s.none, fault.Transient):
		return true
	}
	return silent && !fault.Is(s.none, fault.Unverified) && !fault.Is(s.none, fault.Mismatch) &&
		!fault.Is(s.none, fault.Unsupported)
}

// readState reads the inputs of a decision.
func (a *Agent) readState(ctx context.Context, store *install.Store) (s nodeState, err error) {
	s = nodeState{replaceForeign: a.cfg.ReplaceForeign, allowDowngrade: a.cfg.AllowDowngrade, retry: a.cfg.Retry,
		noLoad: a.cfg.NoLoad}
	if s.facts, err = host.Observe(a.node); err != nil {
		return s, err
	}
	if s.facts.Open() {
		if s.facts.Users, err = host.DeviceUsers(a.node); err != nil {
			a.parts.Log.WarnContext(ctx, "find who uses the GPU", "err", err)
		}
	}
	s.verifiable = func(set *install.Set) bool { return a.verifiable(store, set, s.facts) }
	s.closed = a.cfg.Maintenance.Closed(a.parts.Now())
	s.question = a.question(s.facts)
	if store == nil {
		s.verifiable = nil
	}
	if s.current, err = currentSet(store); err != nil || store == nil {
		s.attempts = attempts{}
		return s, err
	}
	// Nothing of the rest is worth more than the driver that is in force.
	if s.previous, err = store.Previous(); err != nil {
		a.parts.Log.WarnContext(ctx, "read former driver", "err", err)
	}
	if s.staged, err = store.Sets(); err != nil {
		a.parts.Log.WarnContext(ctx, "read staged drivers", "err", err)
	}
	if s.attempts, err = readAttempts(store); err != nil {
		a.parts.Log.WarnContext(ctx, "read attempts", "err", err)
		s.attempts = attempts{}
	}
	return s, nil
}

// waiting is the set that waits for a kernel without a driver; nil means none.
func (s nodeState) waiting() *install.Set {
	for _, set := range s.staged {
		if at := s.attempts[set.Digest]; at != nil && at.Next {
			return set
		}
	}
	return nil
}

// incomplete reports whether a driver is loaded without all that CUDA programs need.
func (s nodeState) incomplete() bool {
	for _, name := range []string{"nvidia", "nvidia_uvm"} {
		if !slices.ContainsFunc(s.facts.Modules, func(m host.Module) bool { return m.Name == name }) {
			return true
		}
	}
	return false
}

func (a *Agent) question(facts *host.Facts) resolve.Question {
	return resolve.Question{Kernel: facts.Kernel, Wish: a.cfg.Wish, Pin: a.cfg.Pin, Flavour: a.cfg.Flavour,
		GPUs: facts.Listed()}
}

// googleLock is the lock file of Google's installer, inside the node's root.
const googleLock = "tmp/cos_gpu_installer_lock"

func (a *Agent) observe(r *Report) (*host.Facts, error) {
	var facts *host.Facts
	err := a.parts.Line.Do("observe", func() (note string, err error) {
		if facts, err = host.Observe(a.node); err != nil {
			return "", err
		}
		r.Kernel = facts.Kernel
		return fmt.Sprintf("COS %s, %s, %s", facts.Kernel, facts.Kernel.Release, plural(len(facts.GPUs), "GPU")), nil
	})
	return facts, err
}

// openStore opens the install folder; with DryRun it may be missing (nil).
func (a *Agent) openStore() (*install.Store, error) {
	store, err := install.Open(a.parts.Node, a.cfg.InstallDir, !a.cfg.DryRun)
	if a.cfg.DryRun && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return store, err
}

// openInstalled opens the install folder where it is.
func (a *Agent) openInstalled() (*install.Store, error) {
	return install.Open(a.parts.Node, a.cfg.InstallDir, false)
}

func currentSet(store *install.Store) (*install.Set, error) {
	if store == nil {
		return nil, nil
	}
	return store.Current()
}

func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// size writes bytes for people.
func size(n int64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

func short(digest string) string {
	return digest[:min(len(digest), len("sha256:")+12)]
}
