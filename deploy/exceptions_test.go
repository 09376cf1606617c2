package deploy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/deploy/internal/page"
)

// exceptions are the settings that Pod Security's profile baseline or common policies forbid. If the comment on top of
// a manifest explains a setting, that comment must contain the setting's key in this map.
var exceptions = map[string]*regexp.Regexp{
	"hostPID":           regexp.MustCompile(`^hostPID: true`),
	"hostNetwork":       regexp.MustCompile(`^hostNetwork: true`),
	"hostIPC":           regexp.MustCompile(`^hostIPC: true`),
	"hostPath":          regexp.MustCompile(`^hostPath:`),
	"privileged":        regexp.MustCompile(`^privileged: true`),
	"procMount":         regexp.MustCompile(`^procMount: Unmasked`),
	"unconfined":        regexp.MustCompile(`^type: Unconfined`),
	"priorityClassName": regexp.MustCompile(`^priorityClassName: system-`),
	"every taint":       regexp.MustCompile(`^- operator: Exists`),
}

// TestExceptionsAreExplained checks that the manifests give a reason for each setting that a policy forbids: beside it,
// in the line before it, or in the comment on top of the file.
func TestExceptionsAreExplained(t *testing.T) {
	t.Parallel()
	found := map[string]bool{}
	for _, name := range files(t, ".yaml") {
		if !strings.HasPrefix(name, "deploy/kubernetes/") {
			continue
		}
		lines := strings.Split(read(t, name), "\n")
		top := slices.IndexFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "#") })
		head := strings.Join(lines[:max(top, 0)], "\n")
		for i, line := range lines {
			text := strings.TrimSpace(line)
			for word, setting := range exceptions {
				if !setting.MatchString(text) {
					continue
				}
				found[word] = true
				before := i > 0 && strings.HasPrefix(strings.TrimSpace(lines[i-1]), "#")
				if !strings.Contains(text, " # ") && !before && !strings.Contains(head, word) {
					t.Errorf("%s:%d: %q has no reason", name, i+1, text)
				}
			}
		}
	}
	if len(found) < len(exceptions)-1 { // no manifest has hostIPC
		t.Errorf("the manifests have the exceptions %v; want all but hostIPC: does the test read all manifests?", found)
	}
}

// resourceful is a pod, or an object that makes pods, with what its containers request.
type resourceful struct {
	Kind     string
	Metadata struct{ Name string }
	Spec     struct {
		Containers []container
		Template   struct {
			Spec struct {
				Containers     []container
				InitContainers []container `yaml:"initContainers"`
			}
		}
	}
}

// TestContainersHaveResources checks that each container requests CPU and memory, and has a limit of memory. It skips
// the manifest of Google's partitioner, which has Google's own values.
func TestContainersHaveResources(t *testing.T) {
	t.Parallel()
	checked := 0
	for _, name := range files(t, ".yaml") {
		if !strings.HasPrefix(name, "deploy/kubernetes/") || strings.HasSuffix(name, "/partition-gpus.yaml") {
			continue
		}
		for dec := yaml.NewDecoder(bytes.NewBufferString(read(t, name))); ; {
			var node yaml.Node
			if err := dec.Decode(&node); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			var head struct{ Kind string }
			if err := node.Decode(&head); err != nil ||
				!slices.Contains([]string{"Pod", "Deployment", "DaemonSet"}, head.Kind) {
				continue
			}
			var o resourceful
			if err := node.Decode(&o); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			pod := o.Spec.Template.Spec
			for _, c := range slices.Concat(o.Spec.Containers, pod.Containers, pod.InitContainers) {
				checked++
				r := c.Resources
				if r.Requests["cpu"] == "" || r.Requests["memory"] == "" || r.Limits["memory"] == "" {
					t.Errorf("%s: container %s of %s requests %v with the limits %v; want CPU and memory, and a limit of memory",
						name, c.Name, o.Metadata.Name, r.Requests, r.Limits)
				}
			}
		}
	}
	if checked < 5 {
		t.Errorf("%d containers were checked; want those of server, builder, fetcher, device plugin and examples", checked)
	}
}

// googleTerms are the conditions by which Google's own DaemonSet for COS selects nodes: daemonset-preloaded.yaml in
// GoogleCloudPlatform/container-engine-accelerators. Google's DaemonSet leaves out nodes that get their driver from
// GKE, and confidential nodes, for which Google has another DaemonSet.
var googleTerms = []expression{
	{Key: "cloud.google.com/gke-accelerator", Operator: "Exists"},
	{Key: "cloud.google.com/gke-gpu-driver-version", Operator: "DoesNotExist"},
	{Key: "cloud.google.com/gke-confidential-nodes-instance-type", Operator: "DoesNotExist"},
}

// TestFetcherSelectsGoogleNodes checks that the fetcher runs only on those GKE nodes on which Google's DaemonSet would
// run.
func TestFetcherSelectsGoogleNodes(t *testing.T) {
	t.Parallel()
	m, _ := object(t, "DaemonSet/prebake-fetcher")
	for _, term := range m.Spec.Template.Spec.Affinity.NodeAffinity.Required.Terms {
		if slices.ContainsFunc(term.MatchExpressions, func(e expression) bool { return e.Key == "prebake.dev/install" }) {
			continue // an operator has put this label on the nodes
		}
		for _, want := range googleTerms {
			if !slices.ContainsFunc(term.MatchExpressions, func(e expression) bool { return cmp.Equal(e, want) }) {
				t.Errorf("fetcher selects nodes by %v; want also %v", term.MatchExpressions, want)
			}
		}
	}
}

// TestMigrationKeepsInstallersApart checks that Google's DaemonSet, patched as the page about migration says, selects
// only nodes on which no fetcher runs. The page must have the patch before it sends the reader to the manifests.
func TestMigrationKeepsInstallersApart(t *testing.T) {
	t.Parallel()
	const name = "docs/how-to/coming-from.md"
	var patch struct {
		Spec struct {
			Template struct {
				Spec struct {
					NodeSelector map[string]string `json:"nodeSelector"`
				} `json:"spec"`
			} `json:"template"`
		} `json:"spec"`
	}
	at := 0
	for _, b := range page.Parse([]byte(read(t, name))).Blocks {
		_, text, found := strings.Cut(b.Text, "patch daemonset nvidia-driver-installer")
		if !found {
			continue
		}
		_, text, _ = strings.Cut(text, "-p '")
		text, _, _ = strings.Cut(text, "'")
		if err := json.Unmarshal([]byte(text), &patch); err != nil {
			t.Fatalf("%s:%d: %v", name, b.Line, err)
		}
		at = b.Line
	}
	selected := patch.Spec.Template.Spec.NodeSelector
	m, _ := object(t, "DaemonSet/prebake-fetcher")
	for _, term := range m.Spec.Template.Spec.Affinity.NodeAffinity.Required.Terms {
		apart := slices.ContainsFunc(term.MatchExpressions, func(e expression) bool {
			value, ok := selected[e.Key]
			return ok && e.Operator == "NotIn" && slices.Contains(e.Values, value)
		})
		if !apart {
			t.Errorf("%s: Google's DaemonSet selects nodes by %v, and a fetcher by %v; want no node in common", name, selected,
				term.MatchExpressions)
		}
	}
	lines := strings.Split(read(t, name), "\n")
	first := slices.IndexFunc(lines, func(line string) bool { return strings.Contains(line, "first-node-pool.md") })
	if at == 0 || first < at {
		t.Errorf("%s: line %d leads to the manifests, and line %d keeps the fetcher off the former nodes; want the other "+
			"order", name, first+1, at)
	}
}
