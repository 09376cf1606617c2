package sandbox_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// holdLock is an environment variable. If it is set, this program only locks a file inside a sandbox. The value is the
// folder of that file.
const holdLock = "PREBAKE_TEST_HOLD_LOCK"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdLock); dir != "" {
		err := sandbox.Run(context.Background(), sandbox.Config{
			Argv: []string{"flock", "/prebake/lock", "sh", "-c", "echo held; sleep 600"}, Dir: "/prebake", Output: os.Stdout,
			Env:   map[string]string{"PATH": "/usr/bin:/bin"},
			Binds: []sandbox.Bind{{Host: dir, Inside: "/prebake", Writable: true}},
		})
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(inFilter) != "" {
		tryCalls()
		os.Exit(0)
	}
	if where := os.Getenv(inGuest); where != "" {
		if err := enterGuest(where); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if b := sandbox.SupportedLimits(); !b.ControlGroup {
			fmt.Fprintln(os.Stderr, "no control group:", b.Reason)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// TestDiesWithParent checks that all processes in a sandbox end if the process that made the sandbox is killed with
// SIGKILL.
func TestDiesWithParent(t *testing.T) {
	t.Parallel()
	needBubblewrap(t)
	installed.Program(t, "flock")
	dir := t.TempDir()
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	helper := exec.CommandContext(t.Context(), os.Args[0])
	helper.Env = append(os.Environ(), holdLock+"="+dir)
	out, err := helper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("helper says %q, %v; want held", line, err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
		t.Fatal("the lock is free while the sandbox runs")
	}
	if err := helper.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// A process in the sandbox holds the lock, so Flock waits until that process has ended.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Errorf("flock: %v", err)
	}
	if err := helper.Wait(); err == nil {
		t.Error("helper ended well; want it killed")
	}
}

// TestCalledOffEarly cancels a sandbox during its setup. No process of the sandbox may be left.
func TestCalledOffEarly(t *testing.T) {
	t.Parallel()
	needBubblewrap(t)
	mark := "called-off-" + filepath.Base(t.TempDir()) + "-" + strconv.Itoa(os.Getpid())
	for i := range 60 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*200*time.Microsecond)
		err := sandbox.Run(ctx, sandbox.Config{Argv: []string{"sleep", "600"}, Dir: "/",
			Env: map[string]string{"MARK": mark}})
		cancel()
		if err == nil {
			t.Fatal("sleep ended well")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for {
		left := findProcesses(t, mark)
		if len(left) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("processes are left: %v", left)
		case <-look.C:
		}
	}
}

// findProcesses returns the folders in /proc of all processes that have the word in their command line.
func findProcesses(t *testing.T, word string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), word) {
			found = append(found, filepath.Dir(file))
		}
	}
	return found
}
