package deploy_test

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/deploy/internal/page"
	"github.com/prebake/prebake/pkg/testkit/cluster"
)

// TestClusterTakesPagePatches renders each block of patches on a page as part of an overlay. A real API server must
// accept the result.
func TestClusterTakesPagePatches(t *testing.T) {
	c := cluster.Start(t)
	base, err := filepath.Abs("kubernetes/base")
	if err != nil {
		t.Fatal(err)
	}
	plain, err := c.Kubectl("", "kustomize", base)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for name, p := range pages(t) {
		for _, b := range p.Blocks {
			if b.Language != "yaml" || !strings.HasPrefix(b.Text, "patches:") {
				continue
			}
			found++
			dir := t.TempDir()
			to, err := filepath.Rel(dir, base)
			if err != nil {
				t.Fatal(err)
			}
			text := "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n  - " + to + "\n" + b.Text
			if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			rendered, err := c.Kubectl("", "kustomize", dir)
			if err != nil {
				t.Errorf("%s:%d: %v", name, b.Line, err)
				continue
			}
			if rendered == plain {
				t.Errorf("%s:%d: the patches change nothing", name, b.Line)
			}
			if _, err := c.Kubectl(rendered, "apply", "--server-side", "--force-conflicts", "--validate=strict", "-f",
				"-"); err != nil {
				t.Errorf("%s:%d: %v", name, b.Line, err)
			}
		}
	}
	if found < 3 {
		t.Errorf("%d blocks of patches were rendered; want those of upgrade.md, gke.md and keys.md", found)
	}
}

// nodeState has the fields of a node that the page about removal changes.
type nodeState struct {
	Metadata struct{ Labels, Annotations map[string]string }
	Spec     struct{ Taints []struct{ Key string } }
}

// TestRemovePage runs the last commands of the page about removal against a real API server: those that delete the
// objects, and those that clean the nodes. Nodes with Google's driver must stay as they are.
func TestRemovePage(t *testing.T) {
	c := cluster.Start(t)
	if _, err := c.Kubectl("", "apply", "-k", "kubernetes/overlays/gke"); err != nil {
		t.Fatal(err)
	}
	type words = map[string]string
	keep := words{"prebake.dev/skip": "true", "gke-no-default-nvidia-gpu-device-plugin": "true", "zone": "a"}
	google := words{"cloud.google.com/cuda.driver-version.full": "535.261.03"}
	ours := words{"prebake.dev/driver-state": "ready", "prebake.dev/driver-version": "580.82.07",
		"prebake.dev/driver-flavour": "open", "zone": "a"}
	cleaned := words{"prebake.dev/driver-state": "absent", "prebake.dev/skip": "true",
		"gke-no-default-nvidia-gpu-device-plugin": "true", "zone": "a"}
	notes := words{"prebake.dev/driver-digest": "sha256:1", "prebake.dev/driver-reason": "x",
		"cloud.google.com/cuda.driver-version.full": "580.82.07", "other": "stays"}
	const taint = "startup-taint.cluster-autoscaler.kubernetes.io/prebake-driver"
	nodes := map[string][2]words{"google": {keep, google}, "ours": {ours, notes}, "cleaned": {cleaned, notes}}
	for name, meta := range nodes {
		spec := map[string]any{}
		if name == "ours" {
			spec["taints"] = []any{words{"key": taint, "effect": "NoSchedule"}, words{"key": "other", "effect": "NoSchedule"}}
		}
		c.Must(http.MethodPost, "/api/v1/nodes", map[string]any{"spec": spec,
			"metadata": map[string]any{"name": name, "labels": meta[0], "annotations": meta[1]}}, nil)
	}
	steps := 0
	for _, b := range page.Parse([]byte(read(t, "docs/how-to/remove.md"))).Blocks {
		if b.Language != "sh" || !strings.HasPrefix(b.Section, "3-") && !strings.HasPrefix(b.Section, "4-") {
			continue
		}
		steps++
		if strings.Contains(b.Text, "prebake.dev/driver-state-") {
			got, err := c.Kubectl("", "-n", "prebake-privileged", "get", "daemonset", "-o", "name")
			if err != nil || strings.Contains(got, "prebake-fetcher") {
				t.Errorf("remove.md:%d removes labels while this exists: %q, %v; want no fetchers: they write them again",
					b.Line, got, err)
			}
		}
		cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", b.Text)
		cmd.Env = append(c.Environ(), "NODE=cleaned")
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("remove.md:%d: %v\n%s", b.Line, err, said)
		}
	}
	if steps != 3 {
		t.Errorf("remove.md has %d blocks of commands in its steps 3 and 4; want 3", steps)
	}
	for name, want := range map[string][2]words{
		"google": {keep, google}, "ours": {{"zone": "a"}, {"other": "stays"}}, "cleaned": {{"zone": "a"}, {"other": "stays"}},
	} {
		raw, err := c.Kubectl("", "get", "node", name, "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		var got nodeState
		if err := json.Unmarshal([]byte(raw), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, [2]words{got.Metadata.Labels, got.Metadata.Annotations}); diff != "" {
			t.Errorf("labels and annotations of the node %s (-want +got):\n%s", name, diff)
		}
		for _, have := range got.Spec.Taints {
			if have.Key == taint {
				t.Errorf("the node %s has still the startup taint", name)
			}
		}
	}
}
