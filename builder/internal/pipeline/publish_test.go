package pipeline_test

import (
	"net/http"
	"path"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/registry"
)

// counter counts the requests for blobs by method and digest.
type counter struct {
	mu   sync.Mutex
	seen map[string]int
}

func (c *counter) RoundTrip(r *http.Request) (*http.Response, error) {
	c.mu.Lock()
	c.seen[r.Method+" "+path.Base(r.URL.Path)]++
	c.mu.Unlock()
	return http.DefaultTransport.RoundTrip(r)
}

// A run that reuses an artifact asks each repository once for each layer, and transfers none.
func TestReuseTransfersNoLayer(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	cfg.Destinations = append(cfg.Destinations, f.repo+"/second")
	first := must(t, cfg, request("17800.0.9"))
	requests := &counter{seen: map[string]int{}}
	cfg.Registry = func(string) registry.Options { return registry.Options{Transport: requests} }
	if res := must(t, cfg, request("17800.0.9")); !res.Reused {
		t.Fatalf("reused %t, phases %v; want the artifact reused", res.Reused, phases(res))
	}
	want, got := map[string]int{}, map[string]int{}
	for _, l := range first.Layers {
		want["HEAD "+l.Digest] = 2
		for _, method := range []string{http.MethodHead, http.MethodGet} {
			if n := requests.seen[method+" "+l.Digest]; n > 0 {
				got[method+" "+l.Digest] = n
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("requests for layers (-want +got):\n%s", diff)
	}
}
