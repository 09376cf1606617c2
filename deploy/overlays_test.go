package deploy_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// components returns the names of all components.
func components(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir("kubernetes/components")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// overlayWith makes a copy of an overlay, and returns its folder. change, if it is not nil, changes the text of its
// kustomization.yaml.
func overlayWith(t *testing.T, overlay string, change func(string) string) string {
	t.Helper()
	base, err := filepath.Abs("kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	to, err := filepath.Rel(dir, base)
	if err != nil {
		t.Fatal(err)
	}
	inputs.Files(t, base)
	entries, err := os.ReadDir(filepath.Join(base, "overlays", overlay))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text := read(t, "deploy/kubernetes/overlays/"+overlay+"/"+e.Name())
		if e.Name() == "kustomization.yaml" && change != nil {
			text = change(text)
		}
		text = strings.ReplaceAll(text, " ../../", " "+to+"/")
		if err := os.WriteFile(filepath.Join(dir, e.Name()), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// addComponents returns a function that adds components at the end of an overlay's list, as an operator does.
func addComponents(names ...string) func(string) string {
	return func(text string) string {
		lines := ""
		for _, name := range names {
			lines += "  - ../../components/" + name + "\n"
		}
		before, after, found := strings.Cut(text, "\ncomponents:\n")
		if !found {
			return text + "components:\n" + lines
		}
		rest := strings.SplitAfter(after, "\n")
		end := slices.IndexFunc(rest, func(line string) bool { return !strings.HasPrefix(line, "  - ") })
		return before + "\ncomponents:\n" + strings.Join(rest[:end], "") + lines + strings.Join(rest[end:], "")
	}
}

// head has the fields of an object that all kinds have.
type head struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
}

// heads returns the kinds, names and namespaces of rendered objects.
func heads(t *testing.T, rendered string) (all []head) {
	t.Helper()
	for part := range strings.SplitSeq(rendered, "\n---\n") {
		var h head
		if err := yaml.Unmarshal([]byte(part), &h); err != nil {
			t.Fatal(err)
		}
		all = append(all, h)
	}
	return all
}

// homeless returns the objects whose namespace is not among the rendered objects. A cluster to which nothing else was
// applied refuses such objects.
func homeless(all []head) (names []string) {
	there := []string{"", "default", "kube-system"}
	for _, h := range all {
		if h.Kind == "Namespace" {
			there = append(there, h.Metadata.Name)
		}
	}
	for _, h := range all {
		if !slices.Contains(there, h.Metadata.Namespace) {
			names = append(names, h.Kind+" "+h.Metadata.Namespace+"/"+h.Metadata.Name)
		}
	}
	return names
}

// TestClusterOverlaysWithComponents renders each overlay with each component. The cluster must have the namespaces of
// all objects. For a cluster that has only the fetcher, the comment of fetcher-only names the components that do not
// fit.
func TestClusterOverlaysWithComponents(t *testing.T) {
	t.Parallel()
	kubectl := kubectlProgram(t)
	comment, _, _ := strings.Cut(read(t, "deploy/kubernetes/components/fetcher-only/kustomization.yaml"), "apiVersion:")
	_, excluded, _ := strings.Cut(comment, "Do not add these components")
	excluded, _, _ = strings.Cut(excluded, ". For")
	excluded = strings.ReplaceAll(excluded, "#", " ")
	words := strings.FieldsFunc(excluded, func(r rune) bool { return strings.ContainsRune(" ,:.\n", r) })
	for _, overlay := range []string{"gke", "gke-fetcher", "plain"} {
		have := read(t, "deploy/kubernetes/overlays/"+overlay+"/kustomization.yaml")
		for _, component := range components(t) {
			if strings.Contains(have, "/"+component+"\n") || overlay == "gke-fetcher" && slices.Contains(words, component) {
				continue
			}
			rendered, err := kubectl("kustomize", overlayWith(t, overlay, addComponents(component)))
			if err != nil {
				t.Errorf("overlays/%s with the component %s: %v", overlay, component, err)
				continue
			}
			if names := homeless(heads(t, rendered)); len(names) > 0 {
				t.Errorf("overlays/%s with the component %s has objects in namespaces that it does not make: %v", overlay,
					component, names)
			}
		}
	}
}

// TestClusterFetcherAlerts checks what managed-prometheus-fetcher adds to a cluster that has only the fetcher: its
// metrics, and no alert about the server, which would never end there.
func TestClusterFetcherAlerts(t *testing.T) {
	t.Parallel()
	rendered, err := kubectlProgram(t)("kustomize",
		overlayWith(t, "gke-fetcher", addComponents("managed-prometheus-fetcher")))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nkind: ClusterRules\n", "alert: PrebakeNodeWithoutDriver\n",
		"alert: PrebakeNodeConditionNotTrue\n", "\nkind: PodMonitoring\n"} {
		if strings.Count(rendered, want) != 1 {
			t.Errorf("managed-prometheus-fetcher has %q %d times; want it once", want, strings.Count(rendered, want))
		}
	}
	for _, deny := range []string{"PrebakeServerDown", "prebake-server\n", "prebake_queue"} {
		if strings.Contains(rendered, deny) {
			t.Errorf("managed-prometheus-fetcher has %q; want nothing of the server", deny)
		}
	}
}

// TestClusterWithoutReports checks that no DaemonSet waits for a label that the fetcher writes if the fetcher has no
// account: without-cluster.
func TestClusterWithoutReports(t *testing.T) {
	t.Parallel()
	kubectl := kubectlProgram(t)
	for _, overlay := range []string{"gke", "gke-fetcher", "plain"} {
		out, err := kubectl("kustomize", overlayWith(t, overlay, addComponents("without-cluster")))
		if err != nil {
			t.Fatal(err)
		}
		for part := range strings.SplitSeq(out, "\n---\n") {
			var m manifest
			if !strings.Contains(part, "kind: DaemonSet\n") {
				continue
			}
			if err := yaml.Unmarshal([]byte(part), &m); err != nil {
				t.Fatal(err)
			}
			terms := m.Spec.Template.Spec.Affinity.NodeAffinity.Required.Terms
			if len(terms) == 0 {
				t.Errorf("overlays/%s with without-cluster: %s runs on all nodes", overlay, m.Metadata.Name)
			}
			for _, term := range terms {
				for _, e := range term.MatchExpressions {
					if strings.HasPrefix(e.Key, "prebake.dev/driver-") {
						t.Errorf("overlays/%s with without-cluster: %s waits for the label %s, which nobody writes", overlay,
							m.Metadata.Name, e.Key)
					}
				}
			}
		}
	}
	for _, name := range []string{"examples/gpu-pod.yaml", "components/without-cluster/kustomization.yaml"} {
		if comment, _, _ := strings.Cut(read(t, "deploy/kubernetes/"+name), "apiVersion:"); !strings.Contains(comment,
			"without-cluster") || !strings.Contains(comment, "selector") {
			t.Errorf("%s does not say that the example pod's selector matches no node with without-cluster", name)
		}
	}
}
