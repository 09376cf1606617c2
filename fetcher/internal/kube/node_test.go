package kube_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kube"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/cluster"
)

const manifests = "../../../deploy/kubernetes/"

// object has the fields of a node object that the tests read.
type object struct {
	Metadata struct {
		Labels, Annotations map[string]string
	}
	Spec struct {
		Taints []struct{ Key, Effect string }
	}
	Status struct {
		Conditions []struct {
			Type, Status, Reason, Message string
			LastTransitionTime            time.Time
		}
	}
}

// farm starts a cluster with two nodes, and applies our manifests twice. The second time must keep the operator's keys.
func farm(t *testing.T) *cluster.Cluster {
	t.Helper()
	c := cluster.Start(t)
	rendered, err := c.Kubectl("", "kustomize", manifests+"overlays/gke")
	if err != nil {
		t.Fatal(err)
	}
	keys := func() string {
		raw, err := c.Kubectl("", "-n", "prebake-privileged", "get", "configmap", "prebake-keys", "-o", "jsonpath={.data}")
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for i := range 2 {
		if _, err := c.Kubectl(rendered, "apply", "--server-side", "--validate=strict", "-f", "-"); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if _, err := c.Kubectl("", "-n", "prebake-privileged", "create", "configmap", "prebake-keys",
				"--from-literal=keys.pem=ours"); err != nil {
				t.Fatal(err)
			}
		}
		if got := keys(); !strings.Contains(got, "ours") {
			t.Fatalf("after apply %d the keys are %s", i+1, got)
		}
	}
	for _, name := range []string{"gpu-1", "gpu-2"} {
		c.Must(http.MethodPost, "/api/v1/nodes", map[string]any{
			"metadata": map[string]any{"name": name, "labels": map[string]any{"zone": "a"}},
			"spec": map[string]any{"taints": []any{
				map[string]any{"key": "startup-taint.cluster-autoscaler.kubernetes.io/prebake-driver", "effect": "NoSchedule"},
				map[string]any{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
			}},
		}, nil)
	}
	return c
}

// account makes the service account folder of a fetcher pod on a node. It also returns the pod's token.
func account(t *testing.T, c *cluster.Cluster, node string) (dir, token string) {
	t.Helper()
	dir, token = t.TempDir(), c.Account("prebake-privileged", "prebake-fetcher", node)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "token"), []byte(token+"\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "ca.crt"), c.CA, 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir, token
}

// TestCluster checks with a real API server what the cluster shows of a node: first while a GPU is unusable, and then
// when the driver is ready.
func TestCluster(t *testing.T) {
	c := farm(t)
	t.Setenv("KUBERNETES_SERVICE_HOST", c.Host)
	t.Setenv("KUBERNETES_SERVICE_PORT", c.Port)
	dir, token := account(t, c, "gpu-1")
	n, err := kube.New("gpu-1", "startup-taint.cluster-autoscaler.kubernetes.io/prebake-driver", dir,
		slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	var got object
	until := func(what string, ready func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			got = object{}
			c.Must(http.MethodGet, "/api/v1/nodes/gpu-1", nil, &got)
			if ready() {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: the node is %+v", what, got)
			}
		}
	}
	state := func() (status, reason, message string) {
		for _, c := range got.Status.Conditions {
			if c.Type == kube.Condition {
				return c.Status, c.Reason, c.Message
			}
		}
		return "", "", ""
	}
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	bad := gpucheck.Verdict{State: gpucheck.Unusable, Reason: "1 of 2 GPUs usable", Driver: driver,
		Digest: "sha256:" + strings.Repeat("a", 64), PCIGPUs: 2, UsableGPUs: 1}
	n.Report(bad)
	until("a GPU does not work", func() bool { _, reason, _ := state(); return reason == "GPUUnusable" })
	taints := func() (keys []string) {
		for _, taint := range got.Spec.Taints {
			if taint.Key != "node.kubernetes.io/not-ready" { // the API server sets this taint on each new node
				keys = append(keys, taint.Key)
			}
		}
		return keys
	}
	if status, _, message := state(); status != "False" || message != bad.Reason || len(taints()) != 2 {
		t.Errorf("condition %s %q, taints %v; want False with the reason, and the taints left alone", status, message,
			got.Spec.Taints)
	}
	good := bad
	good.State, good.Reason, good.UsableGPUs = gpucheck.Ready, "", 2
	n.Pending(errors.New("in use by python3"))
	n.Report(good)
	until("the driver is ready", func() bool {
		status, _, message := state()
		return status == "True" && len(taints()) == 1 && strings.Contains(message, "pending: in use by python3")
	})
	n.Pending(nil)
	until("nothing is pending", func() bool { return got.Metadata.Annotations["prebake.dev/driver-pending"] == "" })
	if taints()[0] != "nvidia.com/gpu" {
		t.Errorf("taints are %v; want the other one kept", got.Spec.Taints)
	}
	labels := map[string]string{"zone": "a", "prebake.dev/driver-state": "ready",
		"prebake.dev/driver-version": "535.261.03", "prebake.dev/driver-flavour": "open"}
	if diff := cmp.Diff(labels, got.Metadata.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	annotations := map[string]string{
		"prebake.dev/driver-digest":                 good.Digest,
		"cloud.google.com/cuda.driver-version.full": "535.261.03", "cloud.google.com/cuda.driver-version.major": "535",
		"cloud.google.com/cuda.driver-version.minor": "261", "cloud.google.com/cuda.driver-version.revision": "03",
	}
	for key, want := range annotations {
		if got.Metadata.Annotations[key] != want {
			t.Errorf("annotation %s = %q; want %q", key, got.Metadata.Annotations[key], want)
		}
	}
	text, err := c.Kubectl("", "describe", "node", "gpu-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"GPUUnusable", "DriverReady", "prebake-fetcher", "1 of 2 GPUs usable",
		"driver 535.261.03-open, 2 of 2 GPUs usable"} {
		if !strings.Contains(text, want) {
			t.Errorf("kubectl describe node has no %q:\n%s", want, text)
		}
	}
	notMore(t, c, token)
}

// TestFlush checks that Flush writes the last state before the program ends.
func TestFlush(t *testing.T) {
	c := farm(t)
	t.Setenv("KUBERNETES_SERVICE_HOST", c.Host)
	t.Setenv("KUBERNETES_SERVICE_PORT", c.Port)
	dir, _ := account(t, c, "gpu-1")
	n, err := kube.New("gpu-1", "", dir, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	n.Report(gpucheck.Verdict{State: gpucheck.Absent, Reason: "no-artifact: this build was not requested yet"})
	n.Flush(t.Context())
	var got object
	c.Must(http.MethodGet, "/api/v1/nodes/gpu-1", nil, &got)
	if got.Metadata.Labels["prebake.dev/driver-state"] != "absent" ||
		!strings.Contains(got.Metadata.Annotations["prebake.dev/driver-reason"], "was not requested") {
		t.Errorf("the node is %+v; want the reported state", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	t.Setenv("KUBERNETES_SERVICE_PORT", "1")
	if n, err = kube.New("gpu-1", "", dir, slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
		t.Fatal(err)
	}
	n.Report(gpucheck.Verdict{State: gpucheck.Absent})
	n.Flush(ctx) // Flush must return even if the cluster does not answer
}

// notMore checks that the API server refuses calls that a stolen token of a fetcher pod must not allow.
func notMore(t *testing.T, c *cluster.Cluster, token string) {
	t.Helper()
	try := c.As(token)
	type m = map[string]any
	meta := func(what string, kv m) m { return m{"metadata": m{what: kv}} }
	for name, row := range map[string]struct {
		method, path string
		in           any
	}{
		"another node's label": {http.MethodPatch, "/api/v1/nodes/gpu-2",
			meta("labels", m{"prebake.dev/driver-state": "ready"})},
		"another node's condition": {http.MethodPatch, "/api/v1/nodes/gpu-2/status",
			m{"status": m{"conditions": []m{{"type": "GPUDriverReady", "status": "True"}}}}},
		"a label that is no driver's": {http.MethodPatch, "/api/v1/nodes/gpu-1", meta("labels", m{"zone": "b"})},
		"a label taken away":          {http.MethodPatch, "/api/v1/nodes/gpu-1", meta("labels", m{"zone": nil})},
		"a new label": {http.MethodPatch, "/api/v1/nodes/gpu-1",
			meta("labels", m{"node-role.kubernetes.io/control-plane": ""})},
		"an annotation": {http.MethodPatch, "/api/v1/nodes/gpu-1",
			meta("annotations", m{"volumes.kubernetes.io/x": "y"})},
		"a new taint": {http.MethodPatch, "/api/v1/nodes/gpu-1",
			m{"spec": m{"taints": []m{{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
				{"key": "prebake.dev/x", "effect": "NoExecute"}}}}},
		"no taint":   {http.MethodPatch, "/api/v1/nodes/gpu-1", m{"spec": m{"taints": nil}}},
		"cordon":     {http.MethodPatch, "/api/v1/nodes/gpu-1", m{"spec": m{"unschedulable": true}}},
		"a provider": {http.MethodPatch, "/api/v1/nodes/gpu-1", m{"spec": m{"providerID": "x"}}},
		"an owner": {http.MethodPatch, "/api/v1/nodes/gpu-1",
			m{"metadata": m{"ownerReferences": []m{{"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "y"}}}}},
		"a finalizer": {http.MethodPatch, "/api/v1/nodes/gpu-1",
			m{"metadata": m{"finalizers": []string{"example.com/x"}}}},
		"another condition": {http.MethodPatch, "/api/v1/nodes/gpu-1/status",
			m{"status": m{"conditions": []m{{"type": "Ready", "status": "True"}}}}},
		"capacity": {http.MethodPatch, "/api/v1/nodes/gpu-1/status",
			m{"status": m{"capacity": m{"nvidia.com/gpu": "64"}}}},
		"delete":      {http.MethodDelete, "/api/v1/nodes/gpu-1", nil},
		"list nodes":  {http.MethodGet, "/api/v1/nodes", nil},
		"secrets":     {http.MethodGet, "/api/v1/namespaces/prebake-privileged/secrets", nil},
		"pods":        {http.MethodGet, "/api/v1/namespaces/prebake-privileged/pods", nil},
		"read Events": {http.MethodGet, "/api/v1/namespaces/default/events", nil},
	} {
		if err := try(row.method, row.path, row.in); err == nil || !strings.Contains(err.Error(), "HTTP 403") &&
			!strings.Contains(err.Error(), "HTTP 422") {
			t.Errorf("%s: %v; want the call refused", name, err)
		}
	}
	if err := try(http.MethodPatch, "/api/v1/nodes/gpu-1",
		meta("labels", m{"prebake.dev/driver-state": "ready"})); err != nil {
		t.Errorf("its own label: %v", err)
	}
}

// TestRightsAreNeeded checks that the manifests grant no right that the fetcher does not need. The test removes one
// right at a time; then a call must fail with status 403.
func TestRightsAreNeeded(t *testing.T) {
	c := farm(t)
	t.Setenv("KUBERNETES_SERVICE_HOST", c.Host)
	t.Setenv("KUBERNETES_SERVICE_PORT", c.Port)
	dir, _ := account(t, c, "gpu-1")
	var role struct {
		Rules []map[string][]string `json:"rules"`
	}
	const path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/prebake-fetcher"
	c.Must(http.MethodGet, path, nil, &role)
	whole := slices.Clone(role.Rules)
	for i, rule := range whole {
		for _, verb := range rule["verbs"] {
			less := slices.Clone(whole)
			less[i] = map[string][]string{"apiGroups": rule["apiGroups"], "resources": rule["resources"],
				"verbs": slices.DeleteFunc(slices.Clone(rule["verbs"]), func(v string) bool { return v == verb })}
			if len(less[i]["verbs"]) == 0 {
				less = slices.Delete(less, i, i+1)
			}
			c.Must(http.MethodPatch, path, map[string]any{"rules": less}, nil)
			var log strings.Builder
			for range 10 { // the API server may need some time to apply the changed role
				n, err := kube.New("gpu-1", "startup-taint.cluster-autoscaler.kubernetes.io/prebake-driver", dir,
					slog.New(slog.NewTextHandler(&log, nil)))
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
				n.Report(gpucheck.Verdict{State: gpucheck.Ready, Driver: target.Driver{Version: "535.261.03"}})
				if err := n.Run(ctx); err != nil {
					t.Error(err)
				}
				cancel()
				if strings.Contains(log.String(), "403") {
					break
				}
			}
			if !strings.Contains(log.String(), "403") {
				t.Errorf("without %s of %v nothing is missing: %s", verb, rule["resources"], log.String())
			}
		}
	}
}

// TestNoPod checks that New outside of a pod returns an error at once.
func TestNoPod(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := kube.New("n", "", t.TempDir(), slog.Default()); !fault.Is(err, fault.Usage) ||
		!strings.Contains(fault.Hint(err), "automountServiceAccountToken") {
		t.Errorf("New outside of a pod = %v; want a usage error that says what to do", err)
	}
}

// overlay makes a kustomize overlay of the base manifests with one component.
func overlay(t *testing.T, component string) string {
	t.Helper()
	base, err := filepath.Abs(manifests)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	to := func(name string) string {
		rel, err := filepath.Rel(dir, filepath.Join(base, name))
		if err != nil {
			t.Fatal(err)
		}
		return rel
	}
	text := "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [" + to("base") +
		"]\ncomponents: [" + to("components/"+component) + "]\n"
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestOverlays checks that the API server accepts every object of each overlay.
func TestOverlays(t *testing.T) {
	c := cluster.Start(t)
	without := overlay(t, "without-cluster")
	for _, overlay := range []string{manifests + "overlays/gke", manifests + "overlays/gke-fetcher",
		manifests + "overlays/plain", without} {
		rendered, err := c.Kubectl("", "kustomize", overlay)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Kubectl(rendered, "apply", "--validate=strict", "-f", "-"); err != nil {
			t.Errorf("%s: %v", overlay, err)
		}
		if overlay == without && (strings.Contains(rendered, "ClusterRole") || strings.Contains(rendered, "NODE_NAME")) {
			t.Errorf("without a cluster there is still:\n%s", rendered)
		}
		if strings.HasSuffix(overlay, "plain") && !strings.Contains(rendered, "value: /var/lib/nvidia") {
			t.Errorf("plain: the driver is not in /var/lib/nvidia:\n%s", rendered)
		}
	}
	pod, err := os.ReadFile(manifests + "examples/gpu-pod.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Kubectl(string(pod), "apply", "--validate=strict", "--dry-run=server", "-f", "-"); err != nil {
		t.Errorf("the example: %v", err)
	}
	raw, err := c.Kubectl("", "get", "daemonset", "-n", "prebake-privileged", "prebake-fetcher", "-o", "json")
	var set struct {
		Spec struct {
			Template struct {
				Spec struct{ ServiceAccountName string }
			}
		}
	}
	if err != nil || json.Unmarshal([]byte(raw), &set) != nil || set.Spec.Template.Spec.ServiceAccountName != "default" {
		t.Errorf("the DaemonSet's account is %q, %v", set.Spec.Template.Spec.ServiceAccountName, err)
	}
}
