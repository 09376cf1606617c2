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

// loaded are the modules that the agent loads; the others of a set are for
// hardware that has its own tools.
var loaded = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"}

// optional are those of them without which CUDA programs run all the same.
var optional = []string{"nvidia-modeset", "nvidia-drm"}

func isLoaded(module string) bool { return slices.Contains(loaded, module) }

// activate does what was decided: it puts a staged set in force, loads it and checks
// the result. When it cannot be loaded, or fewer GPUs work with it than with the one
// before, files and modules are again what they were.
func (a *Agent) activate(ctx context.Context, r *Report, store *install.Store, s nodeState, d decision) error {
	// Once it has begun it ends by itself, in a time that the kernel and the probe bound.
	ctx = context.WithoutCancel(ctx)
	before, set := s.current, d.set
	pointers, err := store.Pointers()
	if err != nil {
		return err
	}
	begun := false
	if at := s.attempts[set.Digest]; at != nil && at.Open { // by a run that was killed
		if set, err := store.SetAt(at.Before.Current); err == nil && set != nil {
			before, pointers, begun = set, at.Before, true
		}
	} else if at != nil && at.lacksForeign(s, a.bootID()) {
		before, pointers = nil, at.Before
		facts := *s.facts // where firmware was before the run that was killed
		facts.FirmwarePath = at.Firmware
		s.facts = &facts
	}
	changed := before == nil || before.Digest != set.Digest
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
		} else if err != nil { // a full disk is no reason to stay without a driver
			a.parts.Log.WarnContext(ctx, "record attempt", "err", err)
		}
	}
	err = a.parts.Line.Do("install", func() (string, error) {
		// Libraries on a filesystem without exec are of no use to anybody, so
		// that is mended before any device file says that the driver is ready.
		did, err := store.EnsureExec(func() {
			if err := store.WriteFile(execFile, []byte(a.bootID())); err != nil {
				a.parts.Log.WarnContext(ctx, "record mount", "err", err)
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
			a.parts.Log.WarnContext(ctx, "put links in order", "err", err)
		}
		if !changed {
			return "already in force", nil
		}
		r.did("switch %s to %s", a.cfg.InstallDir, short(set.Digest))
		return short(set.Digest) + " in force", nil
	})
	if err != nil {
		r.Changed = false
		return errors.Join(err, a.end(store, set.Digest, err))
	}
	undo := revertPlan{set: set, before: before, to: pointers, changed: changed, foreign: was}
	mark := a.loader.Mark()
	if !a.cfg.NoLoad && !missing {
		err = a.parts.Line.Do("load", func() (string, error) { return a.load(ctx, r, store, s.facts, d) })
		if err != nil && !(fault.Is(err, fault.NoDevice) && len(s.facts.ManagedGPUs()) == 0) {
			return a.revert(ctx, r, store, s, undo, err)
		}
	}
	err = a.parts.Line.Do("validate", func() (string, error) {
		if d.do != keep { // what befell the driver before is over
			a.xids = xidWatch{mark: mark}
		}
		if r.Verdict, err = a.validate(ctx, set, mark, a.newXids()); err != nil {
			return "", err
		}
		return string(r.Verdict.State), nil
	})
	if err == nil && r.Verdict.State == gpucheck.Unusable && changed && s.returnTo(before) && a.served(before, r.Verdict) {
		err = r.Verdict.Err()
	}
	if err != nil && changed {
		return a.revert(ctx, r, store, s, undo, err)
	}
	if err != nil {
		return errors.Join(err, a.end(store, set.Digest, err))
	}
	a.describeGPUs(ctx, r.Verdict)
	a.notePersistence(r)
	if changed || d.do != keep {
		a.addHistory(ctx, store, eventInForce, set, string(r.Verdict.State), r.Verdict.Err())
	}
	err = errors.Join(r.Verdict.Err(), a.end(store, set.Digest, nil), a.remember(r, store, r.Verdict))
	if changed || d.do != keep { // the node's own programs come last, and nothing waits for them
		a.exposeLibraries(ctx, store)
	}
	return err
}

// verifyFor verifies what is going to be switched to or loaded. missing says that modules
// which could be loaded, too, do not hold: the driver serves without them.
func (a *Agent) verifyFor(ctx context.Context, store *install.Store, s nodeState, d decision,
	changed bool) (set *install.Set, missing bool, err error) {
	if changed || d.do != keep {
		set, err = a.verifySet(ctx, store, d.set, s.facts)
		return set, false, err
	}
	if a.cfg.NoLoad || !s.lacks(d.set) { // what is loaded does not have its attestations checked again
		return d.set, false, nil
	}
	if set, err = a.verifySet(ctx, store, d.set, s.facts, bundle.LayerModules); err == nil || s.incomplete() {
		return set, false, err
	}
	a.parts.Log.WarnContext(ctx, "other modules of the set do not verify", "err", err)
	return d.set, true, nil
}

// findBefore makes sure that what is to be unloaded can be loaded again: a set of ours that verifies needs nothing, and
// of any other driver the files are found and kept open.
func (a *Agent) findBefore(ctx context.Context, store *install.Store, s nodeState, d decision,
	before *install.Set) *foreignFiles {
	if d.do != replace {
		// A run that was killed may have unloaded one, and loaded nothing.
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
		a.parts.Log.WarnContext(ctx, "the driver in force does not verify; its files are found by their build ids", "err",
			err)
	}
	return a.findForeign(s.facts, s.facts.Driver.String(), s.facts.Modules)
}

// served reports whether more GPUs worked with a set at the last look than do now. Where no more did, a rollback to it
// does not help.
func (a *Agent) served(set *install.Set, now gpucheck.Verdict) bool {
	rec := a.lastRecord()
	return rec != nil && rec.Verdict.Digest == set.Digest && rec.Verdict.UsableGPUs > now.UsableGPUs
}

// returnTo reports whether there is a set to go back to.
func (s nodeState) returnTo(before *install.Set) bool {
	return before != nil && !s.noLoad && fitsNode(before, s.facts) == nil && s.refused(before) == nil
}

// restore restores the files that were in force before.
func restore(store *install.Store, to install.Pointers, before *install.Set) error {
	err := store.Restore(to)
	if before != nil {
		err = errors.Join(err, store.WriteCacheFile(*before))
	}
	return err
}

// revertPlan is what is to be undone, and what is to be again.
type revertPlan struct {
	set, before *install.Set
	to          install.Pointers
	changed     bool
	foreign     *foreignFiles // what was unloaded
}

// revert restores files and modules after a set that could not be loaded or used.
// Modules that do not leave the kernel keep their files. cause stays the error; what
// cannot be restored is added to it.
func (a *Agent) revert(ctx context.Context, r *Report, store *install.Store, s nodeState, t revertPlan,
	cause error) error {
	before := t.before
	if fault.Is(cause, fault.NoDevice) {
		// The driver found no device although the bus has one.
		cause = fault.Wrap(fault.Unusable, fmt.Errorf("GPU present but not usable: %w", cause),
			"check that this driver version and flavour support the GPU: --flavour, --driver")
	}
	// Modules of somebody else's that were adopted are not ours to unload.
	may := len(s.facts.Modules) == 0 || s.ownLoaded() || s.replaceForeign
	reload := may && s.returnTo(before) && (t.changed || s.facts.Runs(before.Driver))
	var errs []error
	if reload {
		if err := a.unloadOf(ctx, r, t.set, before); err != nil {
			return fmt.Errorf("%w; and then: %w", cause,
				errors.Join(fmt.Errorf("it stays in force: %w", err), a.end(store, t.set.Digest, cause)))
		}
	}
	if t.changed {
		if err := restore(store, t.to, before); err != nil {
			errs = append(errs, fmt.Errorf("roll back install: %w", err))
		} else {
			r.Changed = false
			r.did("rolled the install back")
		}
	}
	errs = append(errs, a.restoreFirmwarePath(s.facts))
	r.Verdict = gpucheck.Verdict{}
	if !t.foreign.stillRuns(a) {
		if err := t.foreign.reload(ctx, a, r); err != nil {
			errs = append(errs, err)
		} else {
			reload = false
		}
	}
	if reload {
		proved, err := a.verifySet(ctx, store, before, s.facts)
		if reload = err == nil; reload {
			before = proved
		} else {
			errs = append(errs, err)
		}
	}
	if reload {
		mark := a.loader.Mark()
		if _, err := a.loader.Load(ctx, a.images(store, before, s.facts, a.paramsBefore())); err != nil {
			errs = append(errs, fmt.Errorf("load %s again: %w", before.Driver, err))
		} else {
			r.did("loaded %s again", before.Driver)
			errs = append(errs, a.makeNodes())
			a.xids = xidWatch{mark: mark}
			if v, err := a.validate(ctx, before, mark, a.newXids()); err != nil {
				errs = append(errs, err)
			} else {
				r.Verdict = v
				errs = append(errs, a.remember(r, store, v))
			}
		}
	}
	a.describeGPUs(ctx, r.Verdict)
	errs = append(errs, a.end(store, t.set.Digest, cause))
	a.addHistory(ctx, store, eventReverted, t.set, string(r.Verdict.State), cause)
	if lost := errors.Join(errs...); lost != nil {
		return fmt.Errorf("%w; and then: %w", cause, lost)
	}
	return cause
}

// paramsBefore are the parameters with which the driver before was loaded.
func (a *Agent) paramsBefore() map[string]string {
	if rec := a.readRecord(); rec != nil {
		return rec.Params
	}
	return a.cfg.ModuleParams
}

// stillRuns reports whether all of them are loaded.
func (f *foreignFiles) stillRuns(a *Agent) bool {
	now, err := host.LoadedModules(a.node)
	if err != nil {
		return true // nothing is known to be missing
	}
	for _, m := range f.modules {
		if !slices.ContainsFunc(now,
			func(have host.Module) bool { return have.Name == m.Name && have.BuildID == m.BuildID }) {
			return false
		}
	}
	return true
}

// lacks reports whether a module of a set that nodes load is not in the kernel.
func (s nodeState) lacks(set *install.Set) bool {
	return slices.ContainsFunc(set.Modules, func(m install.Module) bool {
		return isLoaded(m.Name) &&
			!slices.ContainsFunc(s.facts.Modules, func(have host.Module) bool { return have.Name == modinfo.Canonical(m.Name) })
	})
}

// unloadOf unloads what is loaded of a set that did not do.
func (a *Agent) unloadOf(ctx context.Context, r *Report, set, before *install.Set) error {
	facts, err := host.Observe(a.node)
	if err != nil || len(facts.Modules) == 0 || before.Digest == set.Digest || !(nodeState{facts: facts}).runs(set) {
		return err
	}
	if err := idle(facts); err != nil {
		return err
	}
	return a.unload(ctx, r, facts)
}

// nvmlLibrary is where an installed driver has it.
const nvmlLibrary = "lib64/libnvidia-ml.so.1"

// xidWatch are the errors of GPUs that the kernel told of since this program loaded the
// driver, or first looked at it, and how far its log was read.
type xidWatch struct {
	mark  kmod.Mark
	lines []string
}

// maxXids bounds them. A GPU that fails writes many, of which the first counts.
const maxXids = 512

// newXids reads on, and returns all.
func (a *Agent) newXids() []string {
	lines, end := a.loader.Follow(a.xids.mark)
	a.xids.mark = end
	for _, line := range lines {
		if gpucheck.Significant(line) && len(a.xids.lines) < maxXids {
			a.xids.lines = append(a.xids.lines, line)
		}
	}
	return a.xids.lines
}

// validate examines what there is now. xids are the errors of GPUs that count.
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
	}
	f.NVRM = kmod.NVRM(a.loader.Since(mark), 8)
	f.Since = xids
	return gpucheck.Judge(f), nil
}

// notePersistence tells of GPUs that do not stay initialised although they should.
func (a *Agent) notePersistence(r *Report) {
	for _, d := range r.Verdict.NVML.Devices {
		if a.cfg.Persistence && d.Error == "" && d.Persistence != "on" {
			r.Waiting = append(r.Waiting,
				fmt.Sprintf("persistence mode of GPU %s: %s", d.PCIBusID, cmp.Or(d.Persistence, "it does not tell")))
		}
	}
}

// addresses are the PCI addresses of the GPUs that the driver is to drive.
func addresses(facts *host.Facts) []string {
	var all []string
	for _, g := range facts.ManagedGPUs() {
		all = append(all, g.Address)
	}
	return all
}

// foreign lists the loaded modules whose build id is not the installed file's.
// They keep working, and after the next boot the installed ones are loaded.
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

// record is what a run leaves for fetcher status.
type record struct {
	Verdict gpucheck.Verdict `json:"verdict"`
	At      time.Time        `json:"at"`
	BootID  string           `json:"bootId"`
	// Params are the module parameters with which the driver was loaded.
	Params map[string]string `json:"moduleParams,omitempty"`
}

// execFile notes the boot in which the install folder was mounted with exec.
const execFile = ".prebake/exec-mount"

const recordFile = ".prebake/verdict.json"

func (a *Agent) remember(r *Report, store *install.Store, v gpucheck.Verdict) error {
	rec := record{Verdict: v, At: a.parts.Now().UTC(), BootID: a.bootID(), Params: a.cfg.ModuleParams}
	// Parameters count when a module is loaded. Those of one that was loaded before stay.
	fresh := slices.ContainsFunc(r.Modules,
		func(o kmod.Outcome) bool { return o.Name == "nvidia" && o.Was == kmod.Loaded })
	if last := a.readRecord(); last != nil && !fresh && len(r.Modules) > 0 {
		if rec.Params = last.Params; !maps.Equal(rec.Params, a.cfg.ModuleParams) {
			r.Waiting = append(r.Waiting,
				"other module parameters than those with which the driver was loaded: they count when it is loaded again, after "+
					"a reboot")
		}
	}
	raw, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return err
	}
	return store.WriteFile(recordFile, append(raw, '\n'))
}

// bootID tells one boot of the node from another; "" where the kernel does not.
func (a *Agent) bootID() string {
	raw, err := fs.ReadFile(a.node, "proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}
