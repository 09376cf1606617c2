package loadtest

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// plan has the steps for the machine, and the facts with which judge checks their results.
type plan struct {
	version string
	arch    target.Arch
	release string   // kernel release in the modules' vermagic
	madeFor string   // the ABI fingerprint in the stamp of nvidia.ko, an ELF note; "" if nvidia.ko has no stamp
	gpu     bool     // true if the machine has an emulated GPU
	modules []string // modules to load, in order
	skipped map[string]string
	// idleDRM is true if the module nvidia-drm is empty, because it was compiled for a kernel without DRM.
	idleDRM bool
	// notAsked is the reason why NVML cannot be asked for its version, or "" if it can be asked.
	notAsked string
	files    []vm.File
	steps    []vm.Step
}

// These constants are the names of steps.
const (
	stepBefore  = "machine"
	stepLoad    = "load "
	stepUnload  = "unload "
	stepVersion = "driver version"
	stepModules = "module list"
	stepStamp   = "stamp"
	stepNodes   = "device nodes"
	stepProbe   = "nvml"
	stepAfter   = "taint"
)

// These constants are paths in the machine.
const (
	guestModules = "/usr/local/nvidia/drivers"
	guestLib     = "/usr/local/nvidia/lib64/libnvidia-ml.so.1"
	guestProbe   = "/prebake/nvmlprobe"
	procRelease  = "/proc/sys/kernel/osrelease"
	procTainted  = "/proc/sys/kernel/tainted"
	sysStamp     = "/sys/module/nvidia/notes/" + modinfo.StampSection
)

// stepTimeout is the time limit of one step. Even a slow machine needs far less.
const stepTimeout = 2 * time.Minute

func newPlan(c Config) (*plan, error) {
	present, err := kernelModules(c.Boot)
	if err != nil {
		return nil, err
	}
	main, err := readModule(c.Modules["nvidia"])
	if err != nil {
		return nil, fmt.Errorf("read nvidia.ko: %w", err)
	}
	p := &plan{version: c.Version, madeFor: main.MadeFor}
	p.release, _, _ = strings.Cut(main.Vermagic, " ")
	if p.arch, err = archOf(main.Machine); err != nil {
		return nil, err
	}
	if p.modules, p.skipped, err = choose(c.Modules, present, dependencies); err != nil {
		return nil, err
	}
	if slices.Contains(p.modules, drm) {
		m, err := readModule(c.Modules[drm])
		if err != nil {
			return nil, fmt.Errorf("read %s.ko: %w", drm, err)
		}
		p.idleDRM = !slices.ContainsFunc(m.Imports, func(s modinfo.Symbol) bool { return strings.HasPrefix(s.Name, "drm_") })
	}
	for _, name := range p.modules {
		p.files = append(p.files, vm.File{Name: guestModules + "/" + name + ".ko", Path: c.Modules[name], Mode: 0o644})
	}
	if err := p.addFiles(c); err != nil {
		return nil, err
	}
	p.addSteps()
	return p, nil
}

// archOf returns the architecture of modules that have this ELF machine type.
func archOf(m elf.Machine) (target.Arch, error) {
	switch m {
	case elf.EM_X86_64:
		return target.AMD64, nil
	case elf.EM_AARCH64:
		return target.ARM64, nil
	}
	return "", fault.New(fault.Unsupported, fmt.Sprintf("nvidia.ko is for processor %v; want x86-64 or arm64", m),
		"compile for amd64 or arm64")
}

// Helper returns the path of a load test's program for an architecture, from its path for amd64. All variants lie in
// one folder.
func Helper(program string, arch target.Arch) string {
	if arch == target.AMD64 {
		return program
	}
	return program + "-" + string(arch)
}

func (p *plan) addFiles(c Config) error {
	lib, probe := filepath.Join(c.Userspace, "lib64", "libnvidia-ml.so.1"), Helper(c.Probe, p.arch)
	if have, err := exists(lib); err != nil {
		return err
	} else if !have {
		return fault.New(fault.InputMissing,
			fmt.Sprintf("driver %s has no libnvidia-ml.so.1, but nodes need this library to check the driver", p.version),
			"check that the runfile is NVIDIA's full driver for this architecture; or publish without a load test: "+
				"--load-test off")
	}
	switch _, err := os.Stat(probe); {
	case err == nil:
		libraries, err := vm.GlibcFiles(probe, lib)
		if err != nil {
			return fmt.Errorf("find the libraries that NVML needs: %w", err)
		}
		p.files = append(p.files, vm.File{Name: guestLib, Path: lib, Mode: 0o755},
			vm.File{Name: guestProbe, Path: probe, Mode: 0o755})
		p.files = append(p.files, libraries...)
	case errors.Is(err, os.ErrNotExist) && p.arch != target.AMD64:
		// Compiling nvmlprobe for another architecture needs a cross compiler, which not every builder has.
		p.notAsked = "this builder has no " + filepath.Base(probe)
	default:
		return fault.Wrap(fault.Usage, fmt.Errorf("find nvmlprobe: %w", err),
			"give the path of nvmlprobe with --probe; or compile nvmlprobe with: make build")
	}
	if c.Firmware == "" {
		return nil
	}
	firmware, err := vm.Tree("/lib/firmware", filepath.Join(c.Firmware, "firmware"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // old drivers have no firmware for the GPU's GSP processor
	}
	p.files = append(p.files, firmware...)
	return err
}

func (p *plan) addSteps() {
	add := func(keepGoing bool, name string, argv ...string) {
		p.steps = append(p.steps, vm.Step{Name: name, Argv: argv, Timeout: stepTimeout, KeepGoing: keepGoing})
	}
	add(false, stepBefore, "@cat", procRelease, procTainted)
	for _, m := range p.modules {
		add(m == peermem, stepLoad+m, "@insmod", guestModules+"/"+m+".ko")
	}
	add(false, stepVersion, "@cat", "/proc/driver/nvidia/version")
	add(false, stepModules, "@cat", "/proc/modules")
	if p.madeFor != "" {
		add(false, stepStamp, "@cat", sysStamp)
	}
	add(false, stepNodes, "@nvidia-nodes")
	if p.notAsked == "" {
		// The modules must be unloaded even if the probe fails.
		add(true, stepProbe, guestProbe, "--lib", guestLib)
	}
	for _, m := range slices.Backward(p.modules) {
		add(m == peermem, stepUnload+m, "@rmmod", m)
	}
	add(false, stepAfter, "@cat", procTainted)
}

// readModule reads vermagic, symbols and dependencies from a module's file, and the ABI fingerprint in its stamp.
func readModule(file string) (m *modinfo.Module, err error) {
	in, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	st, err := in.Stat()
	if err != nil {
		return nil, err
	}
	return modinfo.Read(in, st.Size())
}
