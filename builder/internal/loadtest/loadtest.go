// Package loadtest loads a driver's freshly compiled kernel modules into the
// very kernel that they were compiled for, in a virtual machine, asks NVIDIA's
// management library what it sees, and unloads them again. It is the last
// check before a driver is published.
//
// It refuses to publish, to repair, and to call a driver good that it did not
// see running: without a GPU in the machine, emulated or not, the verdict says
// so.
package loadtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/vm"
)

// The states of a [Verdict].
const (
	// Loaded: every module loaded, NVML answered the right version, all unloaded.
	Loaded = "loaded"
	// NoDevice: the module linked into the kernel, ran, and found no GPU.
	NoDevice = "loaded, no device"
	// Rejected: the kernel or the driver said no.
	Rejected = "rejected"
)

// Config says what to load and where.
type Config struct {
	// Boot is a folder with the kernel, as [vm.Config.Boot] wants it. With
	// emugpu.ko in it, the machine has an emulated GPU.
	Boot string
	// Modules maps module names, such as nvidia-uvm, to files.
	Modules map[string]string
	// Userspace is a folder with lib64/libnvidia-ml.so.1.
	Userspace string
	// Firmware is a folder with firmware/nvidia/<VERSION>/; "" is none.
	Firmware string
	// Version is the driver version that must answer.
	Version string
	// Init and Probe are the programs guestinit and nvmlprobe.
	Init, Probe string
	// Timeout ends the machine; 0 is 5 minutes.
	Timeout time.Duration
	// Watch hears of the machine's progress; may be nil.
	Watch func(vm.Progress)
}

// Verdict is what was seen.
type Verdict struct {
	// State is [Loaded], [NoDevice] or [Rejected].
	State string
	// Loaded names the modules that were loaded, in order.
	Loaded []string
	// Skipped says for each module that was not tried, why.
	Skipped map[string]string
	// NVMLVersion is the driver version that NVML reported.
	NVMLVersion string
	// Reason says in a line why State is not Loaded.
	Reason string
	// Warnings are kernel log lines that a person should see though all went well.
	Warnings []string
	// KernelLog is what the kernel said, the last maxKernelLog bytes of it.
	KernelLog string
	// BootSeconds, LoadSeconds, ProbeSeconds and UnloadSeconds say where the
	// time went; Seconds is the machine's whole life.
	BootSeconds, LoadSeconds, ProbeSeconds, UnloadSeconds, Seconds float64
}

// maxKernelLog bounds the log in a verdict, which is kept as a fact and sent
// around. An undisturbed run takes a fifth of it.
const maxKernelLog = 128 << 10

// String returns a line for people.
func (v *Verdict) String() string {
	if v.Reason == "" {
		return v.State
	}
	return v.State + ": " + v.Reason
}

// Run boots, loads, asks and unloads. A rejection is fault.LoadTestFailed and
// comes with the verdict; any other error means that the test could not be
// done. console gets the machine's console; may be nil.
func Run(ctx context.Context, c Config, console io.Writer) (*Verdict, error) {
	c.Modules = normalise(c.Modules)
	if err := c.validate(); err != nil {
		return nil, err
	}
	gpu, err := exists(filepath.Join(c.Boot, vm.BootGPU))
	if err != nil {
		return nil, fmt.Errorf("prepare load test: %w", err)
	}
	p, err := newPlan(c)
	if err != nil {
		return nil, fmt.Errorf("prepare load test: %w", err)
	}
	res, err := vm.Run(ctx, vm.Config{
		Boot: c.Boot, GPU: gpu, Init: c.Init, Files: p.files, Steps: p.steps,
		Console: console, Watch: c.Watch, Timeout: c.Timeout,
	})
	var crash *vm.CrashError
	if err != nil && !errors.As(err, &crash) {
		return nil, fmt.Errorf("load test: %w", err)
	}
	v := judge(p, res)
	if v.State == Rejected {
		return v, fault.New(fault.LoadTestFailed, "load test: "+v.Reason,
			"read the machine's kernel log in the build's log")
	}
	return v, nil
}

func (c Config) validate() error {
	var errs []error
	if c.Modules["nvidia"] == "" {
		errs = append(errs, errors.New("no module nvidia"))
	}
	if c.Version == "" {
		errs = append(errs, errors.New("no driver version"))
	}
	if c.Probe == "" {
		errs = append(errs, errors.New("no nvmlprobe program"))
	}
	if len(errs) > 0 {
		return fault.Wrap(fault.Usage, fmt.Errorf("prepare load test: %w", errors.Join(errs...)), "")
	}
	return nil
}

func exists(path string) (bool, error) {
	_, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// plan is what the machine is told to do, and how its steps are found again.
type plan struct {
	version string
	modules []string // to load, in order
	skipped map[string]string
	files   []vm.File
	steps   []vm.Step
}

// Names of steps.
const (
	stepLoad    = "load "
	stepUnload  = "unload "
	stepVersion = "driver version"
	stepModules = "module list"
	stepNodes   = "device nodes"
	stepProbe   = "nvml"
)

// Places in the machine.
const (
	guestModules = "/usr/local/nvidia/drivers"
	guestLib     = "/usr/local/nvidia/lib64/libnvidia-ml.so.1"
	guestProbe   = "/prebake/nvmlprobe"
)

// stepTimeout bounds one step: far above what a slow machine needs.
const stepTimeout = 2 * time.Minute

func newPlan(c Config) (*plan, error) {
	present, err := kernelModules(c.Boot)
	if err != nil {
		return nil, err
	}
	p := &plan{version: c.Version}
	if p.modules, p.skipped, err = choose(c.Modules, present, dependencies); err != nil {
		return nil, err
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

func (p *plan) addFiles(c Config) error {
	lib := filepath.Join(c.Userspace, "lib64", "libnvidia-ml.so.1")
	libraries, err := vm.GlibcFiles(c.Probe, lib)
	if err != nil {
		return err
	}
	p.files = append(p.files, vm.File{Name: guestLib, Path: lib, Mode: 0o755}, vm.File{Name: guestProbe, Path: c.Probe, Mode: 0o755})
	p.files = append(p.files, libraries...)
	if c.Firmware == "" {
		return nil
	}
	firmware, err := vm.Tree("/lib/firmware", filepath.Join(c.Firmware, "firmware"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // a driver without GSP firmware
	}
	p.files = append(p.files, firmware...)
	return err
}

func (p *plan) addSteps() {
	add := func(keepGoing bool, name string, argv ...string) {
		p.steps = append(p.steps, vm.Step{Name: name, Argv: argv, Timeout: stepTimeout, KeepGoing: keepGoing})
	}
	for _, m := range p.modules {
		add(false, stepLoad+m, "@insmod", guestModules+"/"+m+".ko")
	}
	add(false, stepVersion, "@cat", "/proc/driver/nvidia/version")
	add(false, stepModules, "@cat", "/proc/modules")
	add(false, stepNodes, "@nvidia-nodes")
	// Whatever the probe says, the modules have to unload after it.
	add(true, stepProbe, guestProbe, "--lib", guestLib)
	for _, m := range slices.Backward(p.modules) {
		add(false, stepUnload+m, "@rmmod", m)
	}
}
