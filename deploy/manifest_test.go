package deploy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// manifest has the fields of a Kubernetes object that the tests check.
type manifest struct {
	Kind     string
	Metadata struct {
		Name, Namespace string
		Labels          map[string]string
	}
	Spec struct {
		Replicas int
		Strategy struct{ Type string }
		Selector struct {
			MatchLabels map[string]string `yaml:"matchLabels"`
		}
		Template struct {
			Metadata struct{ Labels map[string]string }
			Spec     pod
		}
	}
}

type pod struct {
	HostPID         bool              `yaml:"hostPID"`
	HostNetwork     bool              `yaml:"hostNetwork"`
	HostUsers       *bool             `yaml:"hostUsers"`
	PriorityClass   string            `yaml:"priorityClassName"`
	AutomountToken  *bool             `yaml:"automountServiceAccountToken"`
	NodeSelector    map[string]string `yaml:"nodeSelector"`
	ServiceAccount  string            `yaml:"serviceAccountName"`
	SecurityContext struct {
		RunAsNonRoot   bool                  `yaml:"runAsNonRoot"`
		RunAsUser      int                   `yaml:"runAsUser"`
		SeccompProfile struct{ Type string } `yaml:"seccompProfile"`
	} `yaml:"securityContext"`
	Tolerations []struct{ Key, Operator string }
	Affinity    struct {
		NodeAffinity struct {
			Required struct {
				Terms []struct {
					MatchExpressions []expression `yaml:"matchExpressions"`
				} `yaml:"nodeSelectorTerms"`
			} `yaml:"requiredDuringSchedulingIgnoredDuringExecution"`
		} `yaml:"nodeAffinity"`
	}
	Containers []container
	Volumes    []struct {
		Name     string
		HostPath struct{ Path string } `yaml:"hostPath"`
		EmptyDir struct {
			SizeLimit string `yaml:"sizeLimit"`
		} `yaml:"emptyDir"`
	}
}

type expression struct {
	Key, Operator string
	Values        []string
}

type variable struct{ Name, Value string }

type container struct {
	Name, Image     string
	Args            []string
	Env             []variable
	Resources       struct{ Requests, Limits map[string]string }
	SecurityContext struct {
		Privileged   bool
		Escalation   *bool  `yaml:"allowPrivilegeEscalation"`
		ReadOnlyRoot bool   `yaml:"readOnlyRootFilesystem"`
		ProcMount    string `yaml:"procMount"`
		Capabilities struct{ Add, Drop []string }
	} `yaml:"securityContext"`
	VolumeMounts []struct {
		Name             string
		MountPath        string `yaml:"mountPath"`
		ReadOnly         bool   `yaml:"readOnly"`
		MountPropagation string `yaml:"mountPropagation"`
	} `yaml:"volumeMounts"`
}

// manifests reads all objects of deploy/kubernetes/base.
func manifests(t *testing.T) map[string]manifest {
	t.Helper()
	all := map[string]manifest{}
	paths, err := filepath.Glob("kubernetes/base/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("find manifests: %v, %d files", err, len(paths))
	}
	for _, path := range paths {
		if filepath.Base(path) == "kustomization.yaml" {
			continue
		}
		dec := yaml.NewDecoder(bytes.NewBufferString(read(t, "deploy/"+path)))
		for {
			var m manifest
			err := dec.Decode(&m)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			if m.Kind == "" || m.Metadata.Name == "" {
				t.Errorf("%s: an object without kind or name", path)
			}
			all[m.Kind+"/"+m.Metadata.Name] = m
		}
	}
	return all
}

// object returns an object, and its only container.
func object(t *testing.T, name string) (manifest, container) {
	t.Helper()
	m, ok := manifests(t)[name]
	if !ok {
		t.Fatalf("no object %s in deploy/kubernetes/base", name)
	}
	if n := len(m.Spec.Template.Spec.Containers); n != 1 {
		t.Fatalf("%s has %d containers; want 1", name, n)
	}
	return m, m.Spec.Template.Spec.Containers[0]
}

func TestServerManifest(t *testing.T) {
	t.Parallel()
	m, c := object(t, "Deployment/prebake-server")
	p := m.Spec.Template.Spec
	if m.Spec.Replicas != 1 || m.Spec.Strategy.Type != "Recreate" {
		t.Errorf("server has %d replicas, strategy %q; want 1, Recreate: its folder belongs to one process", m.Spec.Replicas,
			m.Spec.Strategy.Type)
	}
	if !p.SecurityContext.RunAsNonRoot || p.SecurityContext.SeccompProfile.Type != "RuntimeDefault" {
		t.Errorf("server pod's security context = %+v; want non-root, seccomp RuntimeDefault", p.SecurityContext)
	}
	if p.AutomountToken == nil || *p.AutomountToken {
		t.Error("server gets a service account token; want none: it never asks the cluster")
	}
	if p.HostPID || p.HostNetwork || len(hostPaths(p)) > 0 {
		t.Errorf("server shares the host: pid %v, network %v, paths %v; want none", p.HostPID, p.HostNetwork, hostPaths(p))
	}
	checkUnprivileged(t, c)
}

func TestBuilderManifest(t *testing.T) {
	t.Parallel()
	m, c := object(t, "Deployment/prebake-builder")
	p := m.Spec.Template.Spec
	if !p.SecurityContext.RunAsNonRoot || p.HostPID || p.HostNetwork || len(hostPaths(p)) > 0 {
		t.Errorf("builder: non-root %v, host pid %v, host network %v, host paths %v; want true and none",
			p.SecurityContext.RunAsNonRoot, p.HostPID, p.HostNetwork, hostPaths(p))
	}
	if p.AutomountToken == nil || *p.AutomountToken {
		t.Error("builder gets a service account token; want none: it never asks the cluster")
	}
	// Kubernetes allows an unmasked /proc only inside a user namespace.
	if p.HostUsers == nil || *p.HostUsers || c.SecurityContext.ProcMount != "Unmasked" {
		t.Errorf("builder: hostUsers %v, procMount %q; want false, Unmasked: the sandbox mounts a /proc of its own",
			p.HostUsers, c.SecurityContext.ProcMount)
	}
	checkUnprivileged(t, c)
	// --to and --server must have the same host. The builder sends its token only to the host of --server, and the server
	// recognises its own repository by this host.
	value := func(flag string) string {
		for _, arg := range c.Args {
			if v, ok := strings.CutPrefix(arg, "--"+flag+"="); ok {
				return v
			}
		}
		return ""
	}
	if host, _, _ := strings.Cut(value("to"), "/"); "http://"+host != value("server") {
		t.Errorf("builder publishes to %s and reports to %s; want one host", value("to"), value("server"))
	}
	// Without --jobs, the builder starts one compiler for each CPU of the node, even if the pod's memory limit is too low
	// for them. `builder doctor`, and the hint of a build that ran out of memory, ask for 1 GiB for each compiler;
	// docs/reference/limits.md has the measurement.
	jobs, err := strconv.Atoi(value("jobs"))
	memory, merr := strconv.Atoi(strings.TrimSuffix(c.Resources.Limits["memory"], "Gi"))
	if err != nil || merr != nil || jobs < 1 || jobs > memory {
		t.Errorf("builder runs %q compilers within %q of memory; want 1 GiB for each", value("jobs"),
			c.Resources.Limits["memory"])
	}
}

// TestBuilderDisk checks that the sizes of the builder's disk in manifests and pages fit together. A pod that uses more
// than it requests is among the first that a node with a full disk evicts. A pod whose volume outgrows its sizeLimit is
// evicted at once.
func TestBuilderDisk(t *testing.T) {
	t.Parallel()
	const (
		build   = 4  // GiB that a build takes at its peak: buildNeeds of builder/cmd_cache.go
		runaway = 16 // GiB after which a sandbox ends a build: maxDisk of pkg/sandbox/limits.go
	)
	gib := func(size, unit string) int {
		t.Helper()
		text, found := strings.CutSuffix(size, unit)
		n, err := strconv.Atoi(text)
		if !found || err != nil {
			t.Fatalf("size %q: want a number of %s", size, unit)
		}
		return n
	}
	m, c := object(t, "Deployment/prebake-builder")
	var cache, volume int
	for _, arg := range c.Args {
		if size, ok := strings.CutPrefix(arg, "--cache-size="); ok {
			cache = gib(size, "GiB")
		}
	}
	for _, v := range m.Spec.Template.Spec.Volumes {
		if v.Name == "cache" {
			volume = gib(v.EmptyDir.SizeLimit, "Gi")
		}
	}
	request := gib(c.Resources.Requests["ephemeral-storage"], "Gi")
	if cache == 0 || request < cache+build {
		t.Errorf("builder requests %d GiB of disk, with a cache of %d GiB; want room for a build of %d GiB, too", request,
			cache, build)
	}
	if volume < request || volume < cache+runaway {
		t.Errorf("builder's volume may have %d GiB, with a cache of %d GiB; want room for what it requests, and for a build "+
			"that its sandbox ends at %d GiB", volume, cache, runaway)
	}
	// The base alone has these settings, so they are the same in all overlays.
	for name, text := range map[string]string{"--cache-size=": "", "ephemeral-storage:": "", "sizeLimit:": ""} {
		for _, file := range files(t, ".yaml") {
			if strings.HasPrefix(file, "deploy/kubernetes/") && strings.Contains(read(t, file), name) {
				text += file + " "
			}
		}
		if text != "deploy/kubernetes/base/builder.yaml " {
			t.Errorf("%s is in %s; want it in base/builder.yaml alone", name, text)
		}
	}
	for _, name := range []string{
		"docs/tutorials/first-node-pool.md", "deploy/kubernetes/components/keda/scaledobject.yaml",
	} {
		if want := fmt.Sprintf("%d GiB of disk", request); !strings.Contains(read(t, name), want) {
			t.Errorf("%s does not say that a builder requests %q", name, want)
		}
	}
}

// checkUnprivileged checks that a container meets Kubernetes' restricted profile.
func checkUnprivileged(t *testing.T, c container) {
	t.Helper()
	s := c.SecurityContext
	if s.Privileged || s.Escalation == nil || *s.Escalation || !s.ReadOnlyRoot ||
		!slices.Equal(s.Capabilities.Drop, []string{"ALL"}) || len(s.Capabilities.Add) > 0 {
		t.Errorf("%s's security context = %+v; want unprivileged, no escalation, read-only root, all capabilities dropped",
			c.Name, s)
	}
}

func hostPaths(p pod) []string {
	var paths []string
	for _, v := range p.Volumes {
		if v.HostPath.Path != "" {
			paths = append(paths, v.HostPath.Path)
		}
	}
	return paths
}

func TestFetcherManifest(t *testing.T) {
	t.Parallel()
	m, c := object(t, "DaemonSet/prebake-fetcher")
	p := m.Spec.Template.Spec
	if !p.HostPID || !p.HostNetwork || p.PriorityClass != "system-node-critical" {
		t.Errorf("fetcher: host pid %v, host network %v, priority %q; want true, true, system-node-critical", p.HostPID,
			p.HostNetwork, p.PriorityClass)
	}
	if !c.SecurityContext.Privileged || !c.SecurityContext.ReadOnlyRoot {
		t.Errorf("fetcher's security context = %+v; want privileged with a read-only root", c.SecurityContext)
	}
	// TestCluster of fetcher/internal/kube tests the rights of this account on a real API server.
	if p.ServiceAccount != "prebake-fetcher" ||
		!slices.ContainsFunc(c.Env, func(e variable) bool { return e.Name == "PREBAKE_NODE_NAME" }) {
		t.Errorf("fetcher runs as %q with %v; want its own account, and the name of its node", p.ServiceAccount, c.Env)
	}
	if diff := cmp.Diff([]string{"/"}, hostPaths(p)); diff != "" {
		t.Errorf("fetcher's host paths (-want +got):\n%s", diff)
	}
	mounted := false
	for _, v := range c.VolumeMounts {
		if v.Name != "host" {
			if !v.ReadOnly {
				t.Errorf("mount %s at %s is writable; want only the node's root to be", v.Name, v.MountPath)
			}
			continue
		}
		mounted = v.MountPropagation == "HostToContainer" &&
			slices.Contains(c.Env, variable{"PREBAKE_HOST_ROOT", v.MountPath})
	}
	if !mounted {
		t.Error("the node's root is not mounted with HostToContainer at --host-root")
	}
	if !slices.Contains(c.Env, variable{"PREBAKE_INSTALL_DIR", "/home/kubernetes/bin/nvidia"}) {
		t.Errorf("fetcher's environment = %v; want GKE's install folder", c.Env)
	}
	if len(p.Tolerations) != 1 || p.Tolerations[0].Operator != "Exists" || p.Tolerations[0].Key != "" {
		t.Errorf("fetcher tolerates %v; want every taint", p.Tolerations)
	}
	terms := p.Affinity.NodeAffinity.Required.Terms
	if len(terms) == 0 {
		t.Fatal("fetcher has no node affinity; it would run on nodes without a GPU")
	}
	for _, term := range terms {
		if !slices.ContainsFunc(term.MatchExpressions,
			func(e expression) bool { return e.Key == "prebake.dev/skip" && e.Operator == "NotIn" }) {
			t.Errorf("node selector term %v does not honour prebake.dev/skip", term.MatchExpressions)
		}
	}
}

func TestSelectors(t *testing.T) {
	t.Parallel()
	for name, m := range manifests(t) {
		if len(m.Spec.Template.Spec.Containers) == 0 {
			continue
		}
		if diff := cmp.Diff(m.Spec.Selector.MatchLabels, m.Spec.Template.Metadata.Labels); diff != "" {
			t.Errorf("%s selects other pods than it makes:\n%s", name, diff)
		}
		if ns := manifests(t)["Namespace/"+m.Metadata.Namespace]; ns.Kind == "" {
			t.Errorf("%s is in namespace %q, which no manifest makes", name, m.Metadata.Namespace)
		}
	}
}

// TestManifestFlags checks that the programs have every flag and variable that the manifests use.
func TestManifestFlags(t *testing.T) {
	t.Parallel()
	for name, m := range manifests(t) {
		for _, c := range m.Spec.Template.Spec.Containers {
			known := words(t, c.Name)
			for i, arg := range c.Args {
				flag, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
				if !known[flag] || (i > 0) != strings.HasPrefix(arg, "--") {
					t.Errorf("%s: %s has no flag or command %q", name, c.Name, arg)
				}
			}
			for _, env := range c.Env {
				flag, ok := strings.CutPrefix(env.Name, "PREBAKE_")
				if ok && !known[strings.ToLower(strings.ReplaceAll(flag, "_", "-"))] {
					t.Errorf("%s: %s has no flag behind %s", name, c.Name, env.Name)
				}
			}
		}
	}
}

func TestCloudInitFlags(t *testing.T) {
	t.Parallel()
	text := read(t, "deploy/gce/cloud-init.yaml")
	var doc map[string]any
	if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
		t.Fatal(err)
	}
	_, args, ok := strings.Cut(text, "/fetcher:latest run")
	args, _, ok2 := strings.Cut(args, "ExecStop")
	if !ok || !ok2 {
		t.Fatal("cloud-init.yaml does not run the fetcher")
	}
	known := words(t, "fetcher")
	for _, word := range strings.Fields(args) {
		flag, isFlag := strings.CutPrefix(word, "--")
		flag, _, _ = strings.Cut(flag, "=")
		if isFlag && !known[flag] {
			t.Errorf("cloud-init.yaml: fetcher has no flag %s", word)
		}
	}
}

// words returns the names of a program's commands and flags, from its generated pages.
func words(t *testing.T, program string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for line := range strings.Lines(read(t, "docs/reference/flags-"+program+".md")) {
		cells := strings.Split(strings.ReplaceAll(line, `\|`, ""), " | ")
		if len(cells) != 5 || !strings.HasPrefix(cells[0], "| `") {
			continue
		}
		for name := range strings.SplitSeq(strings.Trim(cells[0], "| "), ", ") {
			found[strings.TrimLeft(strings.Trim(name, "`"), "-")] = true
		}
		for path := range strings.SplitSeq(strings.Trim(cells[4], "| \n"), ", ") {
			for name := range strings.FieldsSeq(path) {
				found[name] = true
			}
		}
	}
	if len(found) < 10 {
		t.Fatalf("the page of %s has %d commands and flags; want more", program, len(found))
	}
	return found
}

// TestDevicePluginStays checks that the plain overlay's device plugin does not depend on the value of the driver's
// state. If it did, one broken GPU would take away all GPUs of the node.
func TestDevicePluginStays(t *testing.T) {
	t.Parallel()
	var m manifest
	if err := yaml.Unmarshal([]byte(read(t, "deploy/kubernetes/overlays/plain/device-plugin.yaml")), &m); err != nil {
		t.Fatal(err)
	}
	p := m.Spec.Template.Spec
	var got []expression
	for _, term := range p.Affinity.NodeAffinity.Required.Terms {
		got = append(got, term.MatchExpressions...)
	}
	want := []expression{{Key: "prebake.dev/driver-state", Operator: "Exists"},
		{Key: "gke-no-default-nvidia-gpu-device-plugin", Operator: "NotIn", Values: []string{"true"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the device plugin selects nodes by (-want +got):\n%s", diff)
	}
	if len(p.NodeSelector) > 0 {
		t.Errorf("the device plugin's node selector = %v; want none", p.NodeSelector)
	}
}

// TestUpgradeOrder checks the commands on the page about upgrades. They apply one component after the other. Each must
// select the Deployment for which the next command waits.
func TestUpgradeOrder(t *testing.T) {
	t.Parallel()
	text, found := read(t, "docs/how-to/upgrade.md"), 0
	for _, component := range []string{"builder", "server"} {
		command := "kubectl apply -k deploy/kubernetes/overlays/gke -l app.kubernetes.io/component=" + component + "\n"
		_, after, ok := strings.Cut(text, command)
		if next, _, _ := strings.Cut(after, "\n"); !ok || !strings.Contains(next, " deployment/prebake-"+component+" ") {
			t.Errorf("docs/how-to/upgrade.md waits for the %s by %q; want that after %q", component, next, command)
		}
		for name, m := range manifests(t) {
			if m.Metadata.Labels["app.kubernetes.io/component"] != component {
				continue
			}
			if name == "Deployment/prebake-"+component {
				found++
			} else if m.Kind != "Service" {
				t.Errorf("-l app.kubernetes.io/component=%s also selects %s", component, name)
			}
		}
	}
	if found != 2 {
		t.Errorf("the labels select %d Deployments; want 2", found)
	}
}

// TestRemovePageNamesObjects checks that the page about removal deletes each object of the manifests. Only namespaces
// and volume must not be among these objects: they are deleted last.
func TestRemovePageNamesObjects(t *testing.T) {
	t.Parallel()
	text := read(t, "docs/how-to/remove.md")
	for name, m := range manifests(t) {
		kind, object, _ := strings.Cut(name, "/")
		want := strings.ToLower(kind) + "/" + object
		if m.Kind == "Namespace" || m.Kind == "PersistentVolumeClaim" {
			if strings.Contains(text, want) {
				t.Errorf("docs/how-to/remove.md deletes %s among the other objects", want)
			}
			continue
		}
		if !strings.Contains(text, want) {
			t.Errorf("docs/how-to/remove.md does not delete %s", want)
		}
	}
}
