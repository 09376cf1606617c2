package vm

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

func TestCrashLine(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, console, want string }{
		{"none", "[    0.000000] Linux version 6.1\n", ""},
		{"end of init", "[    1.2] Run /init as init process\r\n[    5.133] Kernel panic - not syncing: Attempted to kill " +
			"init! exitcode=0x00000200\r\n",
			"Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000200"},
		{"oops before its panic",
			"[    7.1] BUG: kernel NULL pointer dereference, address: 0000000000000008\n[    7.2] Oops: 0000 [#1] PREEMPT " +
				"SMP\n[    7.9] Kernel panic - not syncing: Fatal exception\n",
			"BUG: kernel NULL pointer dereference, address: 0000000000000008"},
		{"fault", "[ 7.1] general protection fault, probably for non-canonical address 0xdead: 0000 [#1]\n[ 8.0] Kernel " +
			"panic - not syncing: Fatal exception\n",
			"general protection fault, probably for non-canonical address 0xdead: 0000 [#1]"},
		{"oops on arm64", "[    7.1] Unable to handle kernel NULL pointer dereference at virtual address " +
			"0000000000000010\n[    7.2] Internal error: Oops: 0000000096000045 [#1] SMP\n",
			"Unable to handle kernel NULL pointer dereference at virtual address 0000000000000010"},
		{"assertion", "[    7.1] kernel BUG at mm/slub.c:1!\n[    7.2] invalid opcode: 0000 [#1]\n",
			"kernel BUG at mm/slub.c:1!"},
		{"warning", "[ 7.1] WARNING: CPU: 0 PID: 1 at mm/vmalloc.c:1\n", ""},
		{"words of a program", "fetcher: says Kernel panic - not syncing\n[   1.0] x: BUG: y\n", ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if got := crashLine(row.console); got != row.want {
				t.Errorf("crashLine() = %q; want %q", got, row.want)
			}
		})
	}
}

func FuzzCrashLine(f *testing.F) {
	f.Add("[    7.1] BUG: x\n")
	f.Add("[] Oops: \r\n[")
	f.Fuzz(func(t *testing.T, console string) {
		if len(console) > 1<<16 {
			return
		}
		if got := crashLine(console); strings.ContainsRune(got, '\n') {
			t.Errorf("crashLine(%q) = %q; want one line", console, got)
		}
	})
}

func recorded(steps int, events ...wire.Event) (*recorder, error) {
	r := &recorder{start: time.Now()}
	for i := range steps {
		r.config.Steps = append(r.config.Steps, Step{Name: string(rune('a' + i))})
	}
	for _, e := range events {
		if err := r.event(e); err != nil {
			return r, err
		}
	}
	return r, nil
}

func TestRecorder(t *testing.T) {
	t.Parallel()
	r, err := recorded(3,
		wire.Event{Type: wire.Hello}, wire.Event{Type: wire.Ready, Kernel: "boot\n"},
		wire.Event{Type: wire.Begin, Step: 0},
		wire.Event{Type: wire.Begin, Step: 1},
		wire.Event{Type: wire.Output, Step: 0, Stream: "stdout", Data: []byte("in the ")},
		wire.Event{Type: wire.Output, Step: 0, Stream: "stdout", Data: []byte("background")},
		wire.Event{Type: wire.End, Step: 1, Exit: 19, Error: "no such device", Seconds: 2, Kernel: "NVRM\n"},
		wire.Event{Type: wire.Begin, Step: 2},
		wire.Event{Type: wire.Output, Step: 2, Stream: "stderr", Data: []byte("oh")},
	)
	if err != nil {
		t.Fatal(err)
	}
	want := &Result{KernelLog: "boot\nNVRM\n", Steps: []StepResult{
		{Name: "a", Stdout: []byte("in the background")},
		{Name: "b", ExitCode: 19, Error: "no such device", Ended: true, Seconds: 2, KernelLog: "NVRM\n"},
		{Name: "c", Stderr: []byte("oh")},
	}}
	if diff := cmp.Diff(want, r.result(), cmpopts.IgnoreFields(Result{}, "BootSeconds")); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
	if got := r.runningStep(); got != "c" {
		t.Errorf("running() = %q; want c", got)
	}
}

func TestRecorderRefusesNonsense(t *testing.T) {
	t.Parallel()
	for _, e := range []wire.Event{{Type: wire.Begin, Step: 1}, {Type: wire.End, Step: 0},
		{Type: wire.Output, Step: 7, Stream: "stdout"}} {
		if _, err := recorded(1, e); err == nil {
			t.Errorf("event %+v was taken; want an error", e)
		}
	}
}

func TestVerdict(t *testing.T) {
	t.Parallel()
	begin := wire.Event{Type: wire.Begin}
	overran, stop := context.WithTimeoutCause(t.Context(), 0, errOverran)
	defer stop()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	killed := errors.New("signal: killed")
	for _, row := range []struct {
		name   string
		ctx    context.Context
		events []wire.Event
		ends   ends
		kind   fault.Kind
		want   string // "" means no error
	}{
		{"good", t.Context(), []wire.Event{begin, {Type: wire.End}, {Type: wire.Finished}}, ends{}, 0, ""},
		{"good at the last moment", overran, []wire.Event{{Type: wire.Finished}}, ends{exit: killed}, 0, ""},
		{"too long", overran, []wire.Event{begin}, ends{exit: killed}, fault.TimedOut, `in step "a"`},
		{"too long to boot", overran, nil, ends{exit: killed}, fault.TimedOut, "while booting"},
		{"cancelled", cancelled, nil, ends{exit: killed}, fault.Cancelled, "context canceled"},
		{"crash", t.Context(), []wire.Event{begin}, ends{console: "[ 1.0] BUG: bad\n"}, fault.Internal,
			`guest kernel crashed in step "a": BUG: bad`},
		{"nonsense", cancelled, nil, ends{exit: killed, protocol: errors.New("line 1")}, fault.Internal, "line 1"},
		{"qemu's trouble", t.Context(), nil, ends{exit: errors.New("exit status 1"), stderr: "x\nqemu: no memory\n"},
			fault.Internal, "exit status 1: qemu: no memory"},
		{"init's trouble", t.Context(), []wire.Event{{Type: wire.Fatal, Error: "find eth0: no"}}, ends{}, fault.Internal,
			"find eth0: no"},
		{"silent end", t.Context(), nil, ends{console: "a\nlast words\n"}, fault.Internal, "last words"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r, err := recorded(1, row.events...)
			if err != nil {
				t.Fatal(err)
			}
			err = verdict(row.ctx, Config{}.WithDefaults(), r.result(), r, row.ends)
			if row.want == "" {
				if err != nil {
					t.Errorf("verdict() = %v; want none", err)
				}
				return
			}
			if err == nil || fault.Of(err) != row.kind || !strings.Contains(err.Error(), row.want) {
				t.Errorf("verdict() = %v (%v); want %q (%v)", err, fault.Of(err), row.want, row.kind)
			}
		})
	}
}

func TestRunWithoutEmulator(t *testing.T) {
	t.Parallel()
	c := sampleConfig(t)
	c.QEMU = filepath.Join(t.TempDir(), "qemu")
	_, err := Run(t.Context(), c)
	if !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "qemu-system-x86") {
		t.Errorf("Run() = %v, hint %q; want usage and the package's name", err, fault.Hint(err))
	}
}

// TestRunReportsWhatQEMUSays checks that Run's error has the message of qemu. A script in place of qemu fails as qemu
// does.
func TestRunReportsWhatQEMUSays(t *testing.T) {
	t.Parallel()
	c := sampleConfig(t)
	c.QEMU = filepath.Join(t.TempDir(), "qemu")
	script := "#!/bin/sh\necho noise >&3\necho '{\"type\":\"hello\"}' >&4\necho 'qemu: cannot set up guest memory' " +
		">&2\nexit 1\n"
	program.Write(t, c.QEMU, []byte(script))
	var console strings.Builder
	c.Console = &console
	_, err := Run(t.Context(), c)
	if err == nil || !strings.Contains(err.Error(), "cannot set up guest memory") {
		t.Errorf("Run() = %v; want qemu's words", err)
	}
	if console.String() != "noise\n" {
		t.Errorf("console = %q; want noise", console.String())
	}
}

func TestValidateReportsAllAtOnce(t *testing.T) {
	t.Parallel()
	err := Config{Boot: t.TempDir(), Init: "/nothing", GPU: true, MemoryMiB: 100, CPUs: 1, Steps: []Step{{}}}.Validate()
	if !fault.Is(err, fault.Usage) {
		t.Fatalf("Validate() = %v; want usage", err)
	}
	for _, want := range []string{"vmlinuz", "emugpu.ko", "guest's init", "memory of 100 MiB", "names no program"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Validate() = %v; want %q in it", err, want)
		}
	}
}

func TestArgs(t *testing.T) {
	t.Parallel()
	bare := strings.Join(Config{Boot: "/boot"}.WithDefaults().args(), " ")
	full := strings.Join(Config{Boot: "/boot", GPU: true, Network: true,
		KernelArgs: []string{"cros_debug"}, CountInstructions: true}.WithDefaults().args(), " ")
	for _, want := range []string{"-nic none", "-m 3072", "-smp 1", "-kernel /boot/vmlinuz", "-no-reboot"} {
		if !strings.Contains(bare, want) {
			t.Errorf("args() = %s; want %q in it", bare, want)
		}
	}
	if strings.Contains(bare, "memmap") {
		t.Errorf("args() = %s; want no memory reserved without a GPU", bare)
	}
	if strings.Contains(bare, "-icount") {
		t.Errorf("args() = %s; want a clock that follows the host's", bare)
	}
	for _, want := range []string{"memmap=96M$0x4f000000 cros_debug", "virtio-net-pci", "-netdev user,id=net",
		"-icount shift=0,"} {
		if !strings.Contains(full, want) {
			t.Errorf("args() = %s; want %q in it", full, want)
		}
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	t.Parallel()
	k := &tail{max: 4}
	for _, s := range []string{"abcd", "efgh", "ij\r"} {
		k.write([]byte(s))
	}
	if got := k.String(); got != "hij" {
		t.Errorf("tail = %q; want hij", got)
	}
}

func TestArgsOfArchitectures(t *testing.T) {
	t.Parallel()
	for arch, want := range map[target.Arch][]string{
		target.AMD64: {"-machine q35", "-serial chardev:events", "console=ttyS0,115200 panic=-1 oops=panic",
			"memmap=96M$0x4f000000"},
		target.ARM64: {"-machine virt", "-cpu neoverse-n1", "-serial chardev:console", "-device pci-serial,chardev=events",
			"console=ttyAMA0 panic=-1 oops=panic", "mem=2304M"},
	} {
		c := Config{Arch: arch, GPU: true}.WithDefaults()
		got := strings.Join(c.args(), " ")
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("args of %s = %s; want %q in it", arch, got, w)
			}
		}
		if got, want := c.QEMU, map[target.Arch]string{target.AMD64: "qemu-system-x86_64",
			target.ARM64: "qemu-system-aarch64"}[arch]; got != want {
			t.Errorf("emulator of %s = %s; want %s", arch, got, want)
		}
	}
	if err := (Config{Arch: "riscv64"}).WithDefaults().Validate(); err == nil ||
		!strings.Contains(err.Error(), `"riscv64"`) {
		t.Errorf("Validate(riscv64) = %v; want it named", err)
	}
}
