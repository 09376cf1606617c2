package deploy_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/deploy/internal/page"
	"github.com/prebake/prebake/pkg/testkit/cluster"
)

// keygen is a script in place of the program builder. Each run writes another key, and an existing key is an error.
const keygen = `#!/bin/sh
[ "$1" = keygen ] && ! [ -e "$2" ] || exit 2
head -c 16 /dev/urandom | base64 > "$2"
cp "$2" "$2.pub"
`

// unread is a script in place of kubectl. It fails if it is asked for the server's secret, and runs the real kubectl
// otherwise.
const unread = `#!/bin/sh
case "$*" in
*"get secret prebake-server"*) echo "the cluster is away" >&2; exit 1 ;;
esac
PATH=${PATH#*:} exec kubectl "$@"
`

// TestClusterKeepsKeys runs the commands of deploy/README.md against a real API server. A second run, also one from a
// folder without the key, must not replace the signing key, the trusted keys or the token.
func TestClusterKeepsKeys(t *testing.T) {
	c := cluster.Start(t)
	var script string
	for _, b := range page.Parse([]byte(read(t, "deploy/README.md"))).Blocks {
		if strings.Contains(b.Text, "prebake-signing-key") {
			script = b.Text
		}
	}
	top, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	folder := func() string {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "bin", "builder"), []byte(keygen), 0o755); err != nil { //nolint:gosec // run below
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(top, "deploy"), filepath.Join(dir, "deploy")); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	command := func(dir string, options ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), "bash", append(options, "-c", script)...)
		cmd.Dir, cmd.Env = dir, c.Environ()
		return cmd
	}
	run := func(dir string) {
		t.Helper()
		if said, err := command(dir, "-euo", "pipefail").CombinedOutput(); err != nil {
			t.Fatalf("the commands of deploy/README.md: %v\n%s", err, said)
		}
	}
	stored := func() (all []string) {
		t.Helper()
		for _, what := range []string{
			"prebake-privileged secret prebake-signing-key", "prebake-privileged configmap prebake-keys",
			"prebake-privileged secret prebake-builder", "prebake secret prebake-server",
		} {
			words := strings.Fields(what)
			data, err := c.Kubectl("", "-n", words[0], "get", words[1], words[2], "-o", "jsonpath={.data}")
			if err != nil || data == "" {
				t.Fatalf("get %s: %q, %v", what, data, err)
			}
			all = append(all, what+" "+data)
		}
		return all
	}
	home := folder()
	run(home)
	first := stored()
	run(home)
	if diff := cmp.Diff(first, stored()); diff != "" {
		t.Errorf("the second run changed (-first +second):\n%s", diff)
	}
	// A rotation adds a trusted key. The next run is on another machine, which does not have the signing key.
	if _, err := c.Kubectl("", "-n", "prebake-privileged", "patch", "configmap", "prebake-keys", "-p",
		`{"data":{"keys.pem":"two keys"}}`); err != nil {
		t.Fatal(err)
	}
	rotated := stored()
	elsewhere := folder()
	run(elsewhere)
	if diff := cmp.Diff(rotated, stored()); diff != "" {
		t.Errorf("a run from another machine changed (-before +after):\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(elsewhere, "prebake.key")); err == nil {
		t.Error("a run from another machine made a key; want none, because the cluster has one")
	}
	// If kubectl cannot read the token, the commands must not replace the token, whatever the shell's options are.
	fails := filepath.Join(t.TempDir(), "kubectl")
	if err := os.WriteFile(fails, []byte(unread), 0o755); err != nil { //nolint:gosec // run below
		t.Fatal(err)
	}
	for _, options := range [][]string{nil, {"-euo", "pipefail"}} {
		cmd := command(elsewhere, options...)
		for i, v := range cmd.Env {
			if to, ok := strings.CutPrefix(v, "PATH="); ok {
				cmd.Env[i] = "PATH=" + filepath.Dir(fails) + ":" + to
			}
		}
		said, err := cmd.CombinedOutput()
		if options != nil && err == nil {
			t.Errorf("bash %v with a failed question for the token = nil; want an error:\n%s", options, said)
		}
		if !strings.Contains(string(said), "the cluster is away") {
			t.Errorf("bash %v did not ask for the token:\n%s", options, said)
		}
		if diff := cmp.Diff(rotated, stored()); diff != "" {
			t.Errorf("bash %v with a failed question for the token changed (-before +after):\n%s", options, diff)
		}
	}
}
