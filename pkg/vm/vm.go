// Package vm boots a kernel in a qemu machine without hardware
// virtualisation, runs a list of steps in it, and returns what they and the
// kernel said. Everything it may see is in an initramfs that is written for the
// run and gone afterwards, and possibly on one disk that stays. Its init is the
// program in guestinit; with an emulated GPU (package emugpu) NVIDIA's driver
// loads in it for real.
//
// It refuses to judge what the steps did, and to leave a machine running when
// its caller is gone.
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

// Names in a boot folder, as a COS-shaped mirror packs them.
const (
	BootKernel  = "vmlinuz"
	BootModules = "modules"
	BootOrder   = "modules/order"
	BootGPU     = "emugpu.ko"
)

// HostAddress is where the guest finds the host's loopback.
const HostAddress = "10.0.2.2"

// File is one entry of the guest's root. Exactly one of Path, Data and Link
// says what it is; all empty makes a folder.
type File struct {
	// Name is the absolute path in the guest. Folders above it are made.
	Name string
	// Mode holds permission bits; 0 means the source's for Path, else 0644
	// (folders 0755).
	Mode fs.FileMode
	// Path is a file on the host.
	Path string
	// Data is the content; non-nil and empty makes an empty file.
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
	// Env is added to PATH, HOME and TERM.
	Env []string
	// Timeout ends the step with exit code 124; 0 means never.
	Timeout time.Duration
	// KeepGoing runs the steps after it even if this one fails.
	KeepGoing bool
	// Background starts the program and goes on at once. It is asked to end by
	// @stop, or when all other steps are over.
	Background bool
}

// Config describes a machine and what it does.
type Config struct {
	// Boot is a folder with vmlinuz, modules/order and the modules it lists,
	// and possibly emugpu.ko and [BootArgs].
	Boot string
	// Arch is the machine's architecture; "" means amd64.
	Arch target.Arch
	// GPU gives the machine the emulated GPU.
	GPU bool
	// Init is the guestinit program on the host.
	Init string
	// Files is what the guest's root holds besides.
	Files []File
	Steps []Step
	// Network gives the guest a user-mode network on which the host's loopback
	// is [HostAddress].
	Network bool
	// MemoryMiB is the guest's memory; 0 means 3072. With the GPU at
	// least emugpu.Memory.
	MemoryMiB int
	// Disk is a raw image on the host that the guest has as /dev/vda; "" means none. It
	// outlives the machine, as a disk does a power cut: what the guest did not flush
	// is not on it.
	Disk string
	// CPUs is the number of virtual processors; 0 means 1.
	CPUs int
	// KernelArgs are added to the kernel's command line, after those of the boot
	// folder's [BootArgs].
	KernelArgs []string
	// Console gets the first serial port's text as it comes; may be nil.
	Console io.Writer
	// Watch is called for each piece of progress, in order, never
	// concurrently; may be nil.
	Watch func(Progress)
	// Timeout ends the whole run; 0 means 5 minutes.
	Timeout time.Duration
	// QEMU is the emulator; "" means the one for Arch from PATH, such as
	// qemu-system-x86_64.
	QEMU string
}

// Progress is what a watcher receives while the machine runs.
type Progress struct {
	// Step is the name of the step; "" before the first one.
	Step string
	// State is "ready", "begin", "output" or "end".
	State string
	// Stream (stdout or stderr) and Data come with "output".
	Stream string
	Data   []byte
	// ExitCode and Seconds come with "end", Seconds also with "ready".
	ExitCode int
	Seconds  float64
}

// StepResult is what one step did.
type StepResult struct {
	Name string
	// ExitCode is a program's exit status, 128 + signal if one killed it, 127
	// if it did not start, 124 if it ran too long. For a built-in it is the
	// errno, 0 for success.
	ExitCode       int
	Stdout, Stderr []byte
	// Error says why a step could not run or was ended; for a built-in it is
	// the failure.
	Error string
	// Ended is false for a step that was cut off by the machine's end.
	Ended   bool
	Seconds float64
	// KernelLog is what the kernel logged while the step ran.
	KernelLog string
}

// Result is what the machine did.
type Result struct {
	// Steps holds those that were started, in order.
	Steps []StepResult
	// KernelLog is the kernel's log from boot to end, as dmesg prints it; after
	// a crash it is the console's text instead, which has the crash.
	KernelLog string
	// BootSeconds is from qemu's start until the first step could run.
	BootSeconds float64
	// Seconds is from qemu's start to its end.
	Seconds float64
	// Crash is the kernel's line about its oops or panic; "" means none.
	Crash string
	// InitramfsBytes is the size of the initramfs.
	InitramfsBytes int64
	// Machine says in a line what the guest ran in.
	Machine string
}

// Step returns the first result of that name.
func (r *Result) Step(name string) (StepResult, bool) {
	for _, s := range r.Steps {
		if s.Name == name {
			return s, true
		}
	}
	return StepResult{}, false
}

// CrashError says that the guest's kernel crashed. [Run] returns it together
// with a result that holds what was seen until then.
type CrashError struct {
	// Line is the kernel's.
	Line string
	// Step was running; "" means none.
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

// WithDefaults returns a copy in which no zero has a meaning of its own.
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

// Validate reports everything that is wrong with a config at once.
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
			say("memory of %d MiB: the emulated GPU needs %d", c.MemoryMiB, least)
		}
	}
	for _, name := range need {
		if _, err := os.Stat(filepath.Join(c.Boot, filepath.FromSlash(name))); err != nil {
			say("boot folder %s: %w", c.Boot, err)
		}
	}
	if _, err := os.Stat(c.Disk); c.Disk != "" && err != nil {
		say("disk: %w", err)
	}
	if _, err := os.Stat(c.Init); err != nil {
		say("guest's init: %w", err)
	}
	if c.MemoryMiB < 256 {
		say("memory of %d MiB: want at least 256", c.MemoryMiB)
	}
	if c.CPUs < 1 || c.CPUs > 64 {
		say("%d processors: want 1 to 64", c.CPUs)
	}
	names := map[string]bool{}
	for i, s := range c.Steps {
		if len(s.Argv) == 0 || s.Argv[0] == "" {
			say("step %d %q: no program named", i, s.Name)
		}
		if s.Background && names[s.Name] {
			say("step %d %q: a background step needs a name of its own", i, s.Name)
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
