package sandbox_test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// runLimited runs a shell script within the limits. It returns the script's output, and what the sandbox used.
func runLimited(t *testing.T, l sandbox.Limits, script string, binds ...sandbox.Bind) (string, sandbox.Usage, error) {
	t.Helper()
	needBubblewrap(t)
	var out bytes.Buffer
	var usage sandbox.Usage
	err := sandbox.Run(t.Context(), sandbox.Config{
		Argv: []string{"sh", "-c", script}, Dir: "/", Binds: binds, Output: &out, Limits: l, Usage: &usage,
		Env: map[string]string{"PATH": "/usr/bin:/bin"},
	})
	return out.String(), usage, err
}

// grab is a script that uses 60 MB of memory: until the input ends, tail must keep the last 60 MB.
const grab = `head -c 60000000 /dev/zero | tail -c 60000000 | wc -c`

// TestMemory checks that a program cannot get more memory than its limit, with or without a control group.
func TestMemory(t *testing.T) {
	t.Parallel()
	out, _, err := runLimited(t, sandbox.Limits{Memory: 32 << 20}, grab)
	if strings.Contains(out, "60000000") {
		t.Errorf("%s printed %q; want it refused", grab, out)
	}
	// Without a control group, each process has a limit. The allocation fails, and the program prints an error, which
	// package compile recognises. With a control group, the kernel kills the program.
	if sandbox.SupportedLimits().ControlGroup && !fault.Is(err, fault.OutOfMemory) {
		t.Errorf("Run = %v (%v); want out of memory", err, fault.Of(err))
	}
	if out, _, err := runLimited(t, sandbox.Limits{Memory: 2 << 30}, grab); err != nil ||
		strings.TrimSpace(out) != "60000000" {
		t.Errorf("with memory enough, Run = %q, %v", out, err)
	}
}

// TestTogether runs two sandboxes. Each stays within its own limit, but together they exceed the common limit. One of
// them must end with an error that says so.
func TestTogether(t *testing.T) {
	t.Parallel()
	if m := sandbox.SupportedLimits(); !m.ControlGroup {
		t.Skip(m.Reason)
	}
	// /tmp in a sandbox is in memory. Each of the two fills 24 MB there and waits until the other has done so.
	hold := func(l sandbox.Limits, self, other int, meet string) error {
		script := fmt.Sprintf(`head -c 24000000 /dev/zero >/tmp/x || exit 1; echo >/meet/%d; i=0; while [ $i -lt 100 ] && ! [ -e /meet/%d ]; do sleep 0.2; i=$((i+1)); done`, self, other)
		_, _, err := runLimited(t, l, script, sandbox.Bind{Host: meet, Inside: "/meet", Writable: true})
		return err
	}
	limits := sandbox.Limits{Memory: 40 << 20, Together: 40 << 20}
	if err := hold(limits, 0, 0, t.TempDir()); err != nil {
		t.Fatalf("alone: %v", err)
	}
	meet, errs := t.TempDir(), make([]error, 2)
	var group sync.WaitGroup
	for i := range errs {
		group.Go(func() {
			errs[i] = hold(limits, i, 1-i, meet)
			// If this one was killed before it wrote its file, the other must not wait for it.
			if err := os.WriteFile(filepath.Join(meet, strconv.Itoa(i)), nil, 0o644); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if err := cmp.Or(errs...); !fault.Is(err, fault.OutOfMemory) || !strings.Contains(err.Error(), "at the same time") {
		t.Errorf("two at once: %v; want one of them out of memory, for both together", errs)
	}
}

// TestDisk checks that the growth of the writable folders has a limit, even if no single file is large.
func TestDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	// Files that existed before the run do not count.
	if err := os.WriteFile(filepath.Join(dir, "before"), make([]byte, 40<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	// Bytes that the script writes before the first measurement do not count. So it writes until it is killed.
	script := `i=0; while :; do head -c 4000000 /dev/zero >/b/$i; i=$((i+1)); [ $i -lt 30 ] || sleep 0.2; done`
	_, usage, err := runLimited(t, sandbox.Limits{Disk: 32 << 20}, script,
		sandbox.Bind{Host: dir, Inside: "/b", Writable: true})
	if !fault.Is(err, fault.DiskFull) || fault.Hint(err) == "" || usage.Disk < 32<<20 {
		t.Errorf("Run = %v (%v), hint %q, usage %+v; want disk full, a hint and what it wrote", err, fault.Of(err),
			fault.Hint(err), usage)
	}
}

func TestLargeFile(t *testing.T) {
	t.Parallel()
	_, _, err := runLimited(t, sandbox.Limits{Disk: 1 << 20}, `exec head -c 2000000 /dev/zero >/tmp/x`)
	if !fault.Is(err, fault.DiskFull) || !strings.Contains(err.Error(), "a file of more than 1 MiB") {
		t.Errorf("Run = %v (%v); want disk full", err, fault.Of(err))
	}
}

// TestMinFree checks that Run fails before the program starts if a disk has too little free space.
func TestMinFree(t *testing.T) {
	t.Parallel()
	out, _, err := runLimited(t, sandbox.Limits{MinFree: 1 << 60}, `echo begun`,
		sandbox.Bind{Host: t.TempDir(), Inside: "/b", Writable: true})
	if !fault.Is(err, fault.DiskFull) || !strings.Contains(err.Error(), "MiB left") || out != "" {
		t.Errorf("Run on a full disk = %v (%v), printed %q; want disk full and nothing begun", err, fault.Of(err), out)
	}
}

func TestTime(t *testing.T) {
	t.Parallel()
	_, _, err := runLimited(t, sandbox.Limits{Time: 50 * time.Millisecond}, `sleep 600`)
	if !fault.Is(err, fault.TimedOut) || !strings.Contains(err.Error(), "longer than 50ms") {
		t.Errorf("Run = %v (%v); want timed out", err, fault.Of(err))
	}
}

// TestProcesses checks the limit on processes for an ordinary user, and for root with a control group.
func TestProcesses(t *testing.T) {
	t.Parallel()
	if os.Getuid() == 0 && !sandbox.SupportedLimits().ControlGroup {
		t.Skipf("RLIMIT_NPROC does not bind root, and %v", sandbox.SupportedLimits().Reason)
	}
	// Without a control group, the limit also counts other processes of this user.
	out, _, err := runLimited(t, sandbox.Limits{Processes: 16},
		`i=0; while [ $i -lt 30 ]; do sleep 600 & i=$((i+1)); done; echo all`)
	if err == nil || strings.Contains(out, "all") {
		t.Errorf("Run = %q, %v; want it to fail at the sixteenth process", out, err)
	}
	if sandbox.SupportedLimits().ControlGroup && !strings.Contains(err.Error(), "more than 16 processes") {
		t.Errorf("Run = %v; want the limit named", err)
	}
}

// TestBoundsSayWhy checks that SupportedLimits says why there is no control group, with a hint how to get one.
func TestBoundsSayWhy(t *testing.T) {
	t.Parallel()
	m := sandbox.SupportedLimits()
	if m.ControlGroup != (m.Reason == nil) || m.Reason != nil && fault.Hint(m.Reason) == "" {
		t.Errorf("SupportedLimits() = %+v, hint %q; want either a control group or why not", m, fault.Hint(m.Reason))
	}
}

// asUser is an environment variable. It tells this program that TestAsOrdinaryUser runs it as another user.
const asUser = "PREBAKE_TEST_AS_USER"

// TestAsOrdinaryUser checks that the tests of the sandbox's isolation pass without root.
func TestAsOrdinaryUser(t *testing.T) {
	t.Parallel()
	needBubblewrap(t)
	if os.Getuid() != 0 || os.Getenv(asUser) != "" {
		t.Skip("this is an ordinary user already")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "sandbox-user-") // another user cannot enter the folders of t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	text, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	copied, tmp := filepath.Join(dir, "sandbox.test"), filepath.Join(dir, "tmp")
	program.Write(t, copied, text)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(tmp, 0o755), os.Chown(tmp, 65532, 65532)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), copied, "-test.v", "-test.timeout=2m", "-test.run",
		"^Test(Inside|NoNetwork|Binds|Exit|Memory|Disk|Processes|DiesWithParent)$")
	cmd.Dir, cmd.Env = tmp, []string{"PATH=/usr/bin:/bin", "TMPDIR=" + tmp, asUser + "=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532, NoSetGroups: true}}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Contains(string(out), "--- SKIP") ||
		!strings.Contains(string(out), "--- PASS: TestProcesses") {
		t.Errorf("as uid 65532: %v\n%s", err, out)
	}
}
