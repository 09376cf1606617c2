package e2e

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/program"
)

// TestDemo checks that the demo with --stay passes, prints what the run proved, and keeps running until Ctrl-C. All
// commands that it suggests must work. The node's disk is empty, as in a first demo.
func TestDemo(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher", "deploy/demo") {
		return
	}
	defer shared.turns.take(50)()
	if err := os.RemoveAll(filepath.Join(shared.State, "demo", "node.img")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// With `go run`, signals would not reach the program.
	cmd := exec.CommandContext(ctx, program.Build(t, "deploy/demo", ""), "--bin", shared.Bin, "--stay")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var progress bytes.Buffer
	cmd.Stderr = &progress
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen strings.Builder
	var tries []string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		seen.WriteString(lines.Text() + "\n")
		if command, ok := strings.CutPrefix(lines.Text(), "  "+shared.Bin+"/"); ok {
			tries = append(tries, command)
		}
		if lines.Text() == "" && len(tries) == 4 { // the demo now waits for Ctrl-C
			break
		}
	}
	if len(tries) != 4 {
		_, err := io.Copy(&seen, out)
		t.Fatalf("demo --stay ended (%v, %v) and said to try %q; want 4 commands\n%s\n%s",
			err, cmd.Wait(), tries, &seen, &progress)
	}
	for _, want := range []string{
		"\nPASS in ", "\nWhat this run proved\n", "\nWhat an emulated GPU cannot prove\n", "\nReused from earlier runs\n",
		"answers version " + shared.driver(), "make clean-cache", shared.State + ", ",
	} {
		if !strings.Contains(seen.String(), want) {
			t.Errorf("demo printed no %q:\n%s", want, &seen)
		}
	}

	page := regexp.MustCompile(`http://127\.0\.0\.1:[0-9]+/`).FindString(seen.String())
	res, err := http.Get(page)
	if err != nil {
		t.Fatalf("GET %q: %v", page, err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK || !bytes.Contains(body, []byte(shared.driver())) {
		t.Errorf("GET %s = %s, %v; want a page with driver %s", page, res.Status, err, shared.driver())
	}
	if err := res.Body.Close(); err != nil {
		t.Error(err)
	}
	for _, command := range tries {
		if out, err := exec.CommandContext(ctx, "sh", "-c", shared.Bin+"/"+command).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}

	// Ctrl-C at a terminal sends the signal to the whole process group.
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("demo --stay after Ctrl-C: %v; want status 0\n%s", err, &progress)
	}
}

// TestDemoFails checks that a failed demo prints FAIL, the step and the reason, and does not exit with 0.
func TestDemoFails(t *testing.T) {
	t.Parallel()
	demo := program.Build(t, "deploy/demo", "")
	// All programs are real, except builder: its command keygen fails as with a full disk.
	bin := t.TempDir()
	for _, name := range []string{"server", "fetcher", "mirror", "guestinit", "nvmlprobe"} {
		if err := os.Symlink(shared.Program(name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	builder := "#!/bin/sh\n[ \"$1\" = keygen ] || exec " + shared.Program("builder") + " \"$@\"\n" +
		"echo 'error: no space left' >&2\nexit 27\n"
	if err := os.WriteFile(filepath.Join(bin, "builder"), []byte(builder), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		bin   string
		wants []string
	}{
		"no programs":         {t.TempDir(), []string{"FAIL after ", "step      make a mirror", "no such file"}},
		"the builder refuses": {bin, []string{"FAIL after ", "step      start the server", "status 27", "no space left"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := exec.CommandContext(t.Context(), demo, "--bin", row.bin).Output()
			if err == nil {
				t.Errorf("demo --bin %s = status 0; want another", row.bin)
			}
			for _, want := range row.wants {
				if !bytes.Contains(out, []byte(want)) {
					t.Errorf("demo --bin %s printed no %q:\n%s", row.bin, want, out)
				}
			}
			if bytes.Contains(out, []byte("PASS")) {
				t.Errorf("demo --bin %s printed PASS:\n%s", row.bin, out)
			}
		})
	}
}
