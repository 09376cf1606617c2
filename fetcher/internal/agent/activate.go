package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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

// activate puts a staged set in force, loads it and looks at the result. When
// loading fails, files and modules are again what they were before.
func (a *Agent) activate(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, set *install.Set) error {
	before, err := store.Current()
	if err != nil {
		return err
	}
	pointers, err := store.Pointers()
	if err != nil {
		return err
	}
	if err := a.mayReplace(facts, set, before); err != nil {
		return err
	}
	changed := before == nil || before.Digest != set.Digest
	r.Changed = changed
	err = a.parts.Line.Do("install", func() (string, error) {
		// Libraries on a filesystem without exec are of no use to anybody, so
		// that is mended before any device file says that the driver is ready.
		if _, err := store.EnsureExec(); err != nil {
			return "", err
		}
		if err := errors.Join(store.Switch(set.Digest), store.WriteCacheFile(*set)); err != nil {
			return "", errors.Join(err, restore(store, pointers, before))
		}
		if !changed {
			return "already in force", nil
		}
		r.did("switch %s to %s", a.cfg.InstallDir, short(set.Digest))
		return short(set.Digest) + " in force", nil
	})
	if err != nil {
		return err
	}
	mark := a.loader.Mark()
	if !a.cfg.NoLoad {
		err = a.parts.Line.Do("load", func() (string, error) { return a.load(ctx, r, store, facts, set, before) })
		if err != nil && !(fault.Is(err, fault.NoDevice) && len(facts.OurGPUs()) == 0) {
			return a.takeBack(ctx, r, store, facts, pointers, changed, before, err)
		}
	}
	err = a.parts.Line.Do("validate", func() (string, error) {
		if r.Verdict, err = a.validate(ctx, set, mark); err != nil {
			return "", err
		}
		if err := a.remember(store, r.Verdict); err != nil {
			return "", err
		}
		return string(r.Verdict.State), nil
	})
	if err != nil {
		return err
	}
	return errors.Join(r.Verdict.Err(), store.Sweep())
}

// restore puts back the files that were in force before.
func restore(store *install.Store, to install.Pointers, before *install.Set) error {
	err := store.Restore(to)
	if before != nil {
		err = errors.Join(err, store.WriteCacheFile(*before))
	}
	return err
}

// takeBack restores files and modules after a failed load. cause stays the
// error; what cannot be restored is added to it.
func (a *Agent) takeBack(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, to install.Pointers, changed bool, before *install.Set, cause error) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	if changed {
		if err := restore(store, to, before); err != nil {
			errs = append(errs, fmt.Errorf("take install back: %w", err))
		} else {
			r.Changed = false
			r.did("took the install back")
		}
	}
	if before != nil && facts.Runs(before.Driver) {
		if _, err := a.loader.Load(ctx, a.images(store, before)); err != nil {
			errs = append(errs, fmt.Errorf("load %s again: %w", before.Driver, err))
		} else {
			r.did("loaded %s again", before.Driver)
			errs = append(errs, a.makeNodes())
		}
	}
	if fault.Is(cause, fault.NoDevice) {
		// The driver found no device although the bus has one.
		cause = fault.Wrap(fault.Unusable, fmt.Errorf("GPU present but not usable: %w", cause),
			"check that this driver version and flavour support the GPU: --flavour, --driver")
	}
	if lost := errors.Join(errs...); lost != nil {
		return fmt.Errorf("%w; and then: %w", cause, lost)
	}
	return cause
}

// mayReplace says early whether the kernel and the driver in it let the set in.
func (a *Agent) mayReplace(facts *host.Facts, set, before *install.Set) error {
	if a.cfg.NoLoad {
		return nil
	}
	for _, m := range set.Modules {
		if slices.Contains(loaded, m.Name) {
			if err := facts.Policy.Allows(m.Name, m.Signed); err != nil {
				return err
			}
		}
	}
	if !replaces(facts, set, before) {
		return nil
	}
	return idle(facts)
}

// idle refuses a driver that is in use, before anything of it is unloaded.
func idle(facts *host.Facts) error {
	for _, m := range facts.Modules {
		if m.Permanent {
			return fault.New(fault.Busy, fmt.Sprintf("unload driver %s: this kernel never unloads module %s", facts.Driver, m.Name),
				"reboot the node: the driver that is wanted is loaded then; until then the one in use stays as it is")
		}
	}
	if holders := facts.Holders(); len(holders) > 0 {
		return fault.New(fault.Busy, fmt.Sprintf("unload driver %s: in use by kernel module %s", facts.Driver, strings.Join(holders, ", ")),
			"unload that module (rmmod) and run this again; the driver in use stays as it is")
	}
	for _, m := range facts.Modules {
		if m.Refs > len(m.UsedBy) {
			return fault.New(fault.Busy, fmt.Sprintf("unload driver %s: module %s is in use by %s", facts.Driver, m.Name, plural(m.Refs-len(m.UsedBy), "open device")),
				"stop what uses the GPU (nvidia-smi lists it) and run this again; the driver in use stays as it is")
		}
	}
	return nil
}

// replaces reports whether another driver is loaded than the set's. Two editions of
// a release say the same of themselves once they are loaded: there the set counts that
// was in force before.
func replaces(facts *host.Facts, set, before *install.Set) bool {
	if len(facts.Modules) == 0 {
		return false
	}
	if before != nil && before.Driver != set.Driver && before.Driver.Modules() == set.Driver.Modules() {
		return true
	}
	if facts.Driver.Version != "" {
		return !facts.Runs(set.Driver)
	}
	for _, m := range facts.Modules {
		if m.Version != "" && m.Version != set.Driver.Modules().Version {
			return true
		}
	}
	return false
}

func (a *Agent) load(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, set, before *install.Set) (string, error) {
	if err := a.setFirmwarePath(r, facts, set); err != nil {
		return "", err
	}
	if replaces(facts, set, before) {
		if err := a.unload(ctx, r, facts); err != nil {
			return "", err
		}
	}
	outcomes, err := a.loader.Load(ctx, a.images(store, set))
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
	return err
}

// images are the modules of a set that are loaded, in load order. The bytes are
// compared with the digests that were noted when the set was verified.
func (a *Agent) images(store *install.Store, set *install.Set) []kmod.Image {
	var images []kmod.Image
	for _, m := range set.Modules {
		if !slices.Contains(loaded, m.Name) {
			continue
		}
		images = append(images, kmod.Image{
			Name: m.Name, Version: m.Version, Optional: slices.Contains(optional, m.Name), Params: a.cfg.ModuleParams[kernelName(m.Name)],
			Bytes: func() ([]byte, error) { return moduleBytes(store, set, m) },
		})
	}
	return images
}

func moduleBytes(store *install.Store, set *install.Set, m install.Module) ([]byte, error) {
	i := slices.IndexFunc(set.Layers, func(l install.Layer) bool { return l.Kind == bundle.LayerModules })
	if i < 0 {
		return nil, fault.New(fault.Unverified, "read module: the installed set has no modules layer", "remove the install folder's .prebake and install again")
	}
	layer, err := store.LayerFS(set.Layers[i].Digest)
	if err != nil {
		return nil, err
	}
	raw, err := fs.ReadFile(layer, m.File)
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", m.Name, err)
	}
	if got := digestOf(raw); got != m.SHA256 {
		return nil, fault.New(fault.Unverified, fmt.Sprintf("read module %s: digest is %s; verified was %s", m.Name, got, m.SHA256),
			"somebody changed the file on this node: remove the install folder's .prebake and install again")
	}
	return raw, nil
}

// setFirmwarePath tells the kernel where the driver's firmware is, unless it
// finds it already.
func (a *Agent) setFirmwarePath(r *Report, facts *host.Facts, set *install.Set) error {
	inside := path.Join("firmware", "nvidia", set.Driver.Modules().Version)
	if _, err := os.Stat(filepath.Join(a.cfg.HostRoot, a.cfg.InstallDir, inside)); err != nil {
		return nil // this release has no firmware
	}
	if facts.FirmwarePath != "" {
		if _, err := os.Stat(filepath.Join(a.cfg.HostRoot, facts.FirmwarePath, "nvidia", set.Driver.Modules().Version)); err == nil {
			return nil
		}
	}
	param := filepath.Join(a.cfg.HostRoot, "sys/module/firmware_class/parameters/path")
	if _, err := os.Stat(param); err != nil {
		return nil // a kernel without loadable firmware
	}
	want := path.Join(a.cfg.InstallDir, "firmware")
	if err := os.WriteFile(param, []byte(want), 0o644); err != nil {
		return fmt.Errorf("set firmware path: %w", err)
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
	f.NVRM = kmod.NVRM(a.loader.Since(mark), 8)
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
}

const recordFile = ".prebake/verdict.json"

func (a *Agent) remember(store *install.Store, v gpucheck.Verdict) error {
	raw, err := json.MarshalIndent(record{Verdict: v, At: a.parts.Now().UTC(), BootID: a.bootID()}, "", "  ")
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

// planLoad reports what activate would do.
func (a *Agent) planLoad(r *Report, facts *host.Facts, set, before *install.Set) error {
	if a.cfg.NoLoad || set == nil {
		return nil
	}
	if err := a.mayReplace(facts, set, before); err != nil {
		return err
	}
	if replaces(facts, set, before) {
		for _, m := range facts.Modules {
			r.did("unload %s", m.Name)
		}
	} else if !facts.Runs(set.Driver) {
		r.did("load %s", strings.Join(loaded, ", "))
	}
	return nil
}
