package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

// loaded are the modules that the agent loads on every node. Tools of special hardware load others, such as
// nvidia-peermem. The agent loads those only if it has parameters for them.
var loaded = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"}

// optional has those modules of the list [loaded] that CUDA programs do not need.
var optional = []string{"nvidia-modeset", "nvidia-drm"}

func isLoaded(module string) bool { return slices.Contains(loaded, module) }

// activate makes the decision's driver the active one, loads it and checks it. It restores the former driver if the
// load fails, or if fewer GPUs work than before.
func (a *Agent) activate(ctx context.Context, r *Report, store *install.Store, s nodeState, d decision) error {
	// A cancelled ctx must not stop an activation halfway.
	ctx = context.WithoutCancel(ctx)
	before, set := s.current, d.set
	pointers, err := store.Pointers()
	if err != nil {
		return err
	}
	begun := false
	if at := s.attempts[set.Digest]; at != nil && at.Open { // left by a run that was killed
		if a.uncounted != nil && at.BootID != a.bootID() {
			return fmt.Errorf("load driver %s again: its last load took the node down, and fetcher cannot record this crash: %w",
				set.Driver, a.uncounted)
		}
		if set, err := store.SetAt(at.Before.Current); err == nil && set != nil {
			before, pointers, begun = set, at.Before, true
		}
	} else if at != nil && at.lacksForeign(s, a.bootID()) {
		before, pointers = nil, at.Before
		facts := *s.facts // the firmware path before the killed run
		facts.FirmwarePath = at.Firmware
		s.facts = &facts
	}
	changed := before == nil || before.Digest != set.Digest
	// If the driver was loaded before this activation, an error says nothing about the driver.
	loadedBefore := d.do == keep && !changed && !begun
	r.Changed, r.Verdict = changed, gpucheck.Verdict{}
	set, missing, err := a.verifyFor(ctx, store, s, d, changed)
	if err != nil {
		r.Changed = false
		return err
	}
	d.set = set
	was := a.findBefore(ctx, store, s, d, before)
	defer was.close()
	if (changed || d.do != keep) && !begun {
		if err := a.begin(store, set.Digest, pointers, was, s.facts.FirmwarePath); err != nil && changed {
			return err
		} else if err != nil { // a full disk must not leave the node without a driver
			a.parts.Log.WarnContext(ctx, "could not record this activation", "err", err)
		}
	}
	err = a.parts.Line.Do("install", func() (string, error) {
		// Allow exec before the device files exist, because they signal a usable driver.
		did, err := store.EnsureExec(func() {
			if err := store.WriteFile(execFile, []byte(a.bootID())); err != nil {
				a.parts.Log.WarnContext(ctx, "could not record the mount of the install folder", "err", err)
			}
		})
		if err != nil {
			return "", err
		}
		if did {
			r.did("mount %s with exec", a.cfg.InstallDir)
		}
		if err := errors.Join(store.Switch(set.Digest), store.WriteCacheFile(*set)); err != nil && changed {
			return "", errors.Join(err, restore(store, pointers, before))
		} else if err != nil {
			a.parts.Log.WarnContext(ctx, "could not correct the links of the installed driver", "err", err)
		}
		if !changed {
			return "already active", nil
		}
		r.did("switch %s to %s", a.cfg.InstallDir, short(set.Digest))
		return short(set.Digest) + " is active", nil
	})
	if err != nil {
		r.Changed = false
		return errors.Join(err, a.end(store, set.Digest, err, !loadedBefore))
	}
	undo := revertPlan{set: set, before: before, to: pointers, changed: changed, foreign: was, blame: !loadedBefore}
	mark := a.loader.Mark()
	if !a.cfg.NoLoad && !missing {
		err = a.parts.Line.Do("load", func() (string, error) { return a.load(ctx, r, store, s.facts, d) })
		if err != nil && !(fault.Is(err, fault.NoDevice) && len(s.facts.ManagedGPUs()) == 0) {
			return a.revert(ctx, r, store, s, undo, err)
		}
	}
	err = a.parts.Line.Do("validate", func() (string, error) {
		if d.do != keep { // GPU errors from before the load no longer count
			a.xids = xidWatch{begun: true, mark: mark}
		}
		if r.Verdict, err = a.validate(ctx, set, mark, a.newXids()); err != nil {
			return "", err
		}
		return string(r.Verdict.State), nil
	})
	if err == nil && r.Verdict.State == gpucheck.Unusable && !r.Verdict.OnlyReset && changed && s.returnTo(before) &&
		a.served(before, r.Verdict) {
		err = r.Verdict.Err()
	}
	if err != nil && changed {
		return a.revert(ctx, r, store, s, undo, err)
	}
	if err != nil { // the probe did not answer, which says nothing about a driver that was active before
		return errors.Join(err, a.end(store, set.Digest, err, false))
	}
	a.describeGPUs(ctx, r.Verdict)
	a.notePersistence(r)
	if changed || d.do != keep {
		a.addHistory(ctx, store, eventInForce, set, string(r.Verdict.State), r.Verdict.Err())
	}
	err = r.Verdict.Err()
	switch {
	case loadedBefore && s.waitsForRollback(): // the rollback still waits
	case s.onlyRolledBack(set): // this rollback waits too, because no other driver could be loaded
		err = errors.Join(err, a.end(store, set.Digest, s.refused(set), false))
	default:
		err = errors.Join(err, a.end(store, set.Digest, nil, false))
	}
	// Write these after end, which may free space on a full disk.
	err = errors.Join(err, a.countSuspects(store, r.Verdict), a.remember(r, store, r.Verdict, a.paramsNow(r)))
	if changed || d.do != keep { // last, because no other step needs the node's ld.so cache
		a.exposeLibraries(ctx, store)
	}
	// With --no-load, nobody checks the driver, but a new one was verified.
	if r.Verdict.State == gpucheck.Ready || r.Verdict.State == gpucheck.Staged && changed {
		a.removeAside(ctx, store)
	}
	return err
}

// removeAside removes the files and folders that earlier runs found in place of a link in .prebake and moved aside. The
// driver works without them.
func (a *Agent) removeAside(ctx context.Context, store *install.Store) {
	if len(a.aside) == 0 {
		return
	}
	if err := store.RemoveAside(a.aside); err != nil { // the next run tries again
		a.parts.Log.WarnContext(ctx, "could not remove all of .prebake/adopted", "names", a.aside, "err", err)
		return
	}
	a.parts.Log.InfoContext(ctx, "removed files of others, which an earlier run had moved into .prebake/adopted",
		"names", a.aside)
	a.aside = nil
}

// verifyFor verifies the driver's files before activate switches to the driver or loads modules. The result missing
// means that the driver runs, but that its unloaded modules do not verify and must not be loaded.
func (a *Agent) verifyFor(ctx context.Context, store *install.Store, s nodeState, d decision,
	changed bool) (set *install.Set, missing bool, err error) {
	if changed || d.do != keep {
		set, err = a.verifySet(ctx, store, d.set, s.facts)
		return set, false, err
	}
	if a.cfg.NoLoad || !s.lacks(d.set) { // the attestations of loaded modules are not verified again
		return d.set, false, nil
	}
	if set, err = a.verifySet(ctx, store, d.set, s.facts, bundle.LayerModules); err == nil || s.incomplete() {
		return set, false, err
	}
	a.parts.Log.WarnContext(ctx, "modules that are not loaded yet failed verification", "err", err)
	return d.set, true, nil
}

// findBefore ensures that the driver to be unloaded can be loaded again. If this program cannot verify that driver,
// findBefore opens the files of its modules.
func (a *Agent) findBefore(ctx context.Context, store *install.Store, s nodeState, d decision,
	before *install.Set) *foreignFiles {
	if d.do != replace {
		// A killed run may have unloaded a foreign driver without loading a new one.
		if at := s.attempts[d.set.Digest]; at != nil && at.lacksForeign(s, a.bootID()) {
			return a.findForeign(s.facts, at.ForeignDriver, at.Foreign)
		}
		return &foreignFiles{}
	}
	if before != nil && s.runs(before) {
		_, err := a.verifySet(ctx, store, before, s.facts)
		if err == nil {
			return &foreignFiles{}
		}
		a.parts.Log.WarnContext(ctx, "the active driver failed verification; looking for its files by build id", "err",
			err)
	}
	return a.findForeign(s.facts, s.facts.Driver.String(), s.facts.Modules)
}

// served reports whether more GPUs worked with the former driver than work now. If not, a rollback to the former driver
// is useless. If the last check of the former driver was in this boot, that check decides. Otherwise the largest number
// of GPUs that worked in the boot of that check decides, because the reboot may have repaired a GPU.
func (a *Agent) served(set *install.Set, now gpucheck.Verdict) bool {
	rec := a.lastRecord()
	if rec == nil || rec.Verdict.Digest != set.Digest {
		return false
	}
	if rec.BootID != a.bootID() {
		return rec.mostUsable() > now.UsableGPUs
	}
	return rec.Verdict.UsableGPUs > now.UsableGPUs
}

// returnTo reports whether the agent can activate the former driver again. A driver that an operator rolled back while
// it was in use is better than none.
func (s nodeState) returnTo(before *install.Set) bool {
	return before != nil && !s.noLoad && fitsNode(before, s.facts) == nil &&
		(s.refused(before) == nil || s.waitsForRollback())
}

// restore makes the former driver active again. If before is nil, no driver was active.
func restore(store *install.Store, to install.Pointers, before *install.Set) error {
	err := store.Restore(to)
	if before != nil {
		err = errors.Join(err, store.WriteCacheFile(*before))
	}
	return err
}

// lacks reports whether a module that the agent should load for this driver is not in the kernel.
func (s nodeState) lacks(set *install.Set) bool {
	return slices.ContainsFunc(set.Modules, func(m install.Module) bool {
		return isLoaded(m.Name) &&
			!slices.ContainsFunc(s.facts.Modules, func(have host.Module) bool { return have.Name == modinfo.Canonical(m.Name) })
	})
}

// nvmlLibrary is the path of NVML's library below the install folder.
const nvmlLibrary = "lib64/libnvidia-ml.so.1"

// validate checks the loaded driver and returns the verdict. The kernel log is read from the given mark. The given Xid
// lines count against the driver.
func (a *Agent) validate(ctx context.Context, set *install.Set, mark kmod.Mark, xids []string) (gpucheck.Verdict,
	error) {
	facts, err := host.Observe(a.node)
	if err != nil {
		return gpucheck.Verdict{}, err
	}
	f := gpucheck.Facts{Driver: set.Driver, Digest: set.Digest, GPUs: addresses(facts), Modules: map[string]string{},
		Foreign: foreign(facts, set)}
	for _, m := range facts.Modules {
		f.Modules[m.Name] = m.Version
	}
	if a.cfg.NoLoad {
		v := gpucheck.Judge(f)
		v.State, v.Reason = gpucheck.Staged, "installed; loading was turned off (--no-load)"
		return v, nil
	}
	if _, ok := f.Modules["nvidia"]; ok {
		if f.NVML, err = a.parts.Probe.Probe(ctx, path.Join(a.cfg.InstallDir, nvmlLibrary), a.cfg.Persistence); err != nil {
			return gpucheck.Verdict{}, err
		}
		a.xids.compare(f.NVML)
	}
	f.Since = xids
	v := a.judgeDriver(ctx, set, f, facts)
	if ctx.Err() != nil { // the answer of CUDA may be missing
		return gpucheck.Verdict{}, context.Cause(ctx)
	}
	v.NVRM = kmod.NVRM(a.loader.Since(mark), 8) // with what the driver logged about CUDA
	if v.State == gpucheck.Ready {
		v.Reason = cmp.Or(a.xids.note, v.Reason)
	}
	return v, nil
}

// notePersistence reports GPUs without persistence mode, if the owner wants this mode.
func (a *Agent) notePersistence(r *Report) {
	for _, d := range r.Verdict.NVML.Devices {
		if a.cfg.Persistence && d.Error == "" && d.Persistence != "on" {
			r.Waiting = append(r.Waiting,
				fmt.Sprintf("persistence mode of GPU %s: %s", d.PCIBusID, cmp.Or(d.Persistence, "the GPU does not report it")))
		}
	}
}

// addresses returns the PCI addresses of the GPUs that the driver must drive.
func addresses(facts *host.Facts) []string {
	var all []string
	for _, g := range facts.ManagedGPUs() {
		all = append(all, g.Address)
	}
	return all
}

// foreign returns the names of the loaded modules whose build id differs from the installed file.
func foreign(facts *host.Facts, set *install.Set) []string {
	var names []string
	for _, m := range facts.Modules {
		i := slices.IndexFunc(set.Modules, func(own install.Module) bool { return modinfo.Canonical(own.Name) == m.Name })
		if i >= 0 && m.BuildID != "" && set.Modules[i].BuildID != "" && m.BuildID != set.Modules[i].BuildID {
			names = append(names, m.Name)
		}
	}
	return names
}

// record is the result of a run, or of a later check with another result. fetcher status reads it.
type record struct {
	Verdict gpucheck.Verdict `json:"verdict"`
	At      time.Time        `json:"at"`
	BootID  string           `json:"bootId"`
	// MostUsableGPUs is the largest number of usable GPUs in former verdicts on the same driver in the same boot.
	MostUsableGPUs int `json:"mostUsableGPUs,omitempty"`
	// Params are the module parameters with which the driver was loaded.
	Params map[string]string `json:"moduleParams,omitempty"`
	xidRecord
}

// mostUsable returns the largest number of usable GPUs in all verdicts on the driver in the record's boot.
func (rec *record) mostUsable() int { return max(rec.MostUsableGPUs, rec.Verdict.UsableGPUs) }

// execFile has the id of the boot in which this program mounted the install folder with exec.
const execFile = ".prebake/exec-mount"

const recordFile = ".prebake/verdict.json"

// recordSize is the space for recordFile, in bytes, that is reserved on the disk. A record of 16 GPUs needs less.
const recordSize = 32 << 10

// paramsNow returns the module parameters with which the driver of the verdict in r is loaded. If it was loaded before
// this activation, it keeps its parameters.
func (a *Agent) paramsNow(r *Report) map[string]string {
	fresh := slices.ContainsFunc(r.Modules,
		func(o kmod.Outcome) bool { return o.Name == "nvidia" && o.Was == kmod.Loaded })
	if _, ok := r.Verdict.Modules["nvidia"]; ok && !fresh {
		return a.paramsBefore(r.Verdict.Driver)
	}
	return a.cfg.ModuleParams
}

// paramsWait is a text of [Report].Waiting.
const paramsWait = "the changed module parameters (--module-param) take effect when the driver is loaded again, " +
	"after a reboot"

// remember records a verdict, and the module parameters with which the driver is loaded. If the owner wants others, the
// report says so.
func (a *Agent) remember(r *Report, store *install.Store, v gpucheck.Verdict, params map[string]string) error {
	rec := record{Verdict: v, At: a.parts.Now().UTC(), BootID: a.bootID(), Params: params,
		xidRecord: a.xids.record(a.xids.lines)}
	if last := a.readRecord(); last != nil && last.Verdict.Digest == v.Digest {
		rec.MostUsableGPUs = last.mostUsable()
	}
	if !maps.Equal(params, a.cfg.ModuleParams) && !slices.Contains(r.Waiting, paramsWait) {
		r.Waiting = append(r.Waiting, paramsWait)
	}
	if err := writeRecord(store, rec); err != nil {
		return err
	}
	a.xids.unsaved = false
	return nil
}

func writeRecord(store *install.Store, rec record) error {
	raw, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return err
	}
	return store.WriteReserved(recordFile, append(raw, '\n'), recordSize)
}

// bootID returns the id of the present boot, or "" if the kernel does not report one.
func (a *Agent) bootID() string {
	raw, err := fs.ReadFile(a.node, "proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}
