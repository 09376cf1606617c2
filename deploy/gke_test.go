package deploy_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/testkit/cluster"
)

// TestGPUPodSelectsOurNodes checks that the example pod runs only on nodes on which the fetcher reports a ready driver.
// On a node with Google's driver, its log would prove nothing.
func TestGPUPodSelectsOurNodes(t *testing.T) {
	t.Parallel()
	var got struct{ Spec pod }
	if err := yaml.Unmarshal([]byte(read(t, "deploy/kubernetes/examples/gpu-pod.yaml")), &got); err != nil {
		t.Fatal(err)
	}
	label := regexp.MustCompile(`labelState += "(.*)"`).FindStringSubmatch(read(t, "fetcher/internal/kube/node.go"))
	if label == nil {
		t.Fatal("fetcher/internal/kube/node.go has no constant labelState")
	}
	if diff := cmp.Diff(map[string]string{label[1]: "ready"}, got.Spec.NodeSelector); diff != "" {
		t.Errorf("node selector of gpu-pod.yaml (-want +got):\n%s", diff)
	}
}

// TestPagesStopAutoscaler checks that each page turns off the autoscaler of a pool before it cordons all nodes of the
// pool. Otherwise the autoscaler makes new nodes in that pool for the drained pods.
func TestPagesStopAutoscaler(t *testing.T) {
	t.Parallel()
	cordon := regexp.MustCompile(`kubectl cordon -l cloud\.google\.com/gke-nodepool=(\S+)`)
	found := 0
	for name, p := range pages(t) {
		for _, b := range p.Blocks {
			for _, at := range cordon.FindAllStringSubmatchIndex(b.Text, -1) {
				found++
				stop := "gcloud container node-pools update " + b.Text[at[2]:at[3]] +
					" --cluster CLUSTER --location LOCATION --no-enable-autoscaling\n"
				if !strings.Contains(b.Text[:at[0]], stop) {
					t.Errorf("%s:%d cordons a pool, without this before: %s", name, b.Line, stop)
				}
			}
		}
	}
	if found < 2 {
		t.Errorf("%d pools are cordoned; want those of remove.md and coming-from.md", found)
	}
}

// TestCINamesNoImage checks that the files for CI systems name no image of the server: nobody has published one, so the
// reader must name his own.
func TestCINamesNoImage(t *testing.T) {
	t.Parallel()
	for _, name := range files(t, ".yml", ".yaml", ".sh") {
		if strings.HasPrefix(name, "deploy/ci/") && strings.Contains(read(t, name), "ghcr.io/prebake/") {
			t.Errorf("%s names an image of ghcr.io/prebake; want the reader's image", name)
		}
	}
}

// TestSigningKeyIsOptional checks that a builder starts without the Secret of a signing key. With a key in a KMS, there
// is no Secret, and kubelet would wait for it without end.
func TestSigningKeyIsOptional(t *testing.T) {
	t.Parallel()
	var volumes []string
	for part := range strings.SplitSeq(read(t, "deploy/kubernetes/base/builder.yaml"), "\n---\n") {
		var m struct {
			Spec struct {
				Template struct {
					Spec struct {
						Volumes []struct {
							Secret struct {
								Name     string `yaml:"secretName"`
								Optional bool
							}
						}
					}
				}
			}
		}
		if err := yaml.Unmarshal([]byte(part), &m); err != nil {
			t.Fatal(err)
		}
		for _, v := range m.Spec.Template.Spec.Volumes {
			if v.Secret.Optional {
				volumes = append(volumes, v.Secret.Name)
			}
		}
	}
	if !slices.Equal(volumes, []string{"prebake-signing-key"}) {
		t.Errorf("optional Secrets of the builder = %v; want prebake-signing-key", volumes)
	}
}

// kubectlProgram returns a function that runs kubectl without a cluster, and returns what it printed.
func kubectlProgram(t *testing.T) func(args ...string) (string, error) {
	t.Helper()
	bin := os.Getenv(cluster.Env)
	if bin == "" {
		t.Skip(cluster.Env + " is not set, so there is no kubectl: run deploy/kubernetes.sh")
	}
	return func(args ...string) (string, error) {
		var stderr bytes.Buffer
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "kubectl"), args...)
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, stderr.Bytes())
		}
		return string(out), err
	}
}

// rendered returns the objects that kustomize makes of an overlay, by kind and name.
func rendered(t *testing.T, overlay string) map[string]manifest {
	t.Helper()
	out, err := kubectlProgram(t)("kustomize", "kubernetes/overlays/"+overlay)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]manifest{}
	for part := range strings.SplitSeq(out, "\n---\n") {
		var head struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(part), &head); err != nil {
			t.Fatal(err)
		}
		var m manifest // the kinds differ in the types of the other fields
		if head.Kind == "Deployment" || head.Kind == "DaemonSet" {
			if err := yaml.Unmarshal([]byte(part), &m); err != nil {
				t.Fatal(err)
			}
		}
		all[head.Kind+"/"+head.Metadata.Name] = m
	}
	return all
}

// TestGKEOverlayAvoidsSpot checks that server and builder do not run on Spot nodes, and that the fetcher does.
func TestGKEOverlayAvoidsSpot(t *testing.T) {
	t.Parallel()
	all := rendered(t, "gke")
	for name, want := range map[string]bool{
		"Deployment/prebake-server": true, "Deployment/prebake-builder": true, "DaemonSet/prebake-fetcher": false,
	} {
		terms := all[name].Spec.Template.Spec.Affinity.NodeAffinity.Required.Terms
		avoids := len(terms) > 0
		for _, term := range terms {
			avoids = avoids && slices.ContainsFunc(term.MatchExpressions, func(e expression) bool {
				return e.Key == "cloud.google.com/gke-spot" && e.Operator == "NotIn" && slices.Equal(e.Values, []string{"true"})
			})
		}
		if avoids != want {
			t.Errorf("%s avoids Spot nodes: %t; want %t", name, avoids, want)
		}
	}
}

// TestFetcherOverlay checks that the overlay for further clusters has the same fetcher as the one for the first, with
// another server, and neither server nor builder.
func TestFetcherOverlay(t *testing.T) {
	t.Parallel()
	first, further := rendered(t, "gke"), rendered(t, "gke-fetcher")
	for name := range first {
		ours := !strings.HasSuffix(name, "/prebake-server") && !strings.HasSuffix(name, "/prebake-builder") &&
			name != "Namespace/prebake"
		if _, found := further[name]; found != ours {
			t.Errorf("overlays/gke-fetcher has %s: %t; want %t", name, found, ours)
		}
	}
	for name := range further {
		if _, found := first[name]; !found {
			t.Errorf("overlays/gke-fetcher has %s, which overlays/gke does not have", name)
		}
	}
	want, got := first["DaemonSet/prebake-fetcher"], further["DaemonSet/prebake-fetcher"]
	args := want.Spec.Template.Spec.Containers[0].Args
	if args[1] != "--server=http://prebake-server.prebake.svc:8440" {
		t.Fatalf("the fetcher's arguments = %v; want --server first", args)
	}
	args[1] = "--server=http://ADDRESS:8440"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the fetcher of overlays/gke-fetcher (-want +got):\n%s", diff)
	}
}
