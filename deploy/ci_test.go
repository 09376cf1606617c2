package deploy_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// script runs a script of deploy/ci with the given environment, PATH, HOME and PREBAKE_PAUSE.
func script(t *testing.T, name string, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "ci/"+name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "PREBAKE_PAUSE=0.1"}, env...)
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// TestCIScripts runs the scripts as a CI system does, against a running server.
func TestCIScripts(t *testing.T) {
	t.Parallel()
	r := startServer(t)
	r.publish(t, "17800.66.90", "535.261.03")
	if _, err := r.Client.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: "17800.66.78", Board: "lakitu", Driver: "550.54.15", Flavour: "open"}); err != nil {
		t.Fatal(err)
	}
	summary := filepath.Join(t.TempDir(), "summary.md")
	to := []string{"PREBAKE_SERVER=" + r.URL, "PREBAKE_PROGRAM=" + r.Binary}
	withToken := append(slices.Clone(to), "PREBAKE_TOKEN="+secret)
	away := []string{"PREBAKE_SERVER=http://127.0.0.1:1", "PREBAKE_PROGRAM=" + r.Binary, "PREBAKE_TOKEN=" + secret}

	rows := []struct {
		name, script string
		env, args    []string
		code         int
		out, err     string // expected parts of stdout and stderr
	}{
		{"announce", "announce.sh", withToken, []string{"17800.66.78"}, 0, "17800.66.78", ""},
		{"announce again", "announce.sh", withToken, []string{"17800.66.78"}, 0, "17800.66.78", ""},
		{"announce a list", "announce.sh", append(slices.Clone(withToken), "PREBAKE_BUILD_IDS=17800.66.78\n17800.66.90 "),
			nil, 0, "17800.66.90", ""},
		{
			"one that the mirror has not, and one that it has", "announce.sh", withToken, []string{"17800.1.1", "17800.66.90"},
			fault.InputMissing.ExitCode(), "17800.66.90", "17800.1.1",
		},
		{"announce without a token", "announce.sh", to, []string{"17800.66.78"}, fault.Unauthorized.ExitCode(), "", "hint:"},
		{"announce nothing", "announce.sh", withToken, nil, 2, "", "no COS build is named"},
		{"announce a flag", "announce.sh", withToken, []string{"--server=http://elsewhere"}, 2, "", "is no COS build"},
		{"announce to nobody", "announce.sh", nil, []string{"17800.66.78"}, 2, "", "PREBAKE_SERVER is not set"},
		{"neither program nor image", "preflight.sh", []string{"PREBAKE_SERVER=" + r.URL, "PREBAKE_PROGRAM=/no/such"},
			[]string{"17800.66.90"}, 2, "", "PREBAKE_IMAGE is not set"},
		{"server away", "announce.sh", away, []string{"17800.66.78"}, fault.Transient.ExitCode(), "", "hint:"},

		{"may move", "preflight.sh", to, []string{"17800.66.90:lakitu:535.261.03"}, 0, "== 17800.66.90", ""},
		{"may not yet", "preflight.sh", to, []string{"17800.66.78:lakitu:535.261.03"}, fault.NoArtifact.ExitCode(),
			"state      unknown", "hint:"},
		{"is being built", "preflight.sh", to, []string{"17800.66.78:lakitu:550.54.15"}, fault.Pending.ExitCode(),
			"state      queued", "server watch"},
		{
			"one is being built, one is not covered", "preflight.sh", append(slices.Clone(to), "GITHUB_STEP_SUMMARY="+summary),
			[]string{"17800.66.78:lakitu:535.261.03", "17800.66.78:lakitu:550.54.15", "17800.66.90:lakitu:535.261.03"},
			fault.NoArtifact.ExitCode(), "== 17800.66.90", "is queued",
		},
		{
			"one of two may not", "preflight.sh",
			append(slices.Clone(to), "PREBAKE_POOLS=17800.66.78 17800.66.90:lakitu:R535:proprietary"), nil,
			fault.NoArtifact.ExitCode(), "== 17800.66.90", "hint:",
		},
		{"waits, and in vain", "preflight.sh", append(slices.Clone(to), "PREBAKE_WAIT=1"), []string{"17800.66.78"},
			fault.NoArtifact.ExitCode(), "", "is unknown"},
		{"waits for what is built, and in vain", "preflight.sh", append(slices.Clone(to), "PREBAKE_WAIT=1"),
			[]string{"17800.66.78:lakitu:550.54.15"}, fault.Pending.ExitCode(), "", "is queued"},
		{"no such driver", "preflight.sh", to, []string{"17800.66.90:lakitu:new"}, 2, "", "hint:"},
		{"no pool", "preflight.sh", to, nil, 2, "", "no node pool is named"},
		{"a GKE version, where the server follows no map", "preflight.sh", to, []string{"1.33.5-gke.1080000:lakitu"},
			fault.NoArtifact.ExitCode(), "== 1.33.5-gke.1080000:lakitu", ""},
		{"a flag for a pool", "preflight.sh", to, []string{"--help"}, 2, "", "begins with no COS build"},
		{"a flag for a driver", "preflight.sh", to, []string{"17800.66.90:lakitu:--help"}, 2, "", "hint:"},
		{"no number", "preflight.sh", append(slices.Clone(to), "PREBAKE_WAIT=long"), []string{"17800.66.90"}, 2, "",
			"PREBAKE_WAIT"},
		{"preflight, server away", "preflight.sh", away, []string{"17800.66.90"}, fault.Transient.ExitCode(), "", "hint:"},
	}
	for _, row := range rows {
		code, out, errs := script(t, row.script, row.env, row.args...)
		if code != row.code || !strings.Contains(out, row.out) || !strings.Contains(errs, row.err) {
			t.Errorf("%s: %s %v = %d\n%s%s\nwant %d with %q and %q", row.name, row.script, row.args, code, out, errs, row.code,
				row.out, row.err)
		}
		if strings.Contains(out+errs, secret) {
			t.Errorf("%s: the token is in what was printed", row.name)
		}
	}

	noted, err := os.ReadFile(summary)
	want := "- 17800.66.90:lakitu:535.261.03: may move\n" +
		"- 17800.66.78:lakitu:535.261.03: may **not** move, nobody builds it\n" +
		"- 17800.66.78:lakitu:550.54.15: may **not** move yet, it is being built\n"
	if err != nil || string(noted) != want {
		t.Errorf("the summary is %q, %v; want %q", noted, err, want)
	}

	// The catalogue has the announced COS build.
	if release, err := r.Client.Release(t.Context(), "17800.66.78"); err != nil || len(release.Kernels) != 1 {
		t.Errorf("Release() after announcing = %+v, %v; want one kernel", release, err)
	}
}

// TestPreflightWaits checks that preflight.sh waits until a pool's artifact is published, and lists the pool in
// GitHub's summary.
func TestPreflightWaits(t *testing.T) {
	t.Parallel()
	r := startServer(t)
	summary := filepath.Join(t.TempDir(), "summary.md")
	cmd := exec.CommandContext(t.Context(), "ci/preflight.sh", "17800.66.78:lakitu:535.261.03")
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "PREBAKE_SERVER=" + r.URL, "PREBAKE_PROGRAM=" + r.Binary, "PREBAKE_PAUSE=0.1",
		"PREBAKE_WAIT=60",
		"GITHUB_STEP_SUMMARY=" + summary,
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Wait until the script has asked once and begins to ask again, while nothing is published.
	var text strings.Builder
	buf := make([]byte, 4096)
	for strings.Count(text.String(), "== ") < 2 {
		n, err := stdout.Read(buf)
		if err != nil {
			t.Fatalf("preflight.sh said %q and then %v, %v", text.String(), err, cmd.Wait())
		}
		text.Write(buf[:n])
	}
	r.publish(t, "17800.66.78", "535.261.03")
	_, err = io.Copy(io.Discard, stdout) // until the program has ended
	err = errors.Join(err, cmd.Wait())
	noted, rerr := os.ReadFile(summary)
	if want := "- 17800.66.78:lakitu:535.261.03: may move\n"; err != nil || rerr != nil || string(noted) != want {
		t.Errorf("preflight.sh = %v, summary %q, %v; want success and %q", err, noted, rerr, want)
	}
}

// TestCIScriptsRunAnImage checks that the scripts pass server, token and network to a program in PREBAKE_IMAGE.
func TestCIScriptsRunAnImage(t *testing.T) {
	t.Parallel()
	r := startServer(t)
	bin := t.TempDir()
	// This script replaces Docker. The program gets only the variables of the options -e.
	docker := "#!/bin/bash\nset -eu\n[[ \"$1 $2 $3\" == 'run --rm --network=host' ]]\nshift 3\nwith=()\n" +
		"while [[ $1 == -e ]]; do with+=(\"$2=${!2-}\"); shift 2; done\n[[ $1 == ghcr.io/prebake/server:1 ]]\nshift\nexec " +
		"env -i \"${with[@]}\" " + r.Binary + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "docker"), []byte(docker), 0o700); err != nil {
		t.Fatal(err)
	}
	env := []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "PREBAKE_SERVER=" + r.URL, "PREBAKE_TOKEN=" + secret,
		"PREBAKE_IMAGE=ghcr.io/prebake/server:1"}
	if code, out, errs := script(t, "announce.sh", env, "17800.66.78"); code != 0 ||
		!strings.Contains(out, "17800.66.78") {
		t.Errorf("announce.sh with an image = %d\n%s%s", code, out, errs)
	}
	if code, out, errs := script(t, "preflight.sh", env, "17800.66.78"); code != fault.NoArtifact.ExitCode() {
		t.Errorf("preflight.sh with an image = %d\n%s%s; want the status of the program in it", code, out, errs)
	}
}

// variables returns the names of the environment variables that the scripts read.
func variables(t *testing.T) map[string]bool {
	t.Helper()
	known := map[string]bool{}
	for _, name := range []string{"lib.sh", "announce.sh", "preflight.sh"} {
		for _, v := range regexp.MustCompile(`PREBAKE_[A-Z_]+`).FindAllString(read(t, "deploy/ci/"+name), -1) {
			known[v] = true
		}
	}
	return known
}

// TestGitHubFiles checks the workflow with actionlint. actionlint reads only the action's inputs, so the test itself
// checks the action's steps.
func TestGitHubFiles(t *testing.T) {
	t.Parallel()
	action := read(t, "deploy/ci/action.yml")
	dir := t.TempDir()
	for name, text := range map[string]string{"deploy/ci/action.yml": action, ".git/HEAD": "ref: refs/heads/main\n",
		".github/workflows/w.yml": ""} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	local := func(name string) string {
		return strings.Replace(read(t, "deploy/ci/"+name), "prebake/prebake/deploy/ci@main", "./deploy/ci", 1)
	}
	workflow := local("workflow.yml")
	lint := func(text string) []*actionlint.Error {
		t.Helper()
		l, err := actionlint.NewLinter(io.Discard, &actionlint.LinterOptions{WorkingDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		project, err := actionlint.NewProject(dir)
		if err != nil {
			t.Fatal(err)
		}
		found, err := l.Lint(filepath.Join(dir, ".github/workflows/w.yml"), []byte(text), project)
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	for _, e := range slices.Concat(lint(workflow), lint(local("workflow-gke.yml"))) {
		t.Error(e)
	}
	if len(lint(strings.Replace(workflow, "build-ids:", "builds:", 1))) == 0 {
		t.Error("a workflow with an input that the action does not have passed")
	}

	var a struct {
		Inputs map[string]struct{ Description string }
		Runs   struct {
			Using string
			Steps []struct {
				If, Shell, Run string
				Env            map[string]string
			}
		}
	}
	dec := yaml.NewDecoder(strings.NewReader(action))
	if err := dec.Decode(&a); err != nil || a.Runs.Using != "composite" || len(a.Runs.Steps) != 2 {
		t.Fatalf("action.yml = %+v, %v; want a composite action of two steps", a, err)
	}
	known := variables(t)
	input := regexp.MustCompile(`inputs\.([a-z-]+)`)
	for _, step := range a.Runs.Steps {
		// An input in the text of a script could inject commands, so steps must pass inputs in the environment.
		if strings.Contains(step.Run, "${{") || step.Shell != "bash" {
			t.Errorf("step %q with shell %q; want bash, and inputs by the environment", step.Run, step.Shell)
		}
		if name := strings.Trim(filepath.Base(step.Run), `"'`); !strings.HasSuffix(name, ".sh") ||
			read(t, "deploy/ci/"+name) == "" {
			t.Errorf("step runs %q", step.Run)
		}
		texts := []string{step.If}
		for name, value := range step.Env {
			if !known[name] {
				t.Errorf("step %q sets %s, which no script reads", step.Run, name)
			}
			texts = append(texts, value)
		}
		for _, m := range input.FindAllStringSubmatch(strings.Join(texts, " "), -1) {
			if _, ok := a.Inputs[m[1]]; !ok {
				t.Errorf("step %q uses the input %s, which the action does not have", step.Run, m[1])
			}
		}
	}
}
