// Package agent installs and loads the driver that a node should run. A run has these steps:
//
//   - observe the node, resolve the driver, verify the artifact
//   - fetch and stage the layers
//   - install, load and validate the driver
//
// A run never gives unverified bytes a final name, and never unloads a driver in use. When a step fails, the agent
// restores the former driver.
//
// In names and types of this package, a set is the files of one driver on the node's disk (see [install.Set]).
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// Agent installs and loads the driver of one node.
type Agent struct {
	cfg    Config
	parts  Parts
	node   fs.FS // the files of parts.Node
	loader *kmod.Loader
	xids   xidWatch
	cuda   cudaWatch
	// watcher receives the driver's state while a run waits. It is nil if nobody watches.
	watcher Watcher
	// checked holds the layers that this run compared with their signed content; seen holds those of earlier runs. Both
	// map a digest to a checkedLayer.
	checked, seen sync.Map
	// unverified maps digests of installed drivers to their errors in this run's verification.
	unverified sync.Map
	// holds is the store whose lock this run holds, or nil.
	holds *install.Store
	// uncounted is the reason why recover could not record that the node went down during a load, or nil.
	uncounted error
	// suspects has this run's failures that do not count yet.
	suspects []suspect
	// wanted is the driver that this node should have.
	wanted wanted
	// wait is what is left of Config.Wait for the farm in this run.
	wait time.Duration
	// aside has the names, in .prebake/adopted, of what earlier runs found in place of a link in .prebake.
	aside []string
}

// New returns an agent.
func New(cfg Config, parts Parts) *Agent {
	node := parts.Node.FS()
	return &Agent{cfg: cfg, parts: parts, node: node, loader: &kmod.Loader{System: parts.Kernel, Root: node},
		wanted: wanted{wish: cfg.Wish}}
}

// Report is the result of one run.
type Report struct {
	Kernel target.Kernel  `json:"kernel"`
	Answer resolve.Answer `json:"resolution"`
	// SignedBy is the key or identity of the accepted signature. It is "" if the run kept an installed driver without
	// asking a server or registry.
	SignedBy string `json:"signedBy,omitempty"`
	// Signatures are all accepted signatures, with signer and role.
	Signatures []trust.Signature `json:"signatures,omitempty"`
	// Changed means that the run has made another artifact the active one.
	Changed bool `json:"changed"`
	DryRun  bool `json:"dryRun,omitempty"`
	// Plan lists the actions of the run, or with DryRun the actions of a real run.
	Plan []string `json:"plan"`
	// Pending is the reason why a driver on the disk is not active yet. It is "" if no driver waits.
	Pending string `json:"pending,omitempty"`
	// Waiting has the owner's settings that have not taken effect yet, each with the reason.
	Waiting []string `json:"waiting,omitempty"`
	// Unconfirmed means that the run kept the active driver as the wanted one, but that the farm may name another driver
	// for the same wish later.
	Unconfirmed bool `json:"-"`
	// Relabelled means that the run ended because the node's label changed meanwhile.
	Relabelled bool `json:"-"`
	// FetchedBytes is the size of the fetched layers and deltas. CachedBytes is the size of the layers that the node had.
	FetchedBytes int64            `json:"fetchedBytes"`
	CachedBytes  int64            `json:"cachedBytes"`
	Modules      []kmod.Outcome   `json:"modules"`
	Verdict      gpucheck.Verdict `json:"verdict"`
	Phases       []timeline.Phase `json:"phases"`

	layers []install.Layer // the layers of the verified artifact
}

func (r *Report) did(format string, args ...any) {
	r.Plan = append(r.Plan, fmt.Sprintf(format, args...))
}

// Run does all steps once. The report is never nil. If the operator must act on the verdict, the error has the
// verdict's kind (see [gpucheck.Verdict.Err]).
func (a *Agent) Run(ctx context.Context) (*Report, error) {
	a.parts.Line = &timeline.Run{Watch: a.parts.Line.Watch, Now: a.parts.Line.Now} // a timeline for this run only
	a.forget()
	a.reread(ctx)
	a.readWanted(ctx)
	a.wait = a.cfg.Wait
	r := &Report{DryRun: a.cfg.DryRun, Plan: []string{}, Modules: []kmod.Outcome{}}
	err := a.run(ctx, r)
	r.Phases = a.parts.Line.Phases()
	return r, err
}

// forget resets what the agent knows from the last run: its checked layers become seen layers, its unverified drivers
// are checked again, and its suspects are dropped.
func (a *Agent) forget() {
	a.checked.Range(func(digest, layer any) bool {
		a.seen.Store(digest, layer)
		return true
	})
	a.checked.Clear()
	a.unverified.Clear()
	a.suspects, a.aside = nil, nil
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
	// If the kernel will certainly refuse the modules, report that before any download.
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
	// Other installers can work during the wait for the farm, because this run does not hold the lock then.
	mayBuild := func(named target.Driver) bool { return a.mayBuild(ctx, store, facts, current, named) }
	findMade := func(named target.Driver) *install.Set { return a.madeBefore(ctx, store, named) }
	if a.watcher != nil && r.Verdict.State != "" { // start checked the driver
		a.watcher.Report(r.Verdict)
	}
	var answer resolve.Answer
	var none error
	release := nothingHeld
	a.whileWatching(ctx, current, func() {
		a.awaitLabel(ctx)
		answer, release, none = a.resolve(ctx, facts, mayBuild, findMade)
	})
	defer func() { err = errors.Join(err, release()) }()
	r.Answer = answer
	end, lockEnd := a.parts.Now().Add(a.cfg.WaitIdle), a.parts.Now().Add(lockWait)
	compiled := none == nil && answer.Source == resolve.SourceNode
	released := false // whether other fetchers may compile again
	for {
		plan, waiting := len(r.Plan), len(r.Waiting)
		begun := false
		err := a.locked(store, func() error {
			begun, released = true, true
			// Only now may other fetchers compile: the driver that this node compiled is staged, or this run has given it up.
			return errors.Join(a.applyDecision(ctx, r, store, none), release())
		})
		if compiled && !begun && fault.Is(err, fault.Busy) {
			if a.pauseUntil(ctx, lockEnd) {
				continue
			}
			if !released { // a wait for an idle GPU would keep other fetchers from compiling
				return err
			}
		}
		// An idle GPU does not help if the search for the driver was busy, such as with the compile of another fetcher.
		if fault.Is(none, fault.Busy) && errors.Is(err, none) || !a.waitIdle(ctx, r, err, end) {
			return err
		}
		if r.Relabelled = a.relabelled(ctx); r.Relabelled { // the next run asks for the other driver
			return err
		}
		a.whileWatching(ctx, current, func() { answer, none = a.askAgain(ctx, a.question(facts), answer, none) })
		r.Plan, r.Answer, r.FetchedBytes, r.CachedBytes = r.Plan[:plan], answer, 0, 0
		r.Pending, r.Waiting = "", r.Waiting[:waiting]
	}
}

// lockWait is how long a run waits for another installer, before it gives up a driver that this node compiled.
const lockWait = 2 * time.Minute

// locked takes the lock that excludes other installers, calls do, and releases the lock.
func (a *Agent) locked(store *install.Store, do func() error) (err error) {
	unlock, err := store.Lock(googleLock)
	if err != nil {
		return err
	}
	a.holds = store
	defer func() {
		a.holds = nil
		err = errors.Join(err, unlock())
	}()
	return do()
}

// start repairs what an earlier run left unfinished, and returns the active driver. If no driver is loaded, it loads an
// installed one, so the node needs no farm. It tries in this order:
//
//  1. the driver that waits (attempt.Next);
//  2. the current driver;
//  3. the previous driver, but before the current one if the wish is an exact version or a digest that only the
//     previous one has;
//  4. the current driver, even if an operator rolled it back; and also if it was refused at first because the node had
//     another driver, and that driver has failed by now.
func (a *Agent) start(ctx context.Context, r *Report, store *install.Store) (*install.Set, error) {
	if names := store.NotLinks(); len(names) > 0 {
		a.parts.Log.WarnContext(ctx,
			"found files of others in place of links in .prebake; the next activation moves them into .prebake/adopted",
			"names", names)
	}
	a.reserve(ctx, store)
	before, berr := store.Aside()
	if err := errors.Join(store.Recover(), a.recover(ctx, r, store)); err != nil {
		return nil, err
	}
	// This run must not remove what recover has moved aside. What recover has moved back is not there any more.
	after, err := store.Aside()
	if err = errors.Join(berr, err); err != nil {
		a.parts.Log.WarnContext(ctx, "could not read the folder .prebake/adopted", "err", err)
	}
	a.aside = slices.DeleteFunc(before, func(name string) bool { return !slices.Contains(after, name) })
	s, err := a.readState(ctx, store)
	if err != nil || a.cfg.NoLoad {
		return s.current, err
	}
	a.dropUnwanted(ctx, r, store, s)
	if len(s.facts.Modules) > 0 {
		if s.current != nil && s.runs(s.current) && fitsNode(s.current, s.facts) == nil && s.incomplete() {
			a.try(ctx, r, store, s, s.current)
		}
		return store.Current()
	}
	tried := map[string]bool{} // by digest
	for _, set := range a.bootOrder(s) {
		if set == nil || fitsNode(set, s.facts) != nil || s.refused(set) != nil {
			continue
		}
		tried[set.Digest] = true
		if a.try(ctx, r, store, s, set) {
			break
		}
		if s, err = a.readState(ctx, store); err != nil || len(s.facts.Modules) > 0 {
			break
		}
	}
	if s, err := a.readState(ctx, store); err == nil && len(s.facts.Modules) == 0 {
		last := s.current
		if last != nil && fitsNode(last, s.facts) == nil &&
			(s.onlyRolledBack(last) || s.refused(last) == nil && !tried[last.Digest]) && a.try(ctx, r, store, s, last) {
			return store.Current()
		}
		if err := a.restoreForeign(ctx, r, store, s); err != nil {
			a.parts.Log.WarnContext(ctx, "could not load the foreign driver again, which a killed run unloaded", "err", err)
		}
	}
	return store.Current()
}

// try activates an installed driver and reports whether it is loaded. Errors are only logged, because the farm may
// offer a better driver.
func (a *Agent) try(ctx context.Context, r *Report, store *install.Store, s nodeState, set *install.Set) bool {
	d := s.put(set)
	if d.set == nil {
		return false
	}
	err := a.activate(ctx, r, store, s, d)
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not load the installed driver", "driver", set.Driver, "digest", set.Digest,
			"err", err)
	}
	return err == nil || r.Verdict.Digest == set.Digest
}

// applyDecision decides which driver must be active, and activates it. If the given error is nil, r.Answer has an
// artifact of the farm.
func (a *Agent) applyDecision(ctx context.Context, r *Report, store *install.Store, none error) error {
	s, err := a.readState(ctx, store) // again, because the wait for the answer may have been long
	if err != nil {
		return err
	}
	silent := none != nil
	if none == nil && !a.cfg.Retry {
		if at := s.attempts[r.Answer.Digest]; at != nil { // do not fetch a refused driver
			none = at.refused(r.Answer.Driver, s.another(r.Answer.Digest), s.labelled, s.pin)
		}
	}
	if none == nil && s.keepsForeign() && !s.facts.Runs(r.Answer.Driver) { // do not fetch a driver that must wait
		none = s.put(&install.Set{Driver: r.Answer.Driver}).err
	}
	if s.none = none; none == nil {
		a.whileWatching(ctx, s.current, func() {
			s.wanted, s.none = a.fetchAndStage(ctx, r, store, s.facts, s.current)
		})
		wanted, none := s.wanted, s.none
		if s, err = a.readState(ctx, store); err != nil { // again, because the download may have been long
			return err
		}
		s.wanted, s.none = wanted, none
	}
	d := decide(s)
	excused := a.upToDate(r.Answer, d.set, s, silent)
	var waiting []string // digests of inactive drivers and layers that stay on the disk
	if fault.Is(s.none, fault.DiskFull) {
		for _, l := range r.layers { // the next run need not fetch the complete layers again
			waiting = append(waiting, l.Digest)
		}
	}
	if r.Answer.Source == resolve.SourceNode { // keep it even if it is refused: otherwise this node would compile it again
		waiting = append(waiting, r.Answer.Digest)
	}
	if set := s.waiting(); set != nil {
		waiting = append(waiting, set.Digest)
		dropped := a.dropUnwanted(ctx, r, store, s)
		if !dropped && serves(set, s.question) && (d.set == nil || d.set.Digest != set.Digest) {
			r.Pending = fmt.Sprintf("driver %s (%s) waits until no driver is loaded, or until the GPU is idle", set.Driver,
				short(set.Digest))
		}
	}
	if d.set == nil {
		if resolve.Passing(d.err) {
			return a.addUnverified(s, d.err) // keep the fetched layers for the next run
		}
		d.err = a.addUnverified(s, d.err)
		if s.wanted != nil { // keep the wanted driver for the next run, even if it was refused
			waiting = append(waiting, s.wanted.Digest)
		}
		return errors.Join(d.err, store.Sweep(waiting...))
	}
	if s.wanted == nil || d.set.Digest != s.wanted.Digest {
		reason := d.err
		if s.wanted != nil {
			waiting = append(waiting, s.wanted.Digest)
			if fault.Is(reason, fault.Busy) && len(s.facts.Modules) > 0 {
				if err := a.noteNext(store, s.wanted.Digest, ""); err != nil {
					a.parts.Log.WarnContext(ctx, "could not record the waiting driver", "err", err)
				}
			}
		}
		if excused && s.refused(d.set) == nil { // a refused driver stays only until its rollback is possible
			d.err, r.Unconfirmed = nil, isUnconfirmed(r.Answer, d.set, s)
		}
		r.Answer = keptAnswer(d.set)
		r.Answer.Reason = reason.Error()
		a.parts.Log.WarnContext(ctx, "kept installed driver", "driver", d.set.Driver, "digest", d.set.Digest, "err", reason)
	} else if a.isOutdated(ctx, r, s, d) { // the next run asks for the other driver
		return nil
	}
	err = a.activate(ctx, r, store, s, d)
	if err != nil && r.Verdict.Digest != d.set.Digest { // the driver is not active: keep its layers for the next run
		return errors.Join(err, d.err, a.keepRolledBack(ctx, r, store))
	}
	// Only the wanted driver may be loaded at the next boot. A registry may lack the driver that waits, if another source
	// named that one.
	if s.wanted != nil && d.set.Digest == s.wanted.Digest && r.Answer.Source != resolve.SourceRegistry {
		a.dropWaiting(ctx, r, store, s)
	}
	if resolve.Passing(d.err) {
		return errors.Join(err, d.err) // keep the fetched layers for the next run
	}
	return errors.Join(err, d.err, store.Sweep(waiting...))
}

// keepRolledBack checks the current driver after its rollback failed, so that the report has a verdict on this driver.
func (a *Agent) keepRolledBack(ctx context.Context, r *Report, store *install.Store) error {
	s, err := a.readState(ctx, store)
	if err != nil || r.Verdict.State != "" || !s.waitsForRollback() {
		return err
	}
	r.Answer = keptAnswer(s.current)
	return a.activate(ctx, r, store, s, decision{do: keep, set: s.current})
}

// addUnverified adds to the given error the reason why the installed driver failed verification, if it did.
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
		fmt.Errorf("verify installed driver %s: %w; the run then failed: %w", s.current.Driver, bad, err),
		cmp.Or(fault.Hint(bad), hintAgain))
}

func (a *Agent) question(facts *host.Facts) resolve.Question {
	return resolve.Question{Kernel: facts.Kernel, Wish: a.wanted.wish, Pin: a.pin(), Flavour: a.cfg.Flavour,
		GPUs: facts.Listed()}
}

// googleLock is the lock file of Google's installer, relative to the node's root.
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

// openStore opens the install folder, and creates it if it is missing. With DryRun it creates nothing, and returns nil
// if the folder is missing.
func (a *Agent) openStore() (*install.Store, error) {
	store, err := a.open(!a.cfg.DryRun)
	if a.cfg.DryRun && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return store, err
}

func (a *Agent) openInstalled() (*install.Store, error) { return a.open(false) }

func (a *Agent) open(create bool) (*install.Store, error) {
	store, err := install.Open(a.parts.Node, a.cfg.InstallDir, create)
	if err != nil {
		return nil, err
	}
	store.PutAside = func(path string) {
		a.parts.Log.Warn("moved what was in place of a link in .prebake; a later run removes it, if the driver works "+
			"without it", "path", path)
	}
	return store, nil
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

// size formats a number of bytes for people.
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
