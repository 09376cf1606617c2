package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm/emugpu"
)

// platform has the parts of qemu's command line that depend on the architecture.
type platform struct {
	qemu, pkg    string // the emulator, and the Debian package that has it
	machine, cpu string
	console      string // value of the kernel's console= argument
	events       []string
}

// platforms has the machine of each architecture.
//
// On amd64 the processor has everything that the emulator supports, except AVX2, ERMS and FSRM. Under emulation, Go's
// AVX2 code for SHA-256 is slower than its plain code. With ERMS or FSRM, the kernel copies with "rep movsb", which the
// emulator executes byte by byte. Without them, it copies eight bytes at a time.
//
// On arm64 the processor is a Neoverse N1, as in COS's Arm nodes. With qemu's processor "max", the emulation of pointer
// authentication would take most of the time. The only built-in serial port is the console, so the events use a serial
// port on PCI.
var platforms = map[target.Arch]platform{
	target.AMD64: {
		qemu: "qemu-system-x86_64", pkg: "qemu-system-x86", machine: "q35", cpu: "max,avx2=off,erms=off,fsrm=off",
		console: "ttyS0,115200", events: []string{"-serial", "chardev:events"},
	},
	target.ARM64: {
		qemu: "qemu-system-aarch64", pkg: "qemu-system-arm", machine: "virt", cpu: "neoverse-n1",
		console: "ttyAMA0", events: []string{"-device", "pci-serial,chardev=events"},
	},
}

// machine is one running qemu process.
type machine struct {
	start           time.Time
	console, events *os.File
	stderr          *tail
	done            chan error
}

// args returns qemu's command line. File descriptors 3 to 5 are the console, the events and the initramfs.
func (c Config) args() []string {
	p := platforms[c.Arch]
	kernel := []string{
		"console=" + p.console, "panic=-1", "oops=panic", "nokaslr", "nmi_watchdog=0", "rdinit=/init",
	}
	if c.GPU {
		kernel = append(kernel, emugpu.KernelArg(c.Arch))
	}
	kernel = append(kernel, c.KernelArgs...)
	// The machine does not boot from the network: the empty romfile leaves out the card's boot code.
	nic := []string{"-nic", "none"}
	if c.Network {
		nic = []string{"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="}
	}
	var disk []string
	if c.Disk != "" {
		file := strings.ReplaceAll(c.Disk, ",", ",,") // qemu writes a comma in a value as two commas
		disk = []string{"-drive", "if=none,id=disk,format=raw,file=" + file, "-device", "virtio-blk-pci,drive=disk"}
	}
	var clock []string
	if c.CountInstructions { // qemu's manual: shift=N means 2^N ns for each instruction
		clock = []string{"-icount", "shift=0,align=off,sleep=on"}
	}
	return slices.Concat(nic, disk, clock, []string{
		"-nodefaults", "-no-user-config", "-machine", p.machine, "-accel", "tcg", "-cpu", p.cpu,
		"-smp", strconv.Itoa(c.CPUs), "-m", strconv.Itoa(c.MemoryMiB),
		"-display", "none", "-vga", "none", "-no-reboot",
		"-chardev", "file,id=console,path=/dev/fd/3", "-serial", "chardev:console",
		"-chardev", "file,id=events,path=/dev/fd/4",
		"-kernel", filepath.Join(c.Boot, BootKernel), "-initrd", "/dev/fd/5",
		"-append", strings.Join(kernel, " "),
	}, p.events) // these options come after the console's, because the first -serial is the first port
}

// describe returns one line about the guest's machine, with qemu's version.
func (c Config) describe(ctx context.Context) string {
	p := platforms[c.Arch]
	text := fmt.Sprintf("machine %s, processor %s (%d), emulated, %d MiB", p.machine, p.cpu, c.CPUs, c.MemoryMiB)
	out, err := exec.CommandContext(ctx, c.QEMU, "--version").Output()
	if line, _, _ := strings.Cut(string(out), "\n"); err == nil && line != "" {
		text = line + ", " + text
	}
	return text
}

// start starts qemu. The process is killed when ctx ends or when this process ends.
func start(ctx context.Context, c Config, initrd *os.File) (_ *machine, err error) {
	qemu, err := exec.LookPath(c.QEMU)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("find emulator: %w", err),
			"install Debian's package "+platforms[c.Arch].pkg)
	}
	consoleR, consoleW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	eventsR, eventsW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start machine: %w", err), consoleR.Close(), consoleW.Close())
	}
	m := &machine{console: consoleR, events: eventsR, stderr: &tail{max: 64 << 10}, done: make(chan error, 1)}
	cmd := exec.CommandContext(ctx, qemu, c.args()...)
	cmd.Stderr = writerFunc(func(p []byte) (int, error) { m.stderr.write(p); return len(p), nil })
	cmd.ExtraFiles = []*os.File{consoleW, eventsW, initrd}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	m.start = time.Now()
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that started the child ends, so that thread must live on.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		m.done <- cmd.Wait()
	}()
	err = <-started
	// The child has its own copies of the write ends. If this process kept its copies open, the readers would never see
	// the end.
	err = errors.Join(err, consoleW.Close(), eventsW.Close())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", qemu, err), consoleR.Close(), eventsR.Close())
	}
	return m, nil
}

// wait returns when qemu has ended. The readers then reach the end of both pipes.
func (m *machine) wait() error { return <-m.done }

func (m *machine) close() error { return errors.Join(m.console.Close(), m.events.Close()) }

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func newBuffered(w io.Writer) *bufio.Writer { return bufio.NewWriterSize(w, 1<<20) }
