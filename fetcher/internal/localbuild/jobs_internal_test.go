package localbuild

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

func TestJobs(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	for _, row := range []struct {
		processors int
		limit      int64
		want       int
	}{
		{16, 0, 16}, {1, 0, 1}, {16, 64 << 20, 1}, {16, gib, 1}, {16, gib + gib/2, 1}, {16, 3 * gib, 2},
		{16, 9 * gib, 8}, {2, 64 * gib, 2},
	} {
		if got := jobs(row.processors, row.limit); got != row.want {
			t.Errorf("jobs(%d, %d) = %d; want %d", row.processors, row.limit, got, row.want)
		}
	}
}

// TestDaemonSet compares the limits in the manifest of the DaemonSet with the needs of a compile on the node. The
// memory must be enough for all compilers that the fetcher starts. The grace period must be long enough for a builder
// that is told to stop.
func TestDaemonSet(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../../deploy/kubernetes/base/fetcher.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Spec struct {
			Template struct {
				Spec struct {
					TerminationGracePeriodSeconds int `yaml:"terminationGracePeriodSeconds"`
					Containers                    []struct {
						Resources struct{ Limits map[string]string }
					}
				}
			}
		}
	}
	if err := yaml.Unmarshal(text, &set); err != nil {
		t.Fatal(err)
	}
	pod := set.Spec.Template.Spec
	memory := pod.Containers[0].Resources.Limits["memory"]
	gib, err := strconv.ParseInt(strings.TrimSuffix(memory, "Gi"), 10, 64)
	const measured = 301 << 20 // from docs/reference/limits.md: a compile with one compiler; with eight, each needs less
	if n := jobs(64, gib<<30); err != nil || gib<<30 < baseMemory+int64(n)*measured {
		t.Errorf("memory limit %s, for %d compilers; want enough for the fetcher and each compiler", memory, n)
	}
	if ends := time.Duration(pod.TerminationGracePeriodSeconds) * time.Second; ends < grace+20*time.Second {
		t.Errorf("the pod has %s to end; want %s for the builder, and more for the rest", ends, grace)
	}
}
