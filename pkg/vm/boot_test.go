package vm_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm"
)

// bootFolder returns the folder that PREBAKE_BOOT names. The folder has a real kernel; the end-to-end tests set the
// variable.
func bootFolder(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("PREBAKE_BOOT")
	if dir == "" {
		t.Skip("PREBAKE_BOOT is not set to a folder with vmlinuz, modules/ and emugpu.ko")
	}
	return dir
}

// bootArch returns the architecture of a kernel. An image for arm64 has a magic number at byte 56
// (Documentation/arch/arm64/booting.rst in the kernel's source).
func bootArch(t *testing.T, boot string) target.Arch {
	t.Helper()
	f, err := os.Open(filepath.Join(boot, vm.BootKernel))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 56); err != nil {
		t.Fatal(err)
	}
	if string(magic) == "ARM\x64" {
		return target.ARM64
	}
	return target.AMD64
}

func mustStep(t *testing.T, res *vm.Result, name string) vm.StepResult {
	t.Helper()
	s, ok := res.Step(name)
	if !ok {
		t.Fatalf("step %q did not start; steps: %+v", name, res.Steps)
	}
	return s
}

func TestBootWithNetworkAndGPU(t *testing.T) {
	t.Parallel()
	boot := bootFolder(t)
	arch := bootArch(t, boot)
	init := program.Build(t, "pkg/vm/guestinit", string(arch))
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	res, err := vm.Run(t.Context(), vm.Config{
		Boot: boot, Arch: arch, Init: init, GPU: true, Network: true, Timeout: 3 * time.Minute,
		Files: []vm.File{{Name: "/etc/greeting", Data: []byte("hello\n")}, {Name: "/etc/link", Link: "greeting"}},
		Steps: []vm.Step{
			{Name: "cat", Argv: []string{"@cat", "/etc/link"}},
			{Name: "gpu", Argv: []string{"@cat", "/sys/bus/pci/devices/0001:00:00.0/resource",
				"/sys/bus/pci/devices/0001:00:00.0/vendor"}},
			{Name: "route", Argv: []string{"@cat", "/proc/net/route", "/proc/cmdline"}},
			{Name: "host", Argv: []string{"@dial", net.JoinHostPort(vm.HostAddress, port)}},
			{Name: "unload", Argv: []string{"@rmmod", "emugpu"}},
			{Name: "load again", Argv: []string{"@insmod", "/prebake/emugpu.ko"}},
			{Name: "twice", Argv: []string{"@insmod", "/prebake/emugpu.ko"}, KeepGoing: true},
			{Name: "missing", Argv: []string{"/bin/nothing"}},
			{Name: "not run", Argv: []string{"@cat", "/etc/link"}},
		},
	})
	if err != nil {
		t.Fatalf("Run() = %v", err)
	}
	t.Logf("boot %.2f s, all %.2f s, initramfs %d bytes; %s", res.BootSeconds, res.Seconds, res.InitramfsBytes,
		res.Machine)
	if got := string(mustStep(t, res, "cat").Stdout); got != "hello\n" {
		t.Errorf("cat = %q; want hello", got)
	}
	gpu := string(mustStep(t, res, "gpu").Stdout)
	windows := map[target.Arch][]string{
		target.AMD64: {"0x0000000050000000 0x0000000050ffffff", "0x0000000051000000 0x0000000051ffffff",
			"0x0000000052000000 0x0000000053ffffff"},
		target.ARM64: {"0x00000000d2000000 0x00000000d2ffffff", "0x00000000d3000000 0x00000000d3ffffff",
			"0x00000000d4000000 0x00000000d5ffffff"},
	}
	for _, want := range append(windows[arch], "0x10de") {
		if !strings.Contains(gpu, want) {
			t.Errorf("emulated GPU = %s; want %s in it", gpu, want)
		}
	}
	if route := string(mustStep(t, res, "route").Stdout); !strings.Contains(route, "0202000A") {
		t.Errorf("routes = %s; want one by 10.0.2.2", route)
	}
	for name, want := range map[string]int{"host": 0, "unload": 0, "load again": 0, "twice": 17, "missing": 127} {
		if s := mustStep(t, res, name); s.ExitCode != want {
			t.Errorf("step %q = %d (%s); want %d", name, s.ExitCode, s.Error, want)
		}
	}
	if _, ok := res.Step("not run"); ok {
		t.Error("a step after a failed one ran")
	}
	if !strings.Contains(res.KernelLog, "Linux version") || res.Crash != "" {
		t.Errorf("kernel log of %d bytes, crash %q; want a boot log and no crash", len(res.KernelLog), res.Crash)
	}
}

// TestBootWithDisk checks that a disk keeps its data after the machine was switched off. At the next boot it must have
// only the data that was flushed.
func TestBootWithDisk(t *testing.T) {
	t.Parallel()
	boot := bootFolder(t)
	if bootArch(t, boot) != target.AMD64 {
		t.Skip("this test runs the host's shell in the machine, so it needs a kernel for amd64")
	}
	image := filepath.Join(t.TempDir(), "a,disk.img") // the comma checks how commas are quoted on qemu's command line
	if err := errors.Join(os.WriteFile(image, nil, 0o644), os.Truncate(image, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-F", "-t", "ext4",
		image).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	tools := []string{"/bin/sh", "/usr/bin/sync"}
	files, err := vm.GlibcFiles(tools...)
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range tools {
		files = append(files, vm.File{Name: tool, Path: tool, Mode: 0o755})
	}
	c := vm.Config{Boot: boot, Init: program.Build(t, "pkg/vm/guestinit", string(target.AMD64)), Disk: image, Files: files,
		Timeout: 2 * time.Minute}
	mount := vm.Step{Argv: []string{"@mount", "/dev/vda", "/data"}}
	c.Steps = []vm.Step{mount,
		{Argv: []string{"/bin/sh", "-c",
			"echo kept > /data/kept; sync; echo lost > /data/lost; echo b > /proc/sysrq-trigger; read wait"}}}
	if _, err := vm.Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "switched itself off too early") {
		t.Fatalf("first boot: %v; want the power cut", err)
	}
	c.Steps = []vm.Step{mount, {Name: "kept", Argv: []string{"@cat", "/data/kept"}},
		{Name: "lost", Argv: []string{"@cat", "/data/lost"}, KeepGoing: true}}
	res, err := vm.Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if kept, lost := mustStep(t, res, "kept").Stdout, mustStep(t, res, "lost").Stdout; string(kept) != "kept\n" ||
		len(lost) > 0 {
		t.Errorf("after the power cut the disk has %q and %q; want only the flushed data", kept, lost)
	}
}

// TestBootWithoutSerialDriver checks that events arrive from a kernel that has no driver for their serial port, such as
// COS's kernels for arm64. A kernel argument disables the driver. On amd64, the machine gets the PCI serial port of
// arm64.
func TestBootWithoutSerialDriver(t *testing.T) {
	t.Parallel()
	boot := bootFolder(t)
	arch := bootArch(t, boot)
	qemu := ""
	if arch == target.AMD64 {
		qemu = filepath.Join(t.TempDir(), "qemu")
		program.Write(t, qemu, []byte(`#!/bin/bash
exec qemu-system-x86_64 "${@/#chardev:events/none}" -device pci-serial,chardev=events
`))
	}
	all := make([]byte, 100<<10) // more than fits into one event
	for i := range all {
		all[i] = byte(i)
	}
	res, err := vm.Run(t.Context(), vm.Config{
		Boot: boot, Arch: arch, Init: program.Build(t, "pkg/vm/guestinit", string(arch)), QEMU: qemu,
		Timeout:    3 * time.Minute,
		KernelArgs: []string{"initcall_blacklist=serial_pci_driver_init"},
		Files:      []vm.File{{Name: "/etc/all", Data: all}},
		Steps: []vm.Step{
			{Name: "drivers", Argv: []string{"@ls", "/sys/bus/pci/drivers"}},
			{Name: "all", Argv: []string{"@cat", "/etc/all"}},
		},
	})
	if err != nil {
		t.Fatalf("Run() = %v", err)
	}
	t.Logf("boot %.2f s, %d bytes in %.2f s, all %.2f s", res.BootSeconds, len(all), mustStep(t, res, "all").Seconds,
		res.Seconds)
	if got := string(mustStep(t, res, "drivers").Stdout); strings.Contains(got, "/serial") ||
		!strings.Contains(got, "/pcieport") {
		t.Errorf("PCI drivers = %s; want the serial one off", got)
	}
	if got := mustStep(t, res, "all").Stdout; !bytes.Equal(got, all) {
		t.Errorf("%d bytes came as %d, or changed", len(all), len(got))
	}
}

func TestBootCrashIsReported(t *testing.T) {
	t.Parallel()
	boot := bootFolder(t)
	arch := bootArch(t, boot)
	// The kernel panics when process 1 ends. So any static program that ends is a suitable init.
	res, err := vm.Run(t.Context(),
		vm.Config{Boot: boot, Arch: arch, Init: program.Build(t, "pkg/vm/testdata/quitter", string(arch)),
			Timeout: 2 * time.Minute})
	var crash *vm.CrashError
	if !errors.As(err, &crash) {
		t.Fatalf("Run() = %v; want a CrashError", err)
	}
	if !strings.Contains(crash.Line, "Attempted to kill init") || !strings.Contains(res.KernelLog, "Linux version") {
		t.Errorf("crash = %q with %d bytes of log; want the panic's line and the console", crash.Line, len(res.KernelLog))
	}
}

func TestBootEndsWithItsContext(t *testing.T) {
	t.Parallel()
	boot := bootFolder(t)
	arch := bootArch(t, boot)
	init := program.Build(t, "pkg/vm/guestinit", string(arch))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := vm.Run(ctx, vm.Config{
		Boot: boot, Arch: arch, Init: init, Timeout: 2 * time.Minute,
		Steps: []vm.Step{{Name: "forever", Argv: []string{"@wait", "/never"}}},
		Watch: func(p vm.Progress) {
			if p.State == "begin" {
				cancel()
			}
		},
	})
	if !fault.Is(err, fault.Cancelled) {
		t.Errorf("Run() = %v, a %v; want cancelled", err, fault.Of(err))
	}
}
