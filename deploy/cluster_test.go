package deploy_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/testkit/cluster"
)

// foreignKinds are other projects' kinds that the components use. Each definition (CRD) is a file of a Go module.
var foreignKinds = []struct{ module, file string }{
	{"github.com/cilium/cilium@v1.16.5", "pkg/k8s/apis/cilium.io/client/crds/v2/ciliumclusterwidenetworkpolicies.yaml"},
	{"github.com/kedacore/keda/v2@v2.21.0", "config/crd/bases/keda.sh_scaledobjects.yaml"},
	{"github.com/prometheus-operator/prometheus-operator@v0.85.0",
		"example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"},
	{"github.com/prometheus-operator/prometheus-operator@v0.85.0",
		"example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml"},
	{"github.com/prometheus-operator/prometheus-operator@v0.85.0",
		"example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml"},
}

// moduleFile reads a file of a Go module. It downloads the module if Go's cache does not have it.
func moduleFile(t *testing.T, module, file string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", module)
	cmd.Dir = t.TempDir() // outside of this module, so that go.mod needs no line for it
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	raw, err := cmd.Output()
	if err != nil {
		t.Fatalf("download %s: %v: %s%s", module, err, raw, stderr.Bytes())
	}
	var at struct{ Dir string }
	if err := json.Unmarshal(raw, &at); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(at.Dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// writeOverlay writes overlays/gke with further components at the end of its list, as an operator does, and returns the
// folder.
func writeOverlay(t *testing.T, components ...string) string {
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
	const last = "  - ../../components/every-address\n"
	before, after, found := strings.Cut(read(t, "deploy/kubernetes/overlays/gke/kustomization.yaml"), last)
	if !found {
		t.Fatalf("overlays/gke has no %q", last)
	}
	text := before + last
	for _, c := range components {
		text += "  - ../../components/" + c + "\n"
	}
	text = strings.ReplaceAll(text+after, " ../../", " "+to+"/")
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// addressesOf returns the ranges of addresses that may connect to the server. No range means that every address may.
func addressesOf(t *testing.T, rendered string) (ranges []string) {
	t.Helper()
	for dec := yaml.NewDecoder(strings.NewReader(rendered)); ; {
		var node yaml.Node
		if err := dec.Decode(&node); err != nil {
			t.Fatalf("find NetworkPolicy prebake-server: %v", err)
		}
		var head manifest // the kinds differ in the types of the other fields
		if err := node.Decode(&head); err != nil || head.Kind != "NetworkPolicy" || head.Metadata.Name != "prebake-server" {
			continue
		}
		var p policy
		if err := node.Decode(&p); err != nil {
			t.Fatal(err)
		}
		for _, from := range p.Spec.Ingress[1].From {
			ranges = append(ranges, from.IPBlock.CIDR)
		}
		return ranges
	}
}

// TestClusterTakesComponents checks that a real API server accepts the manifests with all components that need foreign
// definitions. A second apply must change nothing.
func TestClusterTakesComponents(t *testing.T) {
	c := cluster.Start(t)
	for _, kind := range foreignKinds {
		if _, err := c.Kubectl(moduleFile(t, kind.module, kind.file), "apply", "--server-side", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Kubectl(read(t, "deploy/testdata/kinds.yaml"), "apply", "--server-side", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl("", "wait", "--for=condition=established", "--timeout=60s", "crd", "--all"); err != nil {
		t.Fatal(err)
	}
	rendered, err := c.Kubectl("", "kustomize", writeOverlay(t, "podmonitor", "keda", "monitoring", "cilium"))
	if err != nil {
		t.Fatal(err)
	}
	private := []string{"172.16.0.0/12", "10.0.0.0/8", "192.168.0.0/16", "fc00::/7"}
	if diff := cmp.Diff(private, addressesOf(t, rendered)); diff != "" {
		t.Errorf("addresses that may connect to the server with the component cilium (-want +got):\n%s", diff)
	}
	if _, err := c.Kubectl("", "kustomize", writeOverlay(t, "cilium", "every-address")); err == nil {
		t.Error("every-address after cilium is rendered; want an error, because it undoes cilium")
	}
	var first map[string]map[string]any
	for i := range 2 {
		// The API server needs a moment until it knows a kind whose definition was just established.
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Second) {
			_, err := c.Kubectl(rendered, "apply", "--server-side", "--validate=strict", "-f", "-")
			if err == nil {
				break
			}
			if !strings.Contains(err.Error(), "no matches for kind") || time.Now().After(end) {
				t.Fatal(err)
			}
		}
		if i == 0 {
			// KEDA sets the number of replicas in this way. The next apply must not change it back.
			if _, err := c.Kubectl("", "-n", "prebake-privileged", "scale", "deployment", "prebake-builder",
				"--replicas=7"); err != nil {
				t.Fatal(err)
			}
			first = readApplied(t, c, rendered)
			continue
		}
		if diff := cmp.Diff(first, readApplied(t, c, rendered)); diff != "" {
			t.Errorf("the second apply changed (-first +second):\n%s", diff)
		}
	}
	if got, err := c.Kubectl("", "-n", "prebake-privileged", "get", "deployment", "prebake-builder", "-o",
		"jsonpath={.spec.replicas}"); err != nil || got != "7" {
		t.Errorf("after the second apply there are %q builders, %v; want the 7 that KEDA wanted", got, err)
	}
	for _, want := range []string{"ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule", "PodDisruptionBudget",
		"NetworkPolicy", "ConfigMap", "CiliumClusterwideNetworkPolicy"} {
		if !strings.Contains(rendered, "\nkind: "+want+"\n") {
			t.Errorf("the manifests with all components have no %s", want)
		}
	}
	google, err := c.Kubectl("", "kustomize", writeOverlay(t, "managed-prometheus"))
	if err != nil {
		t.Fatal(err)
	}
	if got := addressesOf(t, google); len(got) > 0 {
		t.Errorf("without the component cilium, only %v may connect to the server; want every address", got)
	}
	if strings.Contains(google, "monitoring.coreos.com") || strings.Count(google, "\nkind: PodMonitoring\n") != 2 ||
		!strings.Contains(google, "\nkind: ClusterRules\n") {
		t.Error("the component managed-prometheus has kinds of the Prometheus operator, or lacks Google's")
	}
	for _, namespace := range []string{"prebake", "prebake-privileged"} {
		if _, err := c.Kubectl("", "-n", namespace, "create", "serviceaccount", "default"); err != nil {
			t.Fatal(err) // this API server runs without the controller that makes this account; the namespace default has one
		}
	}
	rendered += "---\n" + google
	examples, err := filepath.Glob("kubernetes/examples/*.yaml")
	if err != nil || len(examples) < 3 {
		t.Fatalf("examples: %v, %v", examples, err)
	}
	for _, path := range examples {
		rendered += "---\n" + strings.ReplaceAll(read(t, "deploy/"+path), `"NODE"`, "node-1")
	}
	if _, err := c.Kubectl(rendered, "apply", "--server-side", "--validate=strict", "--dry-run=server", "-f",
		"-"); err != nil {
		t.Fatal(err)
	}
	// The API server must check manifests against the definitions, and refuse an unknown field.
	for _, row := range []struct{ name, from, to string }{
		{"KEDA", "pollingInterval:", "poolingInterval:"}, {"rules", "expr: absent", "query: absent"},
		{"monitor", "scrapeTimeout:", "scrapeTimeOut:"},
		{"Google's monitor", "targetLabels:", "targetLabel:"},
		{"Google's rules", "interval: 30s\n    name:", "every: 30s\n    name:"},
		{"Cilium's policy", "fromEntities:", "fromEntity:"},
		{"policy", "policyTypes:", "policyKinds:"}, {"budget", "maxUnavailable: 1", "maxUnavailable: []"},
	} {
		bad := strings.Replace(rendered, row.from, row.to, 1)
		if bad == rendered {
			t.Fatalf("%s: the manifests have no %q", row.name, row.from)
		}
		if _, err := c.Kubectl(bad, "apply", "--server-side", "--validate=strict", "--dry-run=server", "-f",
			"-"); err == nil {
			t.Errorf("%s: the API server accepted the unknown or wrong member %q", row.name, row.to)
		}
	}
}

// readApplied reads each applied object back, without the fields that the API server adds.
func readApplied(t *testing.T, c *cluster.Cluster, rendered string) map[string]map[string]any {
	t.Helper()
	raw, err := c.Kubectl(rendered, "get", "-o", "json", "-f", "-")
	if err != nil {
		t.Fatal(err)
	}
	var list struct{ Items []map[string]any }
	if err := json.Unmarshal([]byte(raw), &list); err != nil {
		t.Fatal(err)
	}
	all := map[string]map[string]any{}
	for _, o := range list.Items {
		meta, _ := o["metadata"].(map[string]any)
		all[fmt.Sprint(o["kind"], "/", meta["namespace"], "/", meta["name"])] = o
		delete(o, "status")
		o["metadata"] = map[string]any{"labels": meta["labels"], "annotations": meta["annotations"], "uid": meta["uid"]}
	}
	if len(all) < 20 {
		t.Fatalf("%d objects were applied; want them all", len(all))
	}
	return all
}
