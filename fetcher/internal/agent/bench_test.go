package agent_test

import (
	"testing"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
)

// BenchmarkFetch measures how fast a node fetches three layers of some 50 MiB each. A real driver has this size.
func BenchmarkFetch(b *testing.B) {
	key := testkit.NewKey(b)
	c := sample.NewCell(b, buildA, newVersion)
	c.Bulk = 100 << 20
	ref := testkit.Registry(b, true) + "/prebake/driver"
	p := sample.Publish(b, ref, key, c)
	fetch := 0.0
	for b.Loop() {
		b.StopTimer()
		n := newNode(b, c, 1, key)
		n.cfg.NoLoad = true
		b.StartTimer()
		r, err := n.run(b, ref, p.Digest, c.Driver)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(r.FetchedBytes)
		for _, phase := range r.Phases {
			if phase.Name == "fetch" {
				fetch += phase.Seconds
			}
		}
	}
	b.ReportMetric(fetch/float64(b.N), "fetch-s/op")
}
