package deploy_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// lack is an environment variable. If it is set, TestThatMaySkip is skipped for lack of what it names.
const lack = "PREBAKE_TEST_LACK"

// TestThatMaySkip is a test that TestRan and TestCIReport run.
func TestThatMaySkip(t *testing.T) {
	if what := os.Getenv(lack); what != "" {
		t.Skip("there is no " + what)
	}
}

// TestRan checks that ran.sh fails if a test was skipped, or if no test has the name.
func TestRan(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, script, run, lack string
		want                    string // expected part of the output; "" means success
	}{
		{"passed", "./ran.sh", "^TestThatMaySkip$", "", ""},
		{"skipped", "./ran.sh", "^TestThatMaySkip$", "kernel", "a test did not run: --- SKIP: TestThatMaySkip"},
		{"may be skipped", "./ran.sh --may-skip", "^TestThatMaySkip$", "kernel", ""},
		{"no such test", "./ran.sh --may-skip", "^TestWithAnotherName$", "", "a test did not run: testing: warning: no"},
		{"failed", "./ran.sh", "(", "", "missing closing )"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			// As go test, the shell merges what the test program prints to stdout and stderr.
			cmd := exec.CommandContext(t.Context(), "bash", "-c", row.script+` bash -c '"$0" "$@" 2>&1' "$0" "$@"`, self,
				"-test.v", "-test.run="+row.run)
			cmd.Env = append(os.Environ(), lack+"="+row.lack)
			out, err := cmd.CombinedOutput()
			if (err == nil) != (row.want == "") || !strings.Contains(string(out), row.want) {
				t.Errorf("%s -run %s: %v; want %q in\n%s", row.script, row.run, err, row.want, out)
			}
		})
	}
}

// TestMakeRunsTests checks that each target of the Makefile that runs single tests fails if they do not run.
func TestMakeRunsTests(t *testing.T) {
	t.Parallel()
	text := strings.ReplaceAll(read(t, "Makefile"), "\\\n", " ")
	commands := regexp.MustCompile(`(?m)^\t.*\$\(GO\) test .*-run '\^\(?Test.*$`).FindAllString(text, -1)
	if len(commands) < 13 {
		t.Errorf("the Makefile has %d commands that run single tests; want 13 or more: %q", len(commands), commands)
	}
	for _, command := range commands {
		if !strings.Contains(command, "$(RAN) ") {
			t.Errorf("%q passes if no test has the name; want $(RAN) before it", command)
		}
	}
	if n := strings.Count(text, ".cache}/prebake"); n != 1 {
		t.Errorf("the Makefile names the folder of the state %d times; want it in STATE only", n)
	}
	out, err := exec.CommandContext(t.Context(), "make", "-C", root, "--dry-run", "release-test").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/cosign@v") || !strings.Contains(string(out), "ran.sh go test") {
		t.Errorf("make --dry-run release-test = %v; want cosign on PATH, and no test skipped:\n%s", err, out)
	}
}

// TestVulncheck checks that vulncheck.sh succeeds without a database only if that is Go's own. The tool's message is
// that of govulncheck.
func TestVulncheck(t *testing.T) {
	t.Parallel()
	public := regexp.MustCompile(`(?m)^GOVULNDB \?= (.*)$`).FindStringSubmatch(read(t, "Makefile"))
	if public == nil {
		t.Fatal("the Makefile has no GOVULNDB")
	}
	tool := filepath.Join(t.TempDir(), "govulncheck")
	text := "#!/bin/sh\necho \"govulncheck: fetching vulnerabilities: Get $2/index: refused\" >&2\nexit 1\n"
	if err := os.WriteFile(tool, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	for db, want := range map[string]bool{public[1]: true, "https://vuln.go.dev.example": false, "file:///x": false} {
		out, err := exec.CommandContext(t.Context(), "./vulncheck.sh", tool, db).CombinedOutput()
		gap := "known vulnerabilities were not checked: Get " + db + "/index: refused\n"
		if (err == nil) != want || !strings.Contains(string(out), gap) {
			t.Errorf("vulncheck.sh without the database %s = %v; want success: %t, and %q\n%s", db, err, want, gap, out)
		}
	}
}

// TestCIReport runs .ci/run with a Makefile whose targets do little. The last lines must say what was skipped, and that
// known vulnerabilities were not checked.
func TestCIReport(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, ".ci"), 0o755); err != nil {
		t.Fatal(err)
	}
	const gap = "known vulnerabilities were not checked: Get https://vuln.go.dev: refused"
	run := func(demo, lint, skip string) (out string, err error) {
		t.Helper()
		makefile := fmt.Sprintf("build test images scenarios:\ndemo:\n\t%s\nlint:\n\t@echo '%s' >&2\nclang-cell:\n\t@%s=%s "+
			"%s -test.v -test.run='^TestThatMaySkip$$'\n", demo, lint, lack, skip, self)
		for name, text := range map[string]string{"Makefile": makefile, ".ci/run": read(t, ".ci/run")} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		text, err := exec.CommandContext(t.Context(), filepath.Join(dir, ".ci/run")).CombinedOutput()
		_, out, _ = strings.Cut(string(text), " s in all\n")
		if out == "" {
			t.Fatalf(".ci/run = %v\n%s", err, text)
		}
		return out, err
	}
	if out, err := run("@true", "lint: "+gap, "kernel"); err != nil ||
		!regexp.MustCompile(`(?m)^make clang-cell skipped +\d+ s$`).MatchString(out) ||
		!strings.HasSuffix(out, gap+"\nmake clang-cell was skipped: there is no kernel\n") {
		t.Errorf(".ci/run = %v; want clang-cell skipped, and both gaps named, in\n%s", err, out)
	}
	if out, err := run("@true", "lint: all checked", ""); err != nil || strings.Contains(out, "skipped") ||
		strings.Contains(out, "not checked") || strings.Count(out, " ok ") != 7 || strings.Contains(out, "\n\n") {
		t.Errorf(".ci/run = %v; want seven steps that are ok, in\n%s", err, out)
	}
	if out, err := run("@false", "", ""); err == nil || !strings.Contains(out, "failed: make demo") {
		t.Errorf(".ci/run with a failed step = %v; want a failure and its name, in\n%s", err, out)
	}
}
