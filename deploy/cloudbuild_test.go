package deploy_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"google.golang.org/api/cloudbuild/v1"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// readCloudBuild parses a configuration of Cloud Build. A field that Google's own client does not know is an error.
func readCloudBuild(text string) (b cloudbuild.Build, err error) {
	var doc any
	if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
		return b, err
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return b, err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	return b, dec.Decode(&b)
}

// reference matches what Cloud Build replaces in a text: $$ by $, and $_NAME by the value of a substitution.
var reference = regexp.MustCompile(`\$(\$|\{?[A-Z_]+\}?)`)

// substitute replaces the references in a text as Cloud Build does.
func substitute(t *testing.T, text string, values map[string]string) string {
	t.Helper()
	return reference.ReplaceAllStringFunc(text, func(ref string) string {
		if ref == "$$" {
			return "$"
		}
		value, known := values[strings.Trim(ref, "${}")]
		if !known {
			t.Errorf("Cloud Build refuses %q: it has no substitution %s", text, ref)
		}
		return value
	})
}

// TestCloudBuild checks that the configurations for Cloud Build have only fields that Google's own client for Cloud
// Build knows. Each step must set only variables that a script reads, from substitutions that the file declares.
func TestCloudBuild(t *testing.T) {
	t.Parallel()
	known := variables(t)
	used := regexp.MustCompile(`\$(_[A-Z_]+)`)
	for name, steps := range map[string]int{"cloudbuild.yaml": 2, "cloudbuild-gke.yaml": 1} {
		text := read(t, "deploy/ci/"+name)
		b, err := readCloudBuild(text)
		if err != nil || len(b.Steps) != steps {
			t.Errorf("%s has %d steps, %v; want %d", name, len(b.Steps), err, steps)
		}
		if _, err := readCloudBuild(strings.Replace(text, "entrypoint:", "entrypoints:", 1)); err == nil {
			t.Errorf("%s: a step with a member that Cloud Build does not know passed", name)
		}
		secrets := map[string]bool{}
		if b.AvailableSecrets != nil {
			for _, s := range b.AvailableSecrets.SecretManager {
				secrets[s.Env] = true
			}
		}
		for _, step := range b.Steps {
			for _, env := range step.SecretEnv {
				if !secrets[env] || !known[env] {
					t.Errorf("%s: step %s takes the secret %s; available: %v, known to the scripts: %t", name, step.Id, env,
						secrets, known[env])
				}
				delete(secrets, env)
			}
			for _, env := range step.Env {
				variable, value, _ := strings.Cut(env, "=")
				if !known[variable] {
					t.Errorf("%s: step %s sets %s, which no script reads", name, step.Id, variable)
				}
				for _, m := range used.FindAllStringSubmatch(value, -1) {
					if _, ok := b.Substitutions[m[1]]; !ok {
						t.Errorf("%s: step %s uses %s, which the file does not declare", name, step.Id, m[1])
					}
				}
			}
		}
		if len(secrets) > 0 { // Cloud Build starts no build without the secrets that it names
			t.Errorf("%s demands the secrets %v, which no step uses", name, secrets)
		}
	}
}

// TestCloudBuildSteps runs the steps of a configuration in bash, with a script in place of docker that notes what it is
// asked to run.
func TestCloudBuildSteps(t *testing.T) {
	t.Parallel()
	inputs.Files(t, "ci")
	const pool, build = "17800.66.78:lakitu:R535", "17800.66.78"
	const announced, asked = "announce 17800.66.78\n",
		"preflight --build-id=17800.66.78 --board=lakitu --driver=R535 --flavour=auto\n"
	for _, row := range []struct {
		name, file, builds, pools string
		want                      string // the calls of the server's command line
		fails                     bool
	}{
		{"both", "cloudbuild.yaml", build, pool, announced + asked, false},
		{"only ask", "cloudbuild.yaml", "", pool, asked, false},
		{"only announce", "cloudbuild.yaml", build, "", announced, false},
		{"nothing", "cloudbuild.yaml", "", "", "", true},
		{"two builds", "cloudbuild.yaml", build + " " + build, "", announced + announced, false},
		{"without a token", "cloudbuild-gke.yaml", "", pool, asked, false},
		{"no pool", "cloudbuild-gke.yaml", "", "", "", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			b, err := readCloudBuild(read(t, "deploy/ci/"+row.file))
			if err != nil {
				t.Fatal(err)
			}
			values := b.Substitutions
			values["_SERVER"], values["_IMAGE"], values["_POOLS"] = "http://127.0.0.1:1", "registry.example/server:1", row.pools
			if _, ok := values["_BUILD_IDS"]; ok {
				values["_BUILD_IDS"] = row.builds
			}
			bin := t.TempDir()
			calls := filepath.Join(bin, "calls")
			docker := "#!/bin/bash\nset -eu\n[[ \"$1 $2 $3\" == 'run --rm --network=cloudbuild' ]]\n" +
				"while [[ $1 != registry.example/server:1 ]]; do shift; done\nshift\necho \"$*\" >>" + calls + "\n"
			if err := os.WriteFile(filepath.Join(bin, "docker"), []byte(docker), 0o700); err != nil {
				t.Fatal(err)
			}
			var failed error
			for _, step := range b.Steps {
				var args []string
				for _, a := range step.Args {
					args = append(args, substitute(t, a, values))
				}
				cmd := exec.CommandContext(t.Context(), step.Entrypoint, args...)
				cmd.Dir = filepath.Join(root, step.Dir)
				cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + bin, "PREBAKE_PAUSE=0.1"}
				for _, e := range step.Env {
					cmd.Env = append(cmd.Env, substitute(t, e, values))
				}
				for _, e := range step.SecretEnv {
					cmd.Env = append(cmd.Env, e+"="+secret)
				}
				if said, err := cmd.CombinedOutput(); err != nil {
					t.Logf("step %s: %v\n%s", step.Id, err, said)
					failed = err
					break // Cloud Build runs no later step
				}
			}
			if (failed != nil) != row.fails {
				t.Errorf("the steps ended with %v; want an error: %t", failed, row.fails)
			}
			got, err := os.ReadFile(calls)
			if err != nil && row.want != "" {
				t.Fatal(err)
			}
			if diff := cmp.Diff(row.want, string(got)); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
		})
	}
}
