package localbuild_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit/memorygroup"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// compileVariable is an environment variable. With it, the test binary compiles in the folder that the variable names,
// as the fetcher does.
const compileVariable = "PREBAKE_TEST_COMPILE"

// TestCompileProcess is the process that compiles and may be killed. Without the variable, the test does nothing.
func TestCompileProcess(t *testing.T) {
	dir := os.Getenv(compileVariable)
	if dir == "" {
		return
	}
	_, err := build(t.Context(), builderIn(dir), question)
	fmt.Printf("ENDED %v\n%v\nhint: %s\n", fault.Of(err), err, fault.Hint(err))
}

// builderIn returns a Builder whose files are in a folder that [script] made.
func builderIn(dir string) localbuild.Builder {
	return localbuild.Builder{Program: filepath.Join(dir, "builder"), StateDir: filepath.Join(dir, "state"),
		CacheDir: filepath.Join(dir, "cache"), KernelMirror: "file:///k", DriverMirror: "file:///d"}
}

// compileApart compiles in another process. It reports whether that process was killed; if not, it returns the output.
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

// calls returns the lines that the script recorded for its compiles.
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

// TestKilledWithCompile kills the compiling process together with the builder. The kernel does the same with all
// programs of a container that exceeds its memory limit. Kubelet then starts the container again, so the fetcher must
// not repeat the compile endlessly.
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
	if _, err := build(t.Context(), b, question); err != nil || len(calls(t, dir)) != 3 {
		t.Errorf("with Retry: Build = %v, %d compiles; want a third compile", err, len(calls(t, dir)))
	}
	if _, err := os.Stat(filepath.Join(b.StateDir, "compiling.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record of a compile that ended: %v; want it removed", err)
	}
}

// TestLackOfMemoryIsCounted checks a node on which only a compiler or only the builder is killed, for lack of memory.
// That happens with cgroup v1, and with kubelet's option singleProcessOOMKill. After two such compiles, the node must
// not compile again at each restart of the pod. Other errors do not change the count; a success resets it.
func TestLackOfMemoryIsCounted(t *testing.T) {
	t.Parallel()
	const lacks, killed, passes, works = "exit 26", "kill -9 $$", "exit 10",
		`echo '{"digest":"sha256:ab","driver":{"version":"535.1.1","flavour":"open"}}'`
	for name, ends := range map[string][]string{
		"a compiler":                   {lacks, lacks},
		"the builder":                  {killed, killed},
		"one of each":                  {killed, lacks},
		"with other errors in between": {passes, lacks, passes, passes, lacks},
		"with a success in between":    {lacks, works, lacks, lacks},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := script(t, `. "${0%/*}/end"`)
			dir := filepath.Dir(b.Program)
			made := filepath.Join(b.StateDir, "local", "made")
			compile := func(end string) error {
				t.Helper()
				if err := os.WriteFile(filepath.Join(dir, "end"), []byte(end+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				_, err := build(t.Context(), b, question)
				return err
			}
			for i, end := range ends {
				if err := compile(end); (err == nil) != (end == works) || len(calls(t, dir)) != i+1 {
					t.Fatalf("compile %d, %s: Build = %v after %d compiles", i, end, err, len(calls(t, dir)))
				}
			}
			if err := errors.Join(os.MkdirAll(filepath.Dir(made), 0o700), os.WriteFile(made, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := compile(works); !fault.Is(err, fault.OutOfMemory) || len(calls(t, dir)) != len(ends) ||
					!strings.Contains(err.Error(), "last 2 compiles of this driver ran out of memory") ||
					!strings.Contains(fault.Hint(err), "--builder never") {
					t.Errorf("the next compile: Build = %v after %d compiles; want out of memory without one", err,
						len(calls(t, dir)))
				}
			}
			if _, err := os.Stat(made); err != nil {
				t.Errorf("the former artifact: %v; want it kept", err)
			}
			b.Retry = true
			if err := compile(works); err != nil {
				t.Errorf("with Retry: Build = %v; want success", err)
			}
			b.Retry = false
			if err := compile(works); err != nil {
				t.Errorf("after a success: Build = %v; want success", err)
			}
		})
	}
}

// TestNoPullAfterLackOfMemory checks that the fetcher does not pull the builder's image if it will not compile anyway.
func TestNoPullAfterLackOfMemory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	repo, digest := image(t, []string{"/usr/local/bin/image-builder"})
	pulls := &countedPulls{Repository: repo}
	dir := t.TempDir()
	mirror := filepath.Join(dir, lackingMirror)
	if err := os.Mkdir(mirror, 0o755); err != nil {
		t.Fatal(err)
	}
	b := localbuild.Builder{Image: &localbuild.Image{Repository: pulls, Digest: digest},
		StateDir: filepath.Join(dir, "state"), CacheDir: filepath.Join(dir, "cache"), KernelMirror: "file://" + mirror}
	for i := range 4 {
		if _, err := build(t.Context(), b, question); !fault.Is(err, fault.OutOfMemory) || pulls.n != min(i+1, 2) {
			t.Errorf("compile %d: Build = %v after %d pulls; want out of memory after %d", i, err, pulls.n, min(i+1, 2))
		}
	}
}

// countedPulls is a repository that counts the pulls of images.
type countedPulls struct {
	*registry.Repository
	n int
}

func (c *countedPulls) PullImage(ctx context.Context, digest, arch, dir string) (v1.Image, error) {
	c.n++
	return c.Repository.PullImage(ctx, digest, arch, dir)
}

// TestMemoryLimit compiles in a control group with a limit of 96 MiB. Because of this limit, the fetcher must start
// only one compiler, although GOMAXPROCS is 8. When the kernel kills the builder, the error must name the limit.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	dir := filepath.Dir(script(t, `exec awk 'BEGIN { s = "x"; while (length(s) < 300000000) s = s s }'`).Program)
	group := memorygroup.New(t, 96<<20)
	killed, out := compileApart(t, dir, "sh", "-c", `echo $$ >"$0" && exec "$@"`, group)
	if killed || !strings.HasPrefix(out, "ENDED out-of-memory\n") || !strings.Contains(out, "killed the builder") ||
		!strings.Contains(out, "is 96 MiB") || !strings.Contains(out, "resources.limits.memory") {
		t.Errorf("killed %t, %s; want out of memory, the limit, and the next step", killed, out)
	}
	if got := calls(t, dir); len(got) != 1 || !strings.Contains(got[0], " --jobs 1 ") {
		t.Errorf("calls %q; want one, with one compiler", got)
	}
	for range 2 { // kubelet would start the fetcher again like this
		killed, out = compileApart(t, dir, "sh", "-c", `echo $$ >"$0" && exec "$@"`, group)
	}
	if got := calls(t, dir); killed || len(got) != 2 || !strings.HasPrefix(out, "ENDED out-of-memory\n") ||
		!strings.Contains(out, "last 2 compiles") {
		t.Errorf("the third compile: killed %t, %s, %d calls; want out of memory after two", killed, out, len(got))
	}
}
