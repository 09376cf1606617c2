// Package vm boots a kernel in a qemu machine, runs a list of steps in it, and returns the output of steps and kernel.
// The machine runs in emulation, without hardware virtualisation. The guest sees only an initramfs, made for this run,
// and an optional disk. With an emulated GPU (package emugpu), NVIDIA's real driver loads in the guest.
//
// The package does not decide whether a step's result is good. It never leaves a machine running after its caller has
// ended.
package vm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm/emugpu"
	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

// Names of files in a boot folder. A mirror that deploy/mirror makes has the same names.
const (
	BootKernel  = "vmlinuz"
	BootModules = "modules"
	BootOrder   = "modules/order"
	BootGPU     = "emugpu.ko"
)

// HostAddress is the address at which the guest reaches the host's loopback interface.
const HostAddress = "10.0.2.2"

// File is one entry of the guest's root. At most one of Path, Data and Link is set. If none of them is set, the entry
// is a folder.
type File struct {
	// Name is the absolute path in the guest. Missing parent folders are created.
	Name string
	// Mode has the permission bits. If Mode is 0, a file from Path gets 0755 if it is executable on the host and else
	// 0644, a file from Data gets 0644, and a folder gets 0755.
	Mode fs.FileMode
	// Path is a file on the host.
	Path string
	// Data is the content. If Data is empty but not nil, the file is empty.
	Data []byte
	// Link is the target of a symbolic link.
	Link string
}

// Step is a program to run in the guest, or a built-in of guestinit:
//
//	@insmod FILE [PARAMETER...]   @rmmod NAME
//	@cat FILE...                  @ls FOLDER...
//	@mknod PATH MAJOR MINOR       @nvidia-nodes
//	@open FILE...                 @wait PATH...
//	@dial HOST:PORT...            @stop NAME (end a background step)
//	@mount DEVICE FOLDER (ext4; the folder is made)
type Step struct {
	// Name identifies the step in the result; "" means Argv joined.
	Name string
	Argv []string
	// Env is added to the default environment: PATH, HOME and TERM.
	Env []string
	// Timeout is the time limit of the step. A step that exceeds it ends with exit code 124. 0 means no limit.
	Timeout time.Duration
	// KeepGoing continues with the next step even if this one fails.
	KeepGoing bool
	// Background starts the program and continues with the next step at once. The program gets SIGTERM from @stop, or
	// after the last step.
	Background bool
}

// Config describes a machine and its steps.
type Config struct {
	// Boot is a folder with vmlinuz, modules/order and the modules that order lists. It may also have emugpu.ko and
	// [BootArgs].
	Boot string
	// Arch is the machine's architecture; "" means amd64.
	Arch target.Arch
	// GPU adds the emulated GPU to the machine.
	GPU bool
	// Init is the path of the guestinit program on the host.
	Init string
	// Files are further files in the guest's root.
	Files []File
	Steps []Step
	// Network gives the guest a user-mode network, in which [HostAddress] is the host's loopback interface.
	Network bool
	// MemoryMiB is the guest's memory in MiB; 0 means 3072. If GPU is true, MemoryMiB must be at least emugpu.Memory.
	MemoryMiB int
	// Disk is the path of a raw image on the host, for /dev/vda in the guest; "" means no disk. The image stays after the
	// run, without data that the guest did not flush.
	Disk string
	// CPUs is the number of virtual processors; 0 means 1.
	CPUs int
	// CountInstructions makes the guest's clock independent of the emulator's speed. The clock advances by 1 ns for each
	// instruction, and by the host's time while the guest is idle.
	CountInstructions bool
	// KernelArgs are added to the kernel's command line, after the arguments in the boot folder's [BootArgs].
	KernelArgs []string
	// Console receives the text of the first serial port as it arrives. It may be nil.
	Console io.Writer
	// Watch is called for each [Progress], in order and never concurrently. It may be nil.
	Watch func(Progress)
	// Timeout is the time limit of the whole run; 0 means 5 minutes.
	Timeout time.Duration
	// QEMU is the emulator program. "" means the emulator for Arch in PATH, such as qemu-system-x86_64.
	QEMU string
}

// Progress is one report to Config.Watch while the machine runs.
type Progress struct {
	// Step is the name of the step; "" before the first one.
	Step string
	// State is "ready", "begin", "output" or "end".
	State string
	// Stream (stdout or stderr) and Data are set with State "output".
	Stream string
	Data   []byte
	// ExitCode and Seconds are set with State "end". Seconds is also set with "ready".
	ExitCode int
	Seconds  float64
}

// StepResult is the result of one step.
type StepResult struct {
	Name string
	// ExitCode of a program is its exit status, or:
	//   - 128 + the signal that killed it
	//   - 127 if it could not start
	//   - 124 if it exceeded its time limit
	//
	// ExitCode of a built-in is the errno, or 0 for success.
	ExitCode       int
	Stdout, Stderr []byte
	// Error says why a step could not run or was ended. For a built-in it is the error text.
	Error string
	// Ended is false if the machine ended before the step.
	Ended   bool
	Seconds float64
	// KernelLog is the kernel's log during the step.
	KernelLog string
}

// Result is the result of a machine's run.
type Result struct {
	// Steps has the steps that started, in order.
	Steps []StepResult
	// KernelLog is the kernel's log from boot to end, in dmesg's format. If the machine crashed or ended early, it is the
	// console's text, which shows the crash.
	KernelLog string
	// BootSeconds is the time from qemu's start until the first step could run.
	BootSeconds float64
	// Seconds is the time from qemu's start to its end.
	Seconds float64
	// Crash is the kernel's message about its oops or panic; "" means no crash.
	Crash string
	// InitramfsBytes is the size of the initramfs in bytes.
	InitramfsBytes int64
	// Machine describes the guest's machine in one line.
	Machine string
}

// Step returns the first result with this name.
func (r *Result) Step(name string) (StepResult, bool) {
	for _, s := range r.Steps {
		if s.Name == name {
			return s, true
		}
	}
	return StepResult{}, false
}

// CrashError is the error of a run in which the guest's kernel crashed. [Run] returns it together with a result that
// has everything received before the crash.
type CrashError struct {
	// Line is the kernel's message about the crash.
	Line string
	// Step is the name of the step that was running; "" means none.
	Step string
}

func (e *CrashError) Error() string {
	if e.Step == "" {
		return "guest kernel crashed: " + e.Line
	}
	return fmt.Sprintf("guest kernel crashed in step %q: %s", e.Step, e.Line)
}

const (
	defaultMemory  = 3072
	defaultTimeout = 5 * time.Minute
)

// WithDefaults returns a copy of the config with the defaults that the comments of the fields name.
func (c Config) WithDefaults() Config {
	if c.MemoryMiB == 0 {
		c.MemoryMiB = defaultMemory
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.Arch == "" {
		c.Arch = target.AMD64
	}
	if c.QEMU == "" {
		c.QEMU = platforms[c.Arch].qemu
	}
	steps := make([]Step, len(c.Steps))
	for i, s := range c.Steps {
		if s.Name == "" {
			s.Name = joinArgv(s.Argv)
		}
		steps[i] = s
	}
	c.Steps = steps
	return c
}

func joinArgv(argv []string) string {
	name := ""
	for i, a := range argv {
		if i > 0 {
			name += " "
		}
		name += a
	}
	return name
}

// Validate reports all problems of a config at once.
func (c Config) Validate() error {
	var errs []error
	say := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf(format, args...))
	}
	if _, ok := platforms[c.Arch]; !ok {
		say("machine of architecture %q: want amd64 or arm64", c.Arch)
	}
	need := []string{BootKernel}
	if c.GPU {
		need = append(need, BootGPU)
		if least := emugpu.Memory(c.Arch); c.MemoryMiB < least {
			say("memory of %d MiB: the emulated GPU needs at least %d MiB", c.MemoryMiB, least)
		}
	}
	for _, name := range need {
		if _, err := os.Stat(filepath.Join(c.Boot, filepath.FromSlash(name))); err != nil {
			say("find a file in the boot folder %s: %w", c.Boot, err)
		}
	}
	if _, err := os.Stat(c.Disk); c.Disk != "" && err != nil {
		say("find the disk: %w", err)
	}
	if _, err := os.Stat(c.Init); err != nil {
		say("find the guest's init: %w", err)
	}
	if c.MemoryMiB < 256 {
		say("memory of %d MiB: want at least 256 MiB", c.MemoryMiB)
	}
	if c.CPUs < 1 || c.CPUs > 64 {
		say("%d processors: want 1 to 64", c.CPUs)
	}
	names := map[string]bool{}
	for i, s := range c.Steps {
		if len(s.Argv) == 0 || s.Argv[0] == "" {
			say("step %d %q: the step names no program", i, s.Name)
		}
		if s.Background && names[s.Name] {
			say("step %d %q: want a name that no earlier step has, because the step runs in the background", i, s.Name)
		}
		names[s.Name] = true
	}
	if len(errs) == 0 {
		return nil
	}
	return fault.Wrap(fault.Usage, fmt.Errorf("configure machine: %w", errors.Join(errs...)), "")
}

func (c Config) script() wire.Script {
	s := wire.Script{GPU: c.GPU, Network: c.Network, Steps: []wire.Step{}}
	for _, step := range c.Steps {
		s.Steps = append(s.Steps, wire.Step{
			Name: step.Name, Argv: step.Argv, Env: step.Env, TimeoutMS: step.Timeout.Milliseconds(),
			KeepGoing: step.KeepGoing, Background: step.Background,
		})
	}
	return s
}
