package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/prebake/prebake/fetcher/internal/footprint"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Watcher receives the results of [Agent.Monitor].
type Watcher interface {
	// Report receives each verdict. Alive is called at the end of each check, even without a verdict.
	Report(v gpucheck.Verdict)
	Alive()
	// CheckStarted is called at the start of each check. CheckStopped is called at the end of a check that found out
	// nothing about the driver. After a check that the driver does not answer in time, neither Report nor CheckStopped is
	// called.
	CheckStarted()
	CheckStopped()
}

// Watch sets the watcher. During a run, the watcher receives the state of the active driver.
func (a *Agent) Watch(w Watcher) { a.watcher = w }

// ErrNotLoaded is the error of [Agent.Monitor] when the active driver is no longer loaded.
var ErrNotLoaded = errors.New("the active driver is no longer loaded")

// ErrRollback is the error of [Agent.Monitor] when a noted rollback has become possible.
var ErrRollback = errors.New("the GPU is idle, so the rollback that waited for this is possible")

// The active driver counts as no longer loaded after this number of checks in a row and this time. Until then, another
// process may be replacing it.
const (
	notLoadedChecks = 3
	notLoadedTime   = 2 * time.Minute
)

// trustChecks is the number of checks after which [Agent.Monitor] reads the keys and the policy again.
const trustChecks = 10

// Monitor checks the driver at intervals until the context ends, and reports to the watcher. After a failed check, the
// last verdict ages. Monitor changes nothing but the description of GPUs for container runtimes, and the record of the
// driver's state. The modules stay loaded when Monitor ends. If another process unloaded the modules and does not load
// them again, Monitor returns [ErrNotLoaded]. If an operator rolled the driver back while it was in use, and the driver
// is no longer in use, Monitor returns [ErrRollback]. It does so only once, because a run that could not do the
// rollback need not be repeated at each check.
func (a *Agent) Monitor(ctx context.Context, every time.Duration, w Watcher) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	last := gpucheck.Ready
	if rec := a.readRecord(); rec != nil {
		last = rec.Verdict.State
	}
	missing, since := 0, time.Time{} // checks in a row that found the driver not loaded, and the time of the first
	distrust := ""                   // why the active driver would not be loaded now
	due := a.rollbackDue(ctx, false) // the last run could not do the rollback
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if n%trustChecks == 0 {
			distrust = a.checkTrust(ctx)
		}
		v, err := a.checkFor(ctx, w)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			w.Alive()
			a.parts.Log.WarnContext(ctx, "check failed", "err", err, "verdict", last)
			continue
		}
		if v.State != last {
			a.parts.Log.WarnContext(ctx, "verdict changed", "verdict", v.State, "was", last, "reason", v.Reason)
		}
		last = v.State
		a.describeGPUs(ctx, v)
		if distrust != "" {
			v.Reason = strings.TrimPrefix(v.Reason+"; "+distrust, "; ")
		}
		w.Report(v)
		w.Alive() // after the report, because Alive compares the age of the last verdict
		was := due
		if due = a.rollbackDue(ctx, was); due && !was {
			return ErrRollback
		}
		now := a.parts.Now()
		if !v.NotLoaded() {
			missing = 0
			continue
		}
		if missing++; missing == 1 {
			since = now
		}
		if missing >= notLoadedChecks && now.Sub(since) >= notLoadedTime {
			return ErrNotLoaded
		}
	}
}

// firstCheck is the time until the first check of the active driver during a step of a run. Most steps end before.
const firstCheck = 10 * time.Second

// whileWatching calls step, which may wait long for the network. Meanwhile whileWatching reports the state of the
// active driver to the watcher. If no driver is loaded, it only reports that the program is alive, because the step may
// compile a driver.
func (a *Agent) whileWatching(ctx context.Context, current *install.Set, step func()) {
	if a.watcher == nil || a.cfg.NoLoad {
		step()
		return
	}
	inner, cancel := context.WithCancel(ctx)
	var checks sync.WaitGroup
	checks.Go(func() {
		for pause := firstCheck; ; pause = idleCheck {
			select {
			case <-inner.Done():
				return
			case <-time.After(pause):
			}
			if mods, err := host.LoadedModules(a.node); current != nil && err == nil && len(mods) > 0 {
				a.reportWaiting(inner)
			} else {
				a.watcher.Alive()
			}
		}
	})
	step()
	cancel()
	checks.Wait() // the step that follows may unload the driver, so the check must be over
}

// checkTrust reads the keys and the policy again, and verifies the statements of the active driver with them. It
// returns the reason why the driver would not be loaded now, or "". A node that has its driver makes no run, so only
// checkTrust tells its owner that a key no longer counts. The loaded driver stays.
func (a *Agent) checkTrust(ctx context.Context) string {
	if a.parts.Reread == nil {
		return ""
	}
	defer footprint.Trim() // free what the statements needed
	a.reread(ctx)
	why, err := a.distrust()
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not verify the active driver's statements", "err", err)
	}
	if why == nil {
		return ""
	}
	return "it will not be loaded again: " + why.Error()
}

// reread reads the keys and the policy again. If that fails, the keys and the policy from before stay in use.
func (a *Agent) reread(ctx context.Context) {
	if a.parts.Reread == nil {
		return
	}
	if err := a.parts.Reread(); err != nil {
		a.parts.Log.WarnContext(ctx, "could not read the trusted keys again; the keys from before stay in use", "err", err)
	}
}

// distrust returns the reason why the statements of the active driver do not verify by the present keys and policy, or
// nil. It reads no file of the driver.
func (a *Agent) distrust() (why, err error) {
	store, err := a.openInstalled()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	set, err := store.Current()
	if err != nil || set == nil || set.Damaged {
		return nil, err
	}
	facts, err := host.Observe(a.node)
	if err != nil || fitsNode(set, facts) != nil {
		return nil, err
	}
	_, why = a.attestations(store, set, facts)
	return why, nil
}

// checkDriver returns a verdict on the driver that is active now.
func (a *Agent) checkDriver(ctx context.Context) (v gpucheck.Verdict, err error) {
	store, err := a.openInstalled()
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	set, err := store.Current()
	if err != nil {
		return v, err
	}
	if set == nil {
		return gpucheck.Verdict{State: gpucheck.Absent, Reason: "the installed driver was removed"}, nil
	}
	if v, err = a.validate(ctx, set, kmod.Mark{}, a.newXids()); err == nil {
		a.saveCheck(ctx, store, v)
	}
	return v, err
}

// Status is the state of a node, as its disk, /proc, the kernel log and NVML report it.
type Status struct {
	Host *host.Facts `json:"host"`
	// Installed is the active driver. Previous was active before it. null means none.
	Installed *install.Set     `json:"installed"`
	Previous  *install.Set     `json:"previous"`
	Verdict   gpucheck.Verdict `json:"verdict"`
	// CheckedAt is when the driver was checked for this verdict: in the last run, or in a later check that had another
	// result. null means that the driver was not checked in this boot.
	CheckedAt *time.Time `json:"checkedAt"`
}

// nvmlFolders are the folders in which Google's installer and NVIDIA's container toolkit put NVML's library. Elsewhere,
// the dynamic loader searches for it.
var nvmlFolders = []string{"/home/kubernetes/bin/nvidia", "/var/lib/nvidia", "/usr/local/nvidia"}

// judgeForeign returns the verdict on a node without an active driver of this program. It runs the probe of NVML only
// if ask is true.
func (a *Agent) judgeForeign(ctx context.Context, facts *host.Facts, modules map[string]string,
	ask bool) gpucheck.Verdict {
	if _, ok := modules["nvidia"]; !ok {
		return gpucheck.Verdict{
			State: gpucheck.Absent, Reason: "Prebake has installed no driver in " + a.cfg.InstallDir,
			PCIGPUs: len(facts.ManagedGPUs()),
			Modules: modules, NVML: gpucheck.NVML{Devices: []gpucheck.Device{}},
		}
	}
	library := path.Base(nvmlLibrary)
	for _, dir := range append([]string{a.cfg.InstallDir}, nvmlFolders...) {
		if _, err := fs.Stat(a.node, path.Join(dir, nvmlLibrary)[1:]); err == nil {
			library = path.Join(dir, nvmlLibrary)
			break
		}
	}
	f := gpucheck.Facts{Driver: facts.Driver, GPUs: addresses(facts), Modules: modules}
	if !ask {
		return gpucheck.JudgeForeign(f)
	}
	nvml, err := a.parts.Probe.Probe(ctx, library, false)
	if err == nil {
		f.NVML = nvml
	} else { // the driver may work although NVML could not be asked
		facts.Unread = append(facts.Unread, err.Error())
	}
	return gpucheck.JudgeForeign(f)
}

// Status reads the disk, /proc and the kernel log, and asks NVML about a foreign driver. It changes nothing and uses no
// network.
func (a *Agent) Status(ctx context.Context) (*Status, error) { return a.status(ctx, true) }

// status reads the node's state. It asks NVML about a foreign driver only if ask is true.
func (a *Agent) status(ctx context.Context, ask bool) (_ *Status, err error) {
	facts, err := host.Observe(a.node)
	if err != nil {
		return nil, err
	}
	if len(facts.Modules) > 0 {
		if facts.Users, err = host.DeviceUsers(a.node); err != nil {
			facts.Unread = append(facts.Unread, err.Error())
		}
	}
	s := &Status{Host: facts}
	modules := map[string]string{}
	for _, m := range facts.Modules {
		modules[m.Name] = m.Version
	}
	store, err := a.openInstalled()
	if errors.Is(err, fs.ErrNotExist) {
		s.Verdict = a.judgeForeign(ctx, facts, modules, ask)
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if s.Installed, err = store.Current(); err != nil {
		return nil, err
	}
	if s.Previous, err = store.Previous(); err != nil {
		return nil, err
	}
	if s.Installed == nil {
		s.Verdict = a.judgeForeign(ctx, facts, modules, ask)
		return s, nil
	}
	f := gpucheck.Facts{Driver: s.Installed.Driver, Digest: s.Installed.Digest, GPUs: addresses(facts), Modules: modules,
		Foreign: foreign(facts, s.Installed)}
	staged := false
	if rec := a.readRecord(); rec != nil && rec.Verdict.Digest == s.Installed.Digest {
		f.NVML, f.NVRM, s.CheckedAt = rec.Verdict.NVML, rec.Verdict.NVRM, &rec.At
		f.CUDA = rec.Verdict.CUDA
		f.Since = a.xidsSince(rec.xidRecord)
		staged = rec.Verdict.State == gpucheck.Staged && len(facts.Modules) == 0
	}
	s.Verdict = judgeStatus(f, facts, s.Installed, staged)
	return s, nil
}

// QuickVerdict returns a verdict from the disk and the kernel alone. The result ok is false for a ready driver, because
// NVML was not asked.
func (a *Agent) QuickVerdict(ctx context.Context) (v gpucheck.Verdict, ok bool) {
	s, err := a.status(ctx, false)
	if err != nil {
		a.parts.Log.WarnContext(ctx, "could not read the state of the node", "err", err)
		return v, false
	}
	return s.Verdict, s.Verdict.State != gpucheck.Ready
}

// judgeStatus judges the facts, and compares the installed driver with the kernel and the loaded driver.
func judgeStatus(f gpucheck.Facts, facts *host.Facts, set *install.Set, staged bool) gpucheck.Verdict {
	v := gpucheck.Judge(f)
	switch {
	case set.Kernel.BuildID != facts.Kernel.BuildID || set.Kernel.Board != facts.Kernel.Board:
		v.State, v.Reason = gpucheck.Drifted, fmt.Sprintf("installed for COS %s; this node runs %s", set.Kernel, facts.Kernel)
	case facts.Driver != (target.Driver{}) && !facts.Runs(set.Driver):
		v.State, v.Reason = gpucheck.Drifted,
			fmt.Sprintf("driver %s is loaded; driver %s is installed", facts.Driver, set.Driver)
	case staged:
		v.State, v.Reason = gpucheck.Staged, "installed, and by request not loaded"
	}
	return v
}

// readRecord returns the record of the last run in this boot, or nil.
func (a *Agent) readRecord() *record {
	rec := a.lastRecord()
	if rec == nil || rec.BootID != a.bootID() {
		return nil
	}
	return rec
}

// lastRecord returns the record of the last run in any boot, or nil.
func (a *Agent) lastRecord() *record {
	raw, err := fs.ReadFile(a.node, path.Join(a.cfg.InstallDir, recordFile)[1:])
	if err != nil {
		return nil
	}
	var rec record
	if json.Unmarshal(raw, &rec) != nil {
		return nil
	}
	return &rec
}

// Rollback makes the previous driver active and loads it. Without a previous driver, it unloads the present one, and
// restores the install folder's content from before this program.
func (a *Agent) Rollback(ctx context.Context) (r *Report, err error) {
	r = &Report{DryRun: a.cfg.DryRun, Plan: []string{}, Modules: []kmod.Outcome{}}
	a.forget()
	defer func() { r.Phases = a.parts.Line.Phases() }()
	facts, err := a.observe(r)
	if err != nil {
		return r, err
	}
	store, err := a.openInstalled()
	if err != nil {
		return r, nothingInstalled(err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if !a.cfg.DryRun {
		unlock, lockErr := store.Lock(googleLock)
		if lockErr != nil {
			return r, nothingInstalled(lockErr)
		}
		defer func() { err = errors.Join(err, unlock()) }()
	}
	if !a.cfg.DryRun {
		if err := a.recover(ctx, r, store); err != nil {
			return r, err
		}
	}
	s, err := a.readState(ctx, store)
	if err == nil && s.current == nil {
		err = nothingInstalled(fs.ErrNotExist)
	}
	if err != nil {
		return r, err
	}
	current, previous := s.current, s.previous
	if previous == nil {
		if a.cfg.DryRun {
			r.did("remove %s from %s", current.Driver, a.cfg.InstallDir)
			return r, nil
		}
		return r, a.withdraw(ctx, r, store, s)
	}
	r.Answer = keptAnswer(previous)
	if err := firstOf(fitsNode(previous, facts), s.refused(previous)); err != nil {
		return r, fmt.Errorf("roll back to the previous driver: %w", err)
	}
	d := s.put(previous)
	for end := a.parts.Now().Add(probeWait); d.set == nil && s.onlyProbeUses() && !a.cfg.DryRun; d = s.put(previous) {
		if !a.pauseUntil(ctx, end) {
			break
		}
		if s, err = a.readState(ctx, store); err != nil {
			return r, err
		}
	}
	switch {
	case d.set == nil && fault.Is(d.err, fault.Busy) && !a.cfg.DryRun:
		if _, err := a.verifySet(ctx, store, previous, facts); err != nil { // the rollback would wait for ever
			return r, fmt.Errorf("roll back to the previous driver: %w", err)
		}
		return r, a.rollbackLater(r, store, current, previous, d.err)
	case d.set == nil:
		return r, d.err
	case a.cfg.DryRun:
		r.did("switch %s back to %s", a.cfg.InstallDir, short(previous.Digest))
		a.plan(r, s, d)
		return r, nil
	}
	// The agent must not activate the former driver again until an operator asks for it. Note that first: if this run is
	// killed, the next one completes the rollback.
	if err := a.note(store, current.Digest, func(at *attempt) { at.ByHand = true }); err != nil {
		return r, fmt.Errorf("record that a rollback is wanted: %w", err)
	}
	err = a.activate(ctx, r, store, s, d)
	if now, cerr := store.Current(); cerr == nil && now != nil && now.Digest == previous.Digest {
		a.addHistory(ctx, store, eventRolledBack, current, "", nil)
		return r, err
	}
	return r, errors.Join(err, a.setAttempt(store, current.Digest, s.attempts[current.Digest]))
}

// withdraw removes the only driver from the install folder, and unloads it. A foreign driver stays loaded.
func (a *Agent) withdraw(ctx context.Context, r *Report, store *install.Store, s nodeState) error {
	facts := s.facts
	if !a.cfg.NoLoad && len(facts.Modules) > 0 && s.ownLoaded() {
		if err := idle(facts); err != nil {
			return err
		}
		if err := a.unload(ctx, r, facts); err != nil {
			return err
		}
	}
	r.Changed = true
	r.Verdict = gpucheck.Verdict{State: gpucheck.Absent, PCIGPUs: len(facts.ManagedGPUs()),
		Reason:  "the driver was rolled back, and there is no previous driver",
		Modules: map[string]string{}}
	err := store.Restore(install.Pointers{})
	if err == nil {
		r.did("remove %s from %s", s.current.Driver, a.cfg.InstallDir)
	}
	err = errors.Join(err, store.Sweep())
	a.hideLibraries(ctx, addedLibraries(store))
	a.describeGPUs(ctx, r.Verdict)
	return errors.Join(err, store.RemoveFile(ldFile))
}

func nothingInstalled(err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fault.New(fault.NoArtifact, "no driver that Prebake installed is active", "install a driver: fetcher install")
}

func keptAnswer(s *install.Set) resolve.Answer {
	return resolve.Answer{State: api.Published, Driver: s.Driver, Digest: s.Digest, Repository: s.Repository,
		Source: resolve.SourceInstalled}
}
