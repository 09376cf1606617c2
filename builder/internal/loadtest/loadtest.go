// Package loadtest is the last check before a driver is published. It boots a virtual machine with the modules' kernel,
// loads the modules, asks NVIDIA's management library (NVML) for the driver version, and unloads the modules.
//
// The package publishes nothing and repairs nothing. If the machine has no GPU, not even an emulated one, a driver gets
// at best the state [NoDevice]: the test has not shown that the driver works.
package loadtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/vm"
)

// These constants are the states of a [Verdict].
const (
	// Loaded means that the kernel loaded and unloaded all modules that the test did not skip, and that the loaded
	// driver has the right version. NVML reported this version too, except if Verdict.NotAsked is set.
	Loaded = "loaded"
	// NoDevice means that the kernel linked the module nvidia and ran it, but the module found no GPU.
	NoDevice = "loaded, no device"
	// Rejected means that a step failed or did not end, or that the kernel crashed, was tainted or logged a warning.
	Rejected = "rejected"
)

// Config says what to load and in which machine.
type Config struct {
	// Boot is a folder with the kernel, as for [vm.Config.Boot]. With emugpu.ko in it, the machine has an emulated GPU.
	Boot string
	// Modules maps module names, such as nvidia-uvm, to files. The machine has the architecture of these files.
	Modules map[string]string
	// Userspace is the folder of the driver's user space, with lib64/libnvidia-ml.so.1 (NVML).
	Userspace string
	// Firmware is a folder with firmware/nvidia/<VERSION>/. "" means that the driver has none.
	Firmware string
	// Version is the driver version that NVML must report.
	Version string
	// Init and Probe are the paths of guestinit and nvmlprobe for amd64. The programs for arm64 lie beside them:
	// guestinit-arm64 and nvmlprobe-arm64.
	Init, Probe string
	// KernelArgs are arguments, such as module.sig_enforce=1, that are added to the kernel's command line.
	KernelArgs []string
	// Timeout is the time after which the machine is stopped. 0 means 5 minutes.
	Timeout time.Duration
	// Watch receives the machine's progress. It may be nil.
	Watch func(vm.Progress)
}

// Run boots the machine, loads the modules, asks NVML and unloads the modules. If the test rejects the driver, Run
// returns the verdict and a fault.LoadTestFailed error. After any other error the verdict is nil. The console's output
// goes to the given writer, which may be nil.
func Run(ctx context.Context, c Config, console io.Writer) (*Verdict, error) {
	c.Modules = normalise(c.Modules)
	if err := c.validate(); err != nil {
		return nil, err
	}
	gpu, err := exists(filepath.Join(c.Boot, vm.BootGPU))
	if err != nil {
		return nil, fmt.Errorf("prepare the load test: %w", err)
	}
	p, err := newPlan(c)
	if err != nil {
		return nil, fmt.Errorf("prepare the load test: %w", err)
	}
	p.gpu = gpu
	res, err := vm.Run(ctx, vm.Config{
		Boot: c.Boot, Arch: p.arch, GPU: gpu, Init: Helper(c.Init, p.arch), Files: p.files, Steps: p.steps,
		KernelArgs: c.KernelArgs, Console: console, Watch: c.Watch, Timeout: c.Timeout,
	})
	var crash *vm.CrashError
	if err != nil && !errors.As(err, &crash) {
		return nil, fmt.Errorf("load test: %w", err)
	}
	v := judge(p, res)
	if v.State == Rejected {
		return v, fault.New(fault.LoadTestFailed, "load test: "+v.Reason,
			"read the kernel log of the test machine: it is in the build's log")
	}
	return v, nil
}

func (c Config) validate() error {
	var errs []error
	if c.Modules["nvidia"] == "" {
		errs = append(errs, errors.New("no file of the module nvidia is given"))
	}
	if c.Version == "" {
		errs = append(errs, errors.New("no driver version is given"))
	}
	if c.Probe == "" {
		errs = append(errs, errors.New("no path of nvmlprobe is given"))
	}
	if len(errs) > 0 {
		return fault.Wrap(fault.Usage, fmt.Errorf("prepare the load test: %w", errors.Join(errs...)), "")
	}
	return nil
}

// exists reports whether there is a file or folder at path.
func exists(path string) (bool, error) {
	_, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
