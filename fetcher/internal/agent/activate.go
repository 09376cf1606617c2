package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
)

// loaded are the modules that the agent loads; the others of a set are for
// hardware that brings its own tools.
var loaded = []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"}

// optional are those of them without which CUDA programs run all the same.
var optional = []string{"nvidia-modeset", "nvidia-drm"}

func isLoaded(module string) bool { return slices.Contains(loaded, module) }

// activate does what was decided: it puts a staged set in force, loads it and looks at
// the result. When it cannot be loaded, or fewer GPUs work with it than with the one
// before, files and modules are again what they were.
func (a *Agent) activate(ctx context.Context, r *Report, store *install.Store, s situation, d decision) error {
	// Once it has begun it ends by itself, in a time that the kernel and the probe bound.
	ctx = context.WithoutCancel(ctx)
	before, set := s.current, d.set
	pointers, err := store.Pointers()
	if err != nil {
		return err
	}
	was := a.findForeign(s, d.do)
	defer was.close()
	begun := false
	if at := s.attempts[set.Digest]; at != nil && at.Open { // by a run that was killed
		if set, err := store.SetAt(at.Before.Current); err == nil && set != nil {
			before, pointers, begun = set, at.Before, true
		}
	}
	changed := before == nil || before.Digest != set.Digest
	r.Changed, r.Verdict = changed, gpucheck.Verdict{}
	if changed || d.do != keep { // what runs already is not asked for its papers again
		if set, err = a.prove(ctx, store, set, s.facts); err != nil {
			r.Changed = false
			return err
		}
		d.set = set
	}
	if (changed || d.do != keep) && !begun {
		if err := a.begin(store, set.Digest, pointers); err != nil && changed {
			return err
		} else if err != nil { // a full disk is no reason to stay without a driver
			a.parts.Log.WarnContext(ctx, "note attempt", "err", err)
		}
	}
	err = a.parts.Line.Do("install", func() (string, error) {
		// Libraries on a filesystem without exec are of no use to anybody, so
		// that is mended before any device file says that the driver is ready.
		if _, err := store.EnsureExec(); err != nil {
			return "", err
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
	undo := takingBack{set: set, before: before, to: pointers, changed: changed, foreign: was}
	mark := a.loader.Mark()
	if !a.cfg.NoLoad {
		err = a.parts.Line.Do("load", func() (string, error) { return a.load(ctx, r, store, s.facts, d) })
		if err != nil && !(fault.Is(err, fault.NoDevice) && len(s.facts.OurGPUs()) == 0) {
			return a.takeBack(ctx, r, store, s, undo, err)
		}
	}
	err = a.parts.Line.Do("validate", func() (string, error) {
		if r.Verdict, err = a.validate(ctx, set, mark); err != nil {
			return "", err
		}
		return string(r.Verdict.State), nil
	})
	if err == nil && r.Verdict.State == gpucheck.Unusable && changed && s.returnTo(before) && a.served(before, r.Verdict) {
		err = r.Verdict.Err()
	}
	if err != nil && changed {
		return a.takeBack(ctx, r, store, s, undo, err)
	}
	if err != nil {
		return errors.Join(err, a.end(store, set.Digest, err))
	}
	if changed || d.do != keep {
		a.tell(ctx, store, eventInForce, set, string(r.Verdict.State), r.Verdict.Err())
	}
	return errors.Join(r.Verdict.Err(), a.end(store, set.Digest, nil), a.remember(r, store, r.Verdict))
}

// served reports whether more GPUs worked with a set at the last look than do now. Where
// no more did, going back to it helps nobody.
func (a *Agent) served(set *install.Set, now gpucheck.Verdict) bool {
	rec := a.lastRecord()
	return rec != nil && rec.Verdict.Digest == set.Digest && rec.Verdict.UsableGPUs > now.UsableGPUs
}

// returnTo reports whether there is a set to go back to.
func (s situation) returnTo(before *install.Set) bool {
	return before != nil && !s.noLoad && fitsNode(before, s.facts) == nil && s.refused(before) == nil
}

// restore puts back the files that were in force before.
func restore(store *install.Store, to install.Pointers, before *install.Set) error {
	err := store.Restore(to)
	if before != nil {
		err = errors.Join(err, store.WriteCacheFile(*before))
	}
	return err
}

// takingBack is what is to be undone, and what is to be again.
type takingBack struct {
	set, before *install.Set
	to          install.Pointers
	changed     bool
	foreign     *foreignFiles // what was unloaded
}

// takeBack restores files and modules after a set that could not be loaded or used.
// Modules that do not leave the kernel keep their files. cause stays the error; what
// cannot be restored is added to it.
func (a *Agent) takeBack(ctx context.Context, r *Report, store *install.Store, s situation, t takingBack, cause error) error {
	before := t.before
	if fault.Is(cause, fault.NoDevice) {
		// The driver found no device although the bus has one.
		cause = fault.Wrap(fault.Unusable, fmt.Errorf("GPU present but not usable: %w", cause),
			"check that this driver version and flavour support the GPU: --flavour, --driver")
	}
	// Modules of somebody else's that were adopted are not ours to unload.
	may := len(s.facts.Modules) == 0 || s.ours() || s.replaceForeign
	reload := may && s.returnTo(before) && (t.changed || s.facts.Runs(before.Driver))
	var errs []error
	if reload {
		if err := a.unloadOf(ctx, r, t.set, before); err != nil {
			return fmt.Errorf("%w; and then: %w", cause, errors.Join(fmt.Errorf("it stays in force: %w", err), a.end(store, t.set.Digest, cause)))
		}
	}
	if t.changed {
		if err := restore(store, t.to, before); err != nil {
			errs = append(errs, fmt.Errorf("take install back: %w", err))
		} else {
			r.Changed = false
			r.did("took the install back")
		}
	}
	errs = append(errs, a.restoreFirmwarePath(s.facts))
	r.Verdict = gpucheck.Verdict{}
	if now, err := host.LoadedModules(a.parts.Root); err == nil && len(now) == 0 && t.foreign.replaced {
		if err := t.foreign.putBack(ctx, a, r); err != nil {
			errs = append(errs, err)
		} else {
			reload = false
		}
	}
	if reload {
		proved, err := a.prove(ctx, store, before, s.facts)
		if reload = err == nil; reload {
			before = proved
		} else {
			errs = append(errs, err)
		}
	}
	if reload {
		mark := a.loader.Mark()
		if _, err := a.loader.Load(ctx, a.images(store, before, s.facts)); err != nil {
			errs = append(errs, fmt.Errorf("load %s again: %w", before.Driver, err))
		} else {
			r.did("loaded %s again", before.Driver)
			errs = append(errs, a.makeNodes())
			if v, err := a.validate(ctx, before, mark); err != nil {
				errs = append(errs, err)
			} else {
				r.Verdict = v
				errs = append(errs, a.remember(r, store, v))
			}
		}
	}
	errs = append(errs, a.end(store, t.set.Digest, cause))
	a.tell(ctx, store, eventTakenBack, t.set, string(r.Verdict.State), cause)
	if lost := errors.Join(errs...); lost != nil {
		return fmt.Errorf("%w; and then: %w", cause, lost)
	}
	return cause
}

// unloadOf unloads what is loaded of a set that did not do.
func (a *Agent) unloadOf(ctx context.Context, r *Report, set, before *install.Set) error {
	facts, err := host.Observe(a.parts.Root)
	if err != nil || len(facts.Modules) == 0 || before.Digest == set.Digest || !(situation{facts: facts}).runs(set) {
		return err
	}
	if err := idle(facts); err != nil {
		return err
	}
	return a.unload(ctx, r, facts)
}

// restoreFirmwarePath tells the kernel to look for firmware where it did before.
func (a *Agent) restoreFirmwarePath(before *host.Facts) error {
	now, err := host.Observe(a.parts.Root)
	if err != nil || now.FirmwarePath == before.FirmwarePath {
		return err
	}
	return a.writeFirmwarePath(before.FirmwarePath)
}

// writeFirmwarePath sets a parameter of the kernel, which takes it as it is, a newline
// with it (Documentation/driver-api/firmware/fw_search_path.rst). Nothing is a zero.
func (a *Agent) writeFirmwarePath(path string) error {
	if err := os.WriteFile(filepath.Join(a.cfg.HostRoot, firmwareParameter), []byte(cmp.Or(path, "\x00")), 0o644); err != nil {
		return fmt.Errorf("set firmware path: %w", err)
	}
	return nil
}

const firmwareParameter = "sys/module/firmware_class/parameters/path"

func (a *Agent) load(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, d decision) (string, error) {
	set := d.set
	if err := a.setFirmwarePath(r, store, facts, set); err != nil {
		return "", err
	}
	if d.do == replace {
		if err := a.unload(ctx, r, facts); err != nil {
			return "", err
		}
	}
	outcomes, err := a.loader.Load(ctx, a.images(store, set, facts))
	if err != nil {
		return fault.Of(err).String(), err
	}
	r.Modules = outcomes
	fresh := 0
	for _, o := range outcomes {
		if o.Was == kmod.Loaded {
			fresh++
			r.did("load %s", o.Name)
		}
	}
	if err := a.makeNodes(); err != nil {
		return "", err
	}
	if fresh == 0 {
		return "already loaded", nil
	}
	return plural(fresh, "module"), nil
}

// unload unloads the driver that is loaded.
func (a *Agent) unload(ctx context.Context, r *Report, facts *host.Facts) error {
	var names []string
	for _, m := range facts.Modules { // youngest first, so users come before what they use
		names = append(names, m.Name)
	}
	done, err := a.loader.Unload(ctx, names)
	for _, name := range done {
		r.did("unload %s", name)
	}
	if err != nil {
		return err
	}
	return a.parts.Nodes.Clear(filepath.Join(a.cfg.HostRoot, "dev"))
}

// images are the modules of a set that are loaded, in load order: those that every node
// has, and those that this one had before, as nvidia-peermem. The set was proved: the
// bytes are compared with the digests that its signed content gave.
func (a *Agent) images(store *install.Store, set *install.Set, before *host.Facts) []kmod.Image {
	var images []kmod.Image
	for _, m := range set.Modules {
		had := slices.ContainsFunc(before.Modules, func(old host.Module) bool { return old.Name == kernelName(m.Name) })
		if !isLoaded(m.Name) && !had {
			continue
		}
		images = append(images, kmod.Image{
			Name: m.Name, Version: m.Version, Optional: !isLoaded(m.Name) || slices.Contains(optional, m.Name), Params: a.cfg.ModuleParams[kernelName(m.Name)],
			Bytes: func() ([]byte, error) { return moduleBytes(store, set, m) },
		})
	}
	return images
}

func moduleBytes(store *install.Store, set *install.Set, m install.Module) ([]byte, error) {
	i := slices.IndexFunc(set.Layers, func(l install.Layer) bool { return l.Kind == bundle.LayerModules })
	if i < 0 {
		return nil, fault.New(fault.Unverified, "read module: the set has no modules layer", hintAgain)
	}
	layer, err := store.LayerFS(set.Layers[i].Digest)
	if err != nil {
		return nil, err
	}
	raw, err := readModule(layer, m.File)
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", m.Name, err)
	}
	if got := digestOf(raw); got != m.SHA256 {
		return nil, fault.New(fault.Unverified, fmt.Sprintf("read module %s: digest is %s; verified was %s", m.Name, got, m.SHA256), hintAgain)
	}
	return raw, nil
}

// setFirmwarePath tells the kernel where the driver's firmware is, unless it
// finds it already.
func (a *Agent) setFirmwarePath(r *Report, store *install.Store, facts *host.Facts, set *install.Set) error {
	inside := path.Join("firmware", "nvidia", set.Driver.Modules().Version)
	if _, err := os.Stat(filepath.Join(a.cfg.HostRoot, a.cfg.InstallDir, inside)); err != nil {
		return nil // this release has no firmware
	}
	if facts.FirmwarePath != "" {
		if _, err := os.Stat(filepath.Join(a.cfg.HostRoot, facts.FirmwarePath, "nvidia", set.Driver.Modules().Version)); err == nil {
			return nil
		}
	}
	if _, err := os.Stat(filepath.Join(a.cfg.HostRoot, firmwareParameter)); err != nil {
		return nil // a kernel without loadable firmware
	}
	want := path.Join(a.cfg.InstallDir, "firmware")
	if facts.FirmwarePath != want { // for the day on which this program goes
		if err := store.WriteFile(firmwareBefore, []byte(facts.FirmwarePath)); err != nil {
			return err
		}
	}
	if err := a.writeFirmwarePath(want); err != nil {
		return err
	}
	r.did("set firmware path to %s", want)
	return nil
}

func (a *Agent) makeNodes() error {
	mods, err := a.moduleVersions()
	if err != nil {
		return err
	}
	present := map[string]bool{}
	for name := range mods {
		present[name] = true
	}
	nodes, err := devnode.Plan(a.parts.Root, present)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if err := a.parts.Nodes.Make(filepath.Join(a.cfg.HostRoot, "dev"), n); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) moduleVersions() (map[string]string, error) {
	mods, err := host.LoadedModules(a.parts.Root)
	if err != nil {
		return nil, err
	}
	versions := map[string]string{}
	for _, m := range mods {
		versions[m.Name] = m.Version
	}
	return versions, nil
}

// nvmlLibrary is where an installed driver has it.
const nvmlLibrary = "lib64/libnvidia-ml.so.1"

// validate looks at what there is now.
func (a *Agent) validate(ctx context.Context, set *install.Set, mark kmod.Mark) (gpucheck.Verdict, error) {
	facts, err := host.Observe(a.parts.Root)
	if err != nil {
		return gpucheck.Verdict{}, err
	}
	f := gpucheck.Facts{Driver: set.Driver, Digest: set.Digest, GPUs: addresses(facts), Modules: map[string]string{}, Foreign: foreign(facts, set)}
	for _, m := range facts.Modules {
		f.Modules[m.Name] = m.Version
	}
	if a.cfg.NoLoad {
		v := gpucheck.Judge(f)
		v.State, v.Reason = gpucheck.Staged, "installed; loading was turned off (--no-load)"
		return v, nil
	}
	if _, ok := f.Modules["nvidia"]; ok {
		if f.NVML, err = a.parts.Probe.Probe(ctx, path.Join(a.cfg.InstallDir, nvmlLibrary)); err != nil {
			return gpucheck.Verdict{}, err
		}
	}
	lines := a.loader.Since(mark)
	f.NVRM = kmod.NVRM(lines, 8)
	if mark != (kmod.Mark{}) {
		f.Since = lines
	}
	return gpucheck.Judge(f), nil
}

// addresses are the PCI addresses of the GPUs that the driver is to drive.
func addresses(facts *host.Facts) []string {
	var all []string
	for _, g := range facts.OurGPUs() {
		all = append(all, g.Address)
	}
	return all
}

// foreign lists the loaded modules whose build id is not the installed file's.
// They keep working, and after the next boot the installed ones are loaded.
func foreign(facts *host.Facts, set *install.Set) []string {
	var names []string
	for _, m := range facts.Modules {
		i := slices.IndexFunc(set.Modules, func(own install.Module) bool { return kernelName(own.Name) == m.Name })
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

const recordFile = ".prebake/verdict.json"

func (a *Agent) remember(r *Report, store *install.Store, v gpucheck.Verdict) error {
	rec := record{Verdict: v, At: a.parts.Now().UTC(), BootID: a.bootID(), Params: a.cfg.ModuleParams}
	// Parameters count when a module is loaded. Those of one that was loaded before stay.
	fresh := slices.ContainsFunc(r.Modules, func(o kmod.Outcome) bool { return o.Name == "nvidia" && o.Was == kmod.Loaded })
	if last := a.recall(); last != nil && !fresh && len(r.Modules) > 0 {
		if rec.Params = last.Params; !maps.Equal(rec.Params, a.cfg.ModuleParams) {
			r.Waiting = append(r.Waiting, "other module parameters than those with which the driver was loaded: they count when it is loaded again, after a reboot")
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
	raw, err := fs.ReadFile(a.parts.Root, "proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}
