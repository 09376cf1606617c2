package localbuild_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/memorygroup"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// compileVariable makes the test binary compile, as the fetcher does, in the folder that the variable names.
const compileVariable = "PREBAKE_TEST_COMPILE"

// TestCompileProcess is the process that compiles and may be killed. Without the variable it does nothing.
func TestCompileProcess(t *testing.T) {
	dir := os.Getenv(compileVariable)
	if dir == "" {
		return
	}
	_, err := builderIn(dir).Build(t.Context(), question)
	fmt.Printf("ENDED %v\n%v\nhint: %s\n", fault.Of(err), err, fault.Hint(err))
}

// builderIn returns the Builder that [script] made in this folder.
func builderIn(dir string) localbuild.Builder {
	return localbuild.Builder{Program: filepath.Join(dir, "builder"), StateDir: filepath.Join(dir, "state"),
		CacheDir: filepath.Join(dir, "cache"), KernelMirror: "file:///k", DriverMirror: "file:///d"}
}

// compileApart compiles in a process of its own. It reports whether that process was killed, and otherwise its output.
func compileApart(t *testing.T, dir string, argv ...string) (killed bool, out string) {
	t.Helper()
	argv = append(argv, os.Args[0], "-test.run=^TestCompileProcess$")
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), compileVariable+"="+dir, "GOMAXPROCS=8")
	raw, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		return true, ""
	}
	if err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	return false, string(raw)
}

// calls returns the lines that the script wrote about its calls to compile.
func calls(t *testing.T, dir string) (lines []string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if strings.HasPrefix(line, "build --build-id") {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestKilledWithCompile kills the process that compiles together with the builder, as the kernel does with all programs
// of a container that exceeds its memory limit. Kubelet starts the container again each time, so the compile must not
// be repeated endlessly.
func TestKilledWithCompile(t *testing.T) {
	t.Parallel()
	dir := filepath.Dir(script(t, "kill -9 $PPID; exit 1").Program)
	for i := range 2 {
		if killed, out := compileApart(t, dir); !killed {
			t.Fatalf("compile %d ended with %s; want it killed", i, out)
		}
	}
	killed, out := compileApart(t, dir)
	if killed || !strings.HasPrefix(out, "ENDED out-of-memory\n") || !strings.Contains(out, "killed together with") ||
		!strings.Contains(out, "--builder never") {
		t.Errorf("the third compile: killed %t, %s; want out of memory, and the next step", killed, out)
	}
	if got := calls(t, dir); len(got) != 2 {
		t.Errorf("compiled %d times; want 2: %q", len(got), got)
	}
	b := builderIn(dir)
	b.Retry = true
	if err := os.Remove(b.Program); err != nil {
		t.Fatal(err)
	}
	program.Write(t, b.Program, []byte("#!/bin/sh\necho \"$@\" >>\"${0%/*}\"/calls\n"+
		`echo '{"digest":"sha256:ab","driver":{"version":"535.1.1","flavour":"open"}}'`+"\n"))
	if _, err := b.Build(t.Context(), question); err != nil || len(calls(t, dir)) != 3 {
		t.Errorf("with Retry: Build = %v, %d compiles; want a third compile", err, len(calls(t, dir)))
	}
	if _, err := os.Stat(filepath.Join(b.StateDir, "compiling.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record of a compile that ended: %v; want it removed", err)
	}
}

// TestEndedIsNotKilled checks that compiles that end in any other way are repeated.
func TestEndedIsNotKilled(t *testing.T) {
	t.Parallel()
	b := script(t, "exit 26")
	for i := range 4 {
		if _, err := b.Build(t.Context(), question); !fault.Is(err, fault.OutOfMemory) ||
			strings.Contains(err.Error(), "killed together") || len(calls(t, filepath.Dir(b.Program))) != i+1 {
			t.Errorf("compile %d: Build = %v", i, err)
		}
	}
}

// TestMemoryLimit compiles in a control group with little memory. The limit must be the reason for one compiler on a
// machine with many processors. If the kernel kills the builder for it, the error must say so.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	dir := filepath.Dir(script(t, `exec awk 'BEGIN { s = "x"; while (length(s) < 300000000) s = s s }'`).Program)
	killed, out := compileApart(t, dir, "sh", "-c", `echo $$ >"$0" && exec "$@"`, memorygroup.New(t, 96<<20))
	if killed || !strings.HasPrefix(out, "ENDED out-of-memory\n") || !strings.Contains(out, "killed the builder") ||
		!strings.Contains(out, "is 96 MiB") || !strings.Contains(out, "resources.limits.memory") {
		t.Errorf("killed %t, %s; want out of memory, the limit, and the next step", killed, out)
	}
	if got := calls(t, dir); len(got) != 1 || !strings.Contains(got[0], " --jobs 1 ") {
		t.Errorf("calls %q; want one, with one compiler", got)
	}
}
