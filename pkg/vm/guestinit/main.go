// Command guestinit is /init of Prebake's virtual machines, and runs only as process 1:
//   - It mounts the file systems that Linux programs expect.
//   - It loads the kernel modules in the initramfs, and starts the network.
//   - It runs the steps of a script, and reports each step over the second serial port.
//   - It powers off.
//
// Built-in steps handle modules, device nodes and files, so the guest needs no shell.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guestinit: runs only as process 1 of a virtual machine")
		os.Exit(2)
	}
	boot()
	powerOff()
}

// boot runs the whole script. It recovers from every panic, because the kernel panics when process 1 ends.
func boot() {
	var host *link
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(os.Stderr, "guestinit: panic: %v\n%s", p, debug.Stack())
			if host != nil {
				host.send(wire.Event{Type: wire.Fatal, Error: fmt.Sprintf("guestinit panic: %v", p)})
			}
		}
	}()
	if err := mounts(); err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: %v\n", err)
		return
	}
	events, err := openPort(wire.Port(runtime.GOARCH))
	if err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: %v\n", err)
		return
	}
	host = &link{w: events}
	host.send(wire.Event{Type: wire.Hello})
	if err := script(host); err != nil {
		host.send(wire.Event{Type: wire.Fatal, Error: err.Error(), Kernel: host.kernel()})
	} else {
		host.send(wire.Event{Type: wire.Finished, Kernel: host.kernel()})
	}
	if err := events.drain(); err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: wait until the last events are sent: %v\n", err)
	}
}

func script(host *link) error {
	log, err := openKernelLog("/dev/kmsg")
	if err != nil {
		return err
	}
	host.log = log
	text, err := os.ReadFile(wire.ScriptPath)
	if err != nil {
		return fmt.Errorf("read script: %w", err)
	}
	var s wire.Script
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("read script: %w", err)
	}
	if err := prepare(s); err != nil {
		return err
	}
	host.send(wire.Event{Type: wire.Ready, Kernel: host.kernel()})
	r := &runner{host: host, builtins: builtins()}
	r.run(s.Steps)
	return nil
}

// prepare loads the kernel modules, and starts the network and the GPU.
func prepare(s wire.Script) error {
	names, err := moduleOrder(wire.OrderPath)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := insmod(filepath.Join(wire.ModulesDir, name), ""); err != nil {
			return fmt.Errorf("load the kernel module %s: %w", name, err)
		}
	}
	if s.Network {
		if err := network(10 * time.Second); err != nil {
			return fmt.Errorf("start network: %w", err)
		}
	}
	if s.GPU {
		if err := insmod(wire.GPUModule, ""); err != nil {
			return fmt.Errorf("load emulated GPU: %w", err)
		}
	}
	return nil
}

// moduleOrder reads a list of file names, one per line. A missing list counts as empty.
func moduleOrder(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read module order: %w", err)
	}
	var names []string
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		name := strings.TrimSpace(lines.Text())
		if name == "" {
			continue
		}
		if filepath.Base(name) != name {
			return nil, fmt.Errorf("read module order: entry %q: want a file name", name)
		}
		names = append(names, name)
	}
	return names, lines.Err()
}

func mounts() error {
	for _, m := range []struct {
		kind, at string
		flags    uintptr
		data     string
	}{
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
		if err := unix.Mount(m.kind, m.at, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}

func powerOff() {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: power off: %v\n", err)
	}
	select {}
}
