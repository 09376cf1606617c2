package agent_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
)

// persisting stands in for NVML with two GPUs. The second GPU refuses persistence mode.
type persisting struct {
	probe
	asked *[]bool
}

func (p persisting) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	*p.asked = append(*p.asked, persist)
	n, err := p.probe.Probe(ctx, library, persist)
	for i := range n.Devices {
		n.Devices[i].PCIBusID, n.Devices[i].Persistence = []string{"0000:00:04.0", "0000:00:05.0"}[i], "off"
		if persist {
			n.Devices[i].Persistence = []string{"on", "Insufficient Permissions"}[i]
		}
	}
	return n, err
}

func TestPersistence(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	for _, on := range []bool{false, true} {
		n := newNode(t, c, 2, key)
		var asked []bool
		n.parts.Probe, n.cfg.Persistence = persisting{probe{n.root, 2}, &asked}, on
		r, err := n.run(t, ref, p.Digest, c.Driver)
		if err != nil || !slices.Equal(asked, []bool{on}) {
			t.Fatalf("Run = %v, asked %v; want once, and to turn it on: %v", err, asked, on)
		}
		got := strings.Join(r.Waiting, "\n")
		if on != strings.Contains(got, "GPU 0000:00:05.0: Insufficient Permissions") ||
			strings.Contains(got, "00:04.0") {
			t.Errorf("with persistence %v: waiting %q", on, got)
		}
	}
}
