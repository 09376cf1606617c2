package deploy_test

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// backupPod has the fields of the pod in examples/backup-pod.yaml, and of the server's pod, that must fit together.
type backupPod struct {
	Metadata struct {
		Name, Namespace string
		Labels          map[string]string
	}
	Spec backupPodSpec
}

type backupPodSpec struct {
	ActiveDeadline  int            `yaml:"activeDeadlineSeconds"`
	SecurityContext map[string]any `yaml:"securityContext"`
	Affinity        struct {
		PodAffinity struct {
			Required []struct {
				TopologyKey   string   `yaml:"topologyKey"`
				LabelSelector selector `yaml:"labelSelector"`
			} `yaml:"requiredDuringSchedulingIgnoredDuringExecution"`
		} `yaml:"podAffinity"`
	}
	Containers []struct {
		Env []struct {
			Name      string
			ValueFrom map[string]any `yaml:"valueFrom"`
		}
		SecurityContext map[string]any `yaml:"securityContext"`
		VolumeMounts    []struct {
			Name      string
			MountPath string `yaml:"mountPath"`
		} `yaml:"volumeMounts"`
	}
	Volumes []map[string]any
}

// selects reports whether a selector matches labels.
func (s selector) selects(labels map[string]string) bool {
	for key, value := range s.MatchLabels {
		if labels[key] != value {
			return false
		}
	}
	return len(s.MatchLabels) > 0
}

// TestBackupPod compares the pod for backups with the server's pod. Both must have the same user, claim and queue, and
// run on the same node. The scheduler lets a pod start without the server only if the pod's affinity selects the pod
// itself. No service, policy or budget of the manifests may select the pod.
func TestBackupPod(t *testing.T) {
	t.Parallel()
	var pod backupPod
	if err := yaml.Unmarshal([]byte(read(t, "deploy/kubernetes/examples/backup-pod.yaml")), &pod); err != nil {
		t.Fatal(err)
	}
	var server struct {
		Spec struct {
			Template struct {
				Metadata struct{ Labels map[string]string }
				Spec     backupPodSpec
			}
		}
	}
	var service struct {
		Spec struct{ Selector map[string]string }
	}
	for dec := yaml.NewDecoder(bytes.NewBufferString(read(t, "deploy/kubernetes/base/server.yaml"))); ; {
		var node yaml.Node
		var head struct{ Kind string }
		if err := dec.Decode(&node); err != nil {
			break
		}
		if err := node.Decode(&head); err != nil {
			t.Fatal(err)
		}
		switch head.Kind {
		case "Deployment":
			if err := node.Decode(&server); err != nil {
				t.Fatal(err)
			}
		case "Service":
			if err := node.Decode(&service); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := server.Spec.Template.Spec
	if pod.Spec.ActiveDeadline <= 0 {
		t.Error("the pod has no deadline; want one, because it keeps the claim on its node")
	}
	if len(pod.Spec.Containers) != 1 || len(other.Containers) != 1 {
		t.Fatalf("the pods have %d and %d containers; want one each", len(pod.Spec.Containers), len(other.Containers))
	}
	ours, theirs := pod.Spec.Containers[0], other.Containers[0]
	for what, pair := range map[string][2]any{
		"user":             {other.SecurityContext, pod.Spec.SecurityContext},
		"security context": {theirs.SecurityContext, ours.SecurityContext},
		"mounts":           {theirs.VolumeMounts, ours.VolumeMounts},
		"volumes":          {other.Volumes, pod.Spec.Volumes},
	} {
		if diff := cmp.Diff(pair[0], pair[1]); diff != "" {
			t.Errorf("%s (-server +backup):\n%s", what, diff)
		}
	}
	for _, v := range theirs.Env {
		if v.Name == "PREBAKE_QUEUE" && (len(ours.Env) != 1 || !cmp.Equal(v, ours.Env[0])) {
			t.Errorf("the backup's variables are %v; want only %v", ours.Env, v)
		}
	}
	labels := server.Spec.Template.Metadata.Labels
	required := pod.Spec.Affinity.PodAffinity.Required
	if len(required) != 1 || required[0].TopologyKey != "kubernetes.io/hostname" ||
		!required[0].LabelSelector.selects(labels) || !required[0].LabelSelector.selects(pod.Metadata.Labels) {
		t.Errorf("affinity = %v; want the node of the server's pod, and the pod itself", required)
	}
	if (selector{service.Spec.Selector}).selects(pod.Metadata.Labels) {
		t.Error("the server's service selects the backup's pod")
	}
	for name, p := range policies(t) {
		if p.Metadata.Namespace == pod.Metadata.Namespace &&
			(p.Spec.Selector.selects(pod.Metadata.Labels) || p.Spec.PodSelector.selects(pod.Metadata.Labels)) {
			t.Errorf("%s selects the backup's pod", name)
		}
	}
}
