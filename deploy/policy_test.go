package deploy_test

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// selector is the part of a policy or budget that selects pods.
type selector struct {
	MatchLabels map[string]string `yaml:"matchLabels"`
}

// policy has the fields of budgets and network policies that the tests check.
type policy struct {
	Kind     string
	Metadata struct{ Name, Namespace string }
	Spec     struct {
		Selector    selector
		PodSelector selector `yaml:"podSelector"`
		PolicyTypes []string `yaml:"policyTypes"`
		Ingress     []rule
		Egress      []rule
	}
}

type rule struct {
	Ports    []struct{ Port int }
	From, To []struct {
		PodSelector       *selector `yaml:"podSelector"`
		NamespaceSelector *selector `yaml:"namespaceSelector"`
		IPBlock           struct {
			CIDR   string
			Except []string
		} `yaml:"ipBlock"`
	}
}

// policies reads the budgets and network policies of base and components.
func policies(t *testing.T) map[string]policy {
	t.Helper()
	all := map[string]policy{}
	paths, err := filepath.Glob("kubernetes/*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("kubernetes/components/*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(paths, more...) {
		dec := yaml.NewDecoder(bytes.NewBufferString(read(t, "deploy/"+path)))
		for {
			var node yaml.Node
			err := dec.Decode(&node)
			if errors.Is(err, io.EOF) {
				break
			}
			var head struct{ Kind string }
			if err == nil {
				err = node.Decode(&head)
			}
			if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			if head.Kind != "NetworkPolicy" && head.Kind != "PodDisruptionBudget" {
				continue
			}
			var p policy
			if err := node.Decode(&p); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			all[p.Kind+"/"+p.Metadata.Name] = p
		}
	}
	return all
}

// TestPoliciesSelectOurPods checks that each policy selects existing pods. A policy that selects none protects nothing.
func TestPoliciesSelectOurPods(t *testing.T) {
	t.Parallel()
	pods := map[string]bool{} // by namespace and component
	for _, m := range manifests(t) {
		if l := m.Spec.Template.Metadata.Labels; len(l) > 0 {
			pods[m.Metadata.Namespace+"/"+l["app.kubernetes.io/name"]+"/"+l["app.kubernetes.io/component"]] = true
		}
	}
	there := func(namespace string, s selector) bool {
		return len(s.MatchLabels) == 2 &&
			pods[namespace+"/"+s.MatchLabels["app.kubernetes.io/name"]+"/"+s.MatchLabels["app.kubernetes.io/component"]]
	}
	all := policies(t)
	for name, p := range all {
		own := p.Spec.Selector
		if p.Kind == "NetworkPolicy" {
			own = p.Spec.PodSelector
		}
		if !there(p.Metadata.Namespace, own) {
			t.Errorf("%s selects %v of %s: no such pod", name, own, p.Metadata.Namespace)
		}
		for _, r := range append(p.Spec.Ingress, p.Spec.Egress...) {
			for _, peer := range append(r.From, r.To...) {
				if peer.PodSelector == nil || peer.NamespaceSelector == nil ||
					peer.PodSelector.MatchLabels["app.kubernetes.io/name"] != "prebake" {
					continue
				}
				if ns := peer.NamespaceSelector.MatchLabels["kubernetes.io/metadata.name"]; !there(ns, *peer.PodSelector) {
					t.Errorf("%s names %v of %s: no such pod", name, *peer.PodSelector, ns)
				}
			}
		}
	}
	for _, want := range []string{
		"PodDisruptionBudget/prebake-server", "PodDisruptionBudget/prebake-builder",
		"NetworkPolicy/prebake-server", "NetworkPolicy/prebake-builder", "NetworkPolicy/prebake-server-keda",
		"NetworkPolicy/prebake-server-prometheus",
	} {
		if _, ok := all[want]; !ok {
			t.Errorf("the manifests have no %s", want)
		}
	}
}

// TestBuilderNetwork checks that nothing may connect to a builder, and that a builder may connect to few ports only.
func TestBuilderNetwork(t *testing.T) {
	t.Parallel()
	p := policies(t)["NetworkPolicy/prebake-builder"]
	if diff := cmp.Diff([]string{"Ingress", "Egress"}, p.Spec.PolicyTypes); diff != "" || len(p.Spec.Ingress) > 0 {
		t.Errorf("the builder's policy is for (-want +got):\n%s with %d rules for ingress; want none", diff,
			len(p.Spec.Ingress))
	}
	ports := map[int]bool{}
	for _, r := range p.Spec.Egress {
		if len(r.Ports) == 0 {
			t.Error("a rule for egress names no port, and so permits all")
		}
		for _, port := range r.Ports {
			ports[port.Port] = true
		}
		for _, peer := range r.To {
			if peer.IPBlock.CIDR == "0.0.0.0/0" && !cmp.Equal(peer.IPBlock.Except, []string{"169.254.0.0/16"}) {
				t.Errorf("builders may reach %v except %v; want no link-local address", peer.IPBlock.CIDR, peer.IPBlock.Except)
			}
		}
	}
	if diff := cmp.Diff(map[int]bool{53: true, 443: true, 5432: true, 8440: true}, ports); diff != "" {
		t.Errorf("builders call by the ports (-want +got):\n%s", diff)
	}
}

// TestProbesHaveTimeouts checks that each probe sets a timeout. With Kubernetes' default of one second, a busy disk
// would get the pod killed.
func TestProbesHaveTimeouts(t *testing.T) {
	t.Parallel()
	found := 0
	paths, err := filepath.Glob("kubernetes/*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		dec := yaml.NewDecoder(bytes.NewBufferString(read(t, "deploy/"+path)))
		for {
			var doc map[string]any
			if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			eachProbe(doc, func(name string, probe map[string]any) {
				found++
				if seconds, _ := probe["timeoutSeconds"].(int); seconds < 5 {
					t.Errorf("%s: %s has timeoutSeconds %v; want 5 or more", path, name, probe["timeoutSeconds"])
				}
			})
		}
	}
	if found < 5 {
		t.Errorf("%d probes; want those of server and fetcher", found)
	}
}

func eachProbe(node any, see func(string, map[string]any)) {
	switch n := node.(type) {
	case []any:
		for _, v := range n {
			eachProbe(v, see)
		}
	case map[string]any:
		for k, v := range n {
			if probe, ok := v.(map[string]any); ok && strings.HasSuffix(k, "Probe") {
				see(k, probe)
				continue
			}
			eachProbe(v, see)
		}
	}
}
