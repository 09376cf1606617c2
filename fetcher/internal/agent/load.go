package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"time"

	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

// restoreFirmwarePath sets the kernel's firmware path to its value from before the activation.
func (a *Agent) restoreFirmwarePath(before *host.Facts) error {
	now, err := host.Observe(a.node)
	if err != nil || now.FirmwarePath == before.FirmwarePath {
		return err
	}
	return a.writeFirmwarePath(before.FirmwarePath)
}

// writeFirmware sets the kernel's firmware path if it differs from the observed one.
func (a *Agent) writeFirmware(path string, now *host.Facts) error {
	if path == now.FirmwarePath {
		return nil
	}
	return a.writeFirmwarePath(path)
}

// writeFirmwarePath sets the kernel's firmware path. The kernel keeps even a newline
// (Documentation/driver-api/firmware/fw_search_path.rst). A zero byte means an empty path.
func (a *Agent) writeFirmwarePath(path string) error {
	if err := a.parts.Node.Set(firmwareParameter, []byte(cmp.Or(path, "\x00"))); err != nil {
		return fmt.Errorf("set the kernel's firmware path: %w", err)
	}
	return nil
}

const firmwareParameter = "sys/module/firmware_class/parameters/path"

func (a *Agent) load(ctx context.Context, r *Report, store *install.Store, facts *host.Facts, d decision) (string,
	error) {
	set := d.set
	if err := a.setFirmwarePath(r, store, facts, set); err != nil {
		return "", err
	}
	a.loadHelper(ctx) // before the unload: if modprobe fails, the old driver is still loaded
	if d.do == replace {
		if err := a.unload(ctx, r, facts); err != nil {
			return "", err
		}
	}
	// If the driver was loaded before, the modules that are not loaded may be unverified (see verifyFor).
	outcomes, err := a.loader.Load(ctx, a.images(store, set, facts, a.cfg.ModuleParams, d.do != keep))
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
	a.cuda.due = a.cuda.due || fresh > 0
	if err := a.makeNodes(); err != nil {
		return "", err
	}
	if fresh == 0 {
		return "already loaded", nil
	}
	return plural(fresh, "module"), nil
}

// drmHelper is the kernel module whose symbols nvidia-drm needs. Some kernels have it built in.
const drmHelper = "drm_kms_helper"

// loadHelper loads drmHelper. It ignores errors, because CUDA programs and the node work without nvidia-drm.
func (a *Agent) loadHelper(ctx context.Context) {
	program := a.parts.Node.Program("/sbin/modprobe", "/usr/sbin/modprobe")
	if program == "" || a.parts.Node.Exists("sys/module/"+drmHelper) {
		return
	}
	if err := a.parts.Node.Run(ctx, time.Minute, program, "-q", drmHelper); err != nil {
		a.parts.Log.InfoContext(ctx, "could not load the kernel module that nvidia-drm needs", "err", err)
	}
}

func (a *Agent) unload(ctx context.Context, r *Report, facts *host.Facts) error {
	a.describeGPUs(ctx, gpucheck.Verdict{}) // containers must not get GPUs that are about to disappear
	var names []string
	for _, m := range facts.Modules { // last loaded first, so that a module comes before those that it uses
		names = append(names, m.Name)
	}
	done, err := a.loader.Unload(ctx, names)
	for _, name := range done {
		r.did("unload %s", name)
	}
	if err != nil {
		return err
	}
	return a.inDev(a.parts.Nodes.Clear)
}

// images returns the modules of a verified driver that must be loaded, in load order: the modules for every node (see
// loaded), and the modules that this node had loaded before. If wanted is true, it also returns the modules that have
// parameters, because the owner wants these. At the load, the Bytes function of each image compares the file with its
// verified digest again.
func (a *Agent) images(store *install.Store, set *install.Set, before *host.Facts,
	params map[string]string, wanted bool) []kmod.Image {
	var images []kmod.Image
	for _, m := range set.Modules {
		had := slices.ContainsFunc(before.Modules,
			func(old host.Module) bool { return old.Name == modinfo.Canonical(m.Name) })
		if !isLoaded(m.Name) && !had && (!wanted || params[modinfo.Canonical(m.Name)] == "") {
			continue
		}
		images = append(images, kmod.Image{
			Name: m.Name, Version: m.Version, Optional: !isLoaded(m.Name) || slices.Contains(optional, m.Name),
			Params: params[modinfo.Canonical(m.Name)],
			Bytes:  func() ([]byte, error) { return moduleBytes(store, set, m) },
		})
	}
	return images
}

func moduleBytes(store *install.Store, set *install.Set, m install.Module) ([]byte, error) {
	i := slices.IndexFunc(set.Layers, func(l install.Layer) bool { return l.Kind == bundle.LayerModules })
	if i < 0 {
		return nil, fault.New(fault.Unverified, "read modules: the installed driver has no modules layer", hintAgain)
	}
	layer, err := store.LayerFS(set.Layers[i].Digest)
	if err != nil {
		return nil, err
	}
	raw, err := readModule(layer, m.File)
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, fmt.Errorf("read module %s: %w", m.Name, err), hintAgain)
	}
	if got := digestOf(raw); got != m.SHA256 {
		return nil, fault.New(fault.Unverified,
			fmt.Sprintf("read module %s: the file has digest %s; the verified digest is %s", m.Name, got, m.SHA256), hintAgain)
	}
	return raw, nil
}

// setFirmwarePath sets the kernel's firmware path to the driver's folder, unless the present path already has this
// firmware.
func (a *Agent) setFirmwarePath(r *Report, store *install.Store, facts *host.Facts, set *install.Set) error {
	inside := path.Join("firmware", "nvidia", set.Driver.Modules().Version)
	if !a.parts.Node.Exists(path.Join(a.cfg.InstallDir, inside)) {
		return nil // this release has no firmware
	}
	if facts.FirmwarePath != "" &&
		a.parts.Node.Exists(path.Join(facts.FirmwarePath, "nvidia", set.Driver.Modules().Version)) {
		return nil
	}
	if !a.parts.Node.Exists(firmwareParameter) {
		return nil // this kernel loads no firmware from files
	}
	want := path.Join(a.cfg.InstallDir, "firmware")
	// An uninstall needs the former path. An error is only logged: a full disk must not cost the node its driver.
	if have, err := store.ReadFile(firmwareBefore); facts.FirmwarePath != want &&
		(err != nil || string(have) != facts.FirmwarePath) {
		if err := store.WriteFile(firmwareBefore, []byte(facts.FirmwarePath)); err != nil {
			a.parts.Log.Warn("could not record the former firmware path", "err", err)
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
	nodes, err := devnode.Plan(a.node, present)
	if err != nil {
		return err
	}
	return a.inDev(func(dev *os.Root) error {
		for _, n := range nodes {
			if err := a.parts.Nodes.Make(dev, n); err != nil {
				return err
			}
		}
		return nil
	})
}

// inDev opens the node's folder of device files, passes it to do, and closes it.
func (a *Agent) inDev(do func(dev *os.Root) error) error {
	dev, err := a.parts.Node.Folder("dev")
	if err != nil {
		return fmt.Errorf("open the folder of device files: %w", err)
	}
	return errors.Join(do(dev), dev.Close())
}

func (a *Agent) moduleVersions() (map[string]string, error) {
	mods, err := host.LoadedModules(a.node)
	if err != nil {
		return nil, err
	}
	versions := map[string]string{}
	for _, m := range mods {
		versions[m.Name] = m.Version
	}
	return versions, nil
}
