package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

func needBubblewrap(t *testing.T) {
	t.Helper()
	installed.Program(t, "bwrap")
}

// shell runs a shell script in a sandbox and returns its output.
func shell(t *testing.T, script string, binds ...sandbox.Bind) (string, error) {
	t.Helper()
	needBubblewrap(t)
	var out bytes.Buffer
	err := sandbox.Run(t.Context(), sandbox.Config{
		Argv: []string{"sh", "-c", script}, Dir: "/", Binds: binds, Output: &out,
		Env: map[string]string{"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
	})
	return strings.TrimSpace(out.String()), err
}

func TestInside(t *testing.T) {
	t.Parallel()
	rows := []struct{ name, script, want string }{
		{"only the given environment", `env | grep -v '^_=' | cut -d= -f1 | sort | tr '\n' ' '`, "HOME PATH PWD"},
		{"host name", `uname -n`, "prebake"},
		{"user and group", `echo $(id -u) $(id -g)`, "1000 1000"},
		{"no capabilities", `grep CapEff /proc/self/status | cut -f2`, "0000000000000000"},
		{"only loopback", `tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '`, "lo"},
		{"no home", `ls -d /home /root 2>/dev/null | wc -l`, "0"},
		{"nothing of the machine's owner", `ls -A /usr/local /usr/src | grep -v : | tr -d '\n'`, ""},
		{"own processes only", `ls /proc | grep -c '^[0-9]*$' | awk '{print ($1 < 10)}'`, "1"},
		{"root is read-only", `touch /x 2>/dev/null || echo refused`, "refused"},
		{"/usr is read-only", `touch /usr/x /usr/local/x 2>/dev/null || echo refused`, "refused"},
		{"/tmp is writable and empty", `ls -A /tmp | wc -l; touch /tmp/x && echo ok`, "0\nok"},
		{"no file over the limit", `truncate -s 5G /tmp/x 2>/dev/null || echo refused`, "refused"},
		{"/tmp is bounded", `df -k --output=size /tmp | tail -n 1 | awk '{print ($1 <= 4194304)}'`, "1"},
		{"processes are bounded", `grep 'Max processes' /proc/self/limits | awk '{print ($3 <= 16384)}'`, "1"},
		{"no core dumps", `ulimit -c`, "0"},
		{"no new namespaces", `unshare -U true 2>/dev/null || echo refused`, "refused"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			got, err := shell(t, row.script)
			if err != nil || got != row.want {
				t.Errorf("sandbox ran %s = %q, %v; want %q", row.script, got, err, row.want)
			}
		})
	}
}

// TestNoHostPaths checks that no process in the sandbox has a path of the host in its command line or environment.
func TestNoHostPaths(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	got, err := shell(t, `cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\0' ' '`,
		sandbox.Bind{Host: dir, Inside: "/prebake"})
	if err != nil || !strings.Contains(got, "prlimit") && !strings.Contains(got, "bwrap") || strings.Contains(got, dir) {
		t.Errorf("processes inside = %q, %v; want them without %s", got, err, dir)
	}
}

// TestNoNetwork checks that a program in the sandbox cannot reach a server on the host's loopback interface. Outside
// the sandbox, the same program must reach it.
func TestNoNetwork(t *testing.T) {
	t.Parallel()
	installed.Program(t, "perl")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	script := `perl -MSocket -e 'socket(S,PF_INET,SOCK_STREAM,0) or die; connect(S,sockaddr_in(` + port +
		`,inet_aton("127.0.0.1"))) and print "reached"; print "refused"'`
	if out, err := exec.Command("sh", "-c", script).Output(); err != nil || !strings.HasPrefix(string(out), "reached") {
		t.Fatalf("outside the sandbox the probe says %q, %v; want reached", out, err)
	}
	if got, err := shell(t, script); err != nil || got != "refused" {
		t.Errorf("inside the sandbox the probe says %q, %v; want refused", got, err)
	}
}

func TestBinds(t *testing.T) {
	t.Parallel()
	ro, rw := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(ro, "in"), []byte("bytes"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := shell(t, `cat /a/in > /b/out; touch /a/x 2>/dev/null || echo refused`,
		sandbox.Bind{Host: ro, Inside: "/a"}, sandbox.Bind{Host: rw, Inside: "/b", Writable: true})
	if err != nil || got != "refused" {
		t.Fatalf("write to a read-only bind = %q, %v; want refused", got, err)
	}
	if text, err := os.ReadFile(filepath.Join(rw, "out")); err != nil || string(text) != "bytes" {
		t.Errorf("file written inside = %q, %v; want bytes", text, err)
	}
}

func TestExit(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name, script string
		status       int
		killed       bool
	}{
		{"plain status", "exit 3", 3, false},
		{"killed", "kill -9 $$", 137, true},
		{"other signal", "kill -TERM $$", 143, false},
	}
	for _, row := range rows {
		_, err := shell(t, row.script)
		var exit *sandbox.ExitError
		if !errors.As(err, &exit) || exit.Status != row.status || exit.Killed() != row.killed {
			t.Errorf("%s: Run = %v; want status %d, killed %t", row.name, err, row.status, row.killed)
		}
	}
}

func TestSetupTrouble(t *testing.T) {
	t.Parallel()
	_, err := shell(t, "true", sandbox.Bind{Host: filepath.Join(t.TempDir(), "missing"), Inside: "/a"})
	if !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("Run with a missing bind = %v (%v, hint %q); want usage with a hint", err, fault.Of(err), fault.Hint(err))
	}
	if err := sandbox.Run(t.Context(), sandbox.Config{Dir: "relative", Binds: []sandbox.Bind{{Host: "a"}}}); err == nil ||
		!strings.Contains(err.Error(), "no program is given") || !strings.Contains(err.Error(), "absolute paths") {
		t.Errorf("Run of a bad configuration = %v; want every problem at once", err)
	}
}

func TestMissingBubblewrap(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	err := sandbox.Probe(t.Context())
	if !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "apt-get install bubblewrap") {
		t.Errorf("Probe without bwrap = %v, hint %q; want usage and how to install it", err, fault.Hint(err))
	}
}

// TestCancel checks that Run ends when its context ends, although programs in the sandbox sleep. It must return the
// context's cause, and all programs in the sandbox must end.
func TestCancel(t *testing.T) {
	t.Parallel()
	needBubblewrap(t)
	installed.Program(t, "flock")
	dir := t.TempDir()
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	w := &onFirstWrite{do: func() {
		if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			t.Error("the lock is free while the sandbox runs")
		}
		cancel(stop)
	}}
	started := time.Now()
	// Each program of the script has the lock's file open, so the lock is free only after all of them have ended.
	err = sandbox.Run(ctx, sandbox.Config{
		Argv: []string{"sh", "-c", "exec 9>>/b/lock; flock 9; sleep infinity & echo started; sleep infinity"}, Dir: "/",
		Output: w, Env: map[string]string{"PATH": "/usr/bin:/bin"},
		Binds: []sandbox.Bind{{Host: dir, Inside: "/b", Writable: true}},
	})
	if !errors.Is(err, stop) {
		t.Errorf("Run = %v after %v; want the cause of the cancellation", err, time.Since(started))
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Errorf("flock: %v", err)
	}
}

// TestFlood checks a program that prints without end. Run must kill it, say why, and pass on no more than MaxOutput
// bytes.
func TestFlood(t *testing.T) {
	t.Parallel()
	needBubblewrap(t)
	for _, script := range []string{"yes", "head -c 2000000 /dev/zero", "echo begin; yes >&2"} {
		out := &counter{}
		err := sandbox.Run(t.Context(), sandbox.Config{
			Argv: []string{"sh", "-c", script}, Dir: "/", Output: out, MaxOutput: 1 << 20,
			Env: map[string]string{"PATH": "/usr/bin:/bin"},
		})
		if err == nil || !strings.Contains(err.Error(), "printed more than 1048576 bytes") || fault.Hint(err) == "" ||
			fault.Is(err, fault.Cancelled) {
			t.Errorf("Run(%s) = %v (%v), hint %q; want the flood named", script, err, fault.Of(err), fault.Hint(err))
		}
		if out.n > 1<<20 {
			t.Errorf("Run(%s) passed %d bytes on; want at most %d", script, out.n, 1<<20)
		}
	}
}

type counter struct{ n int }

func (c *counter) Write(p []byte) (int, error) { c.n += len(p); return len(p), nil }

type onFirstWrite struct{ do func() }

func (w *onFirstWrite) Write(p []byte) (int, error) { w.do(); return len(p), nil }
