package deploy_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/deploy/internal/page"
	"github.com/prebake/prebake/pkg/testkit/cluster"
)

// addPatches returns a function that adds a page's blocks of patches to an overlay, as the pages say: if the overlay
// already has a list of patches, to that list.
func addPatches(blocks ...page.Block) func(string) string {
	return func(text string) string {
		for _, b := range blocks {
			const line = "\npatches:\n"
			before, after, found := strings.Cut(text, line)
			if !found {
				text += b.Text
				continue
			}
			text = before + line + strings.TrimPrefix(b.Text, line[1:]) + after
		}
		return text
	}
}

// patchBlocks returns the blocks of patches on all pages, by page and line. It checks that the text before a block says
// what to do with an overlay that has patches already.
func patchBlocks(t *testing.T) map[string]page.Block {
	t.Helper()
	all := map[string]page.Block{}
	for name, p := range pages(t) {
		lines := strings.Split(read(t, name), "\n")
		for _, b := range p.Blocks {
			if b.Language != "yaml" || !strings.HasPrefix(b.Text, "patches:") {
				continue
			}
			all[fmt.Sprintf("%s:%d", name, b.Line)] = b
			before := strings.Join(lines[max(0, b.Line-6):b.Line], " ")
			if !strings.Contains(strings.Join(strings.Fields(before), " "), "already has a list `patches:`") {
				t.Errorf("%s:%d does not say what to do if the overlay already has a list `patches:`", name, b.Line)
			}
		}
	}
	if len(all) < 5 {
		t.Errorf("%d blocks of patches; want those of upgrade.md, gke.md, keys.md and deploy/README.md", len(all))
	}
	return all
}

// TestClusterTakesPagePatches adds each block of patches on a page to overlays/gke. A real API server must accept the
// result. The fetcher that asks for a policy must not have the variable of a public key, too: it would not start.
func TestClusterTakesPagePatches(t *testing.T) {
	c := cluster.Start(t)
	plain, err := c.Kubectl("", "kustomize", overlayWith(t, "gke", nil))
	if err != nil {
		t.Fatal(err)
	}
	policies := 0
	for at, b := range patchBlocks(t) {
		rendered, err := c.Kubectl("", "kustomize", overlayWith(t, "gke", addPatches(b)))
		if err != nil {
			t.Errorf("%s: %v", at, err)
			continue
		}
		if rendered == plain {
			t.Errorf("%s: the patches change nothing", at)
		}
		if _, err := c.Kubectl(rendered, "apply", "--server-side", "--force-conflicts", "--validate=strict", "-f",
			"-"); err != nil {
			t.Errorf("%s: %v", at, err)
		}
		if strings.Contains(rendered, "PREBAKE_POLICY") || strings.Contains(rendered, "--policy=") {
			policies++
			if strings.Contains(rendered, "PREBAKE_PUBLIC_KEY") {
				t.Errorf("%s: the fetcher has a policy and a public key, which exclude each other", at)
			}
		}
	}
	if policies != 1 {
		t.Errorf("%d blocks give the fetchers a policy; want that of keys.md", policies)
	}
}

// TestClusterOverlaysTakePatches adds all blocks of patches of all pages to each overlay. The overlay's own patches
// must stay: if a file has two lists of patches, kubectl uses only the last one, and reports no error.
func TestClusterOverlaysTakePatches(t *testing.T) {
	t.Parallel()
	kubectl := kubectlProgram(t)
	var blocks []page.Block
	for _, b := range patchBlocks(t) {
		blocks = append(blocks, b)
	}
	for overlay, own := range map[string]string{
		"gke": "", "gke-fetcher": "- --server=http://ADDRESS:8440\n", "plain": "value: /var/lib/nvidia\n",
	} {
		rendered, err := kubectl("kustomize", overlayWith(t, overlay, addPatches(blocks...)))
		if err != nil {
			t.Errorf("overlays/%s: %v", overlay, err)
			continue
		}
		for _, want := range []string{own, "- --driver=R535\n", "name: PREBAKE_POLICY\n", "- arm64\n"} {
			if !strings.Contains(rendered, want) {
				t.Errorf("overlays/%s with the patches of all pages lacks %q", overlay, want)
			}
		}
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
