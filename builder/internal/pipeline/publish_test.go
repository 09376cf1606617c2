package pipeline_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
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

// crowded is a registry that lists many newer attachments with the same labels for each attachment. Nobody has them.
type crowded struct{}

func (crowded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil || r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/referrers/") ||
		resp.StatusCode != http.StatusOK {
		return resp, err
	}
	var list v1.IndexManifest
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return nil, err
	}
	for n, d := range list.Manifests {
		for i := range 1100 { // more than one search reads
			d.Digest.Hex = fmt.Sprintf("%060d%04d", n, i)
			if d.Annotations != nil {
				d.Annotations = maps.Clone(d.Annotations)
				d.Annotations["org.opencontainers.image.created"] = "2099-01-01T00:00:00Z"
			}
			list.Manifests = append(list.Manifests, d)
		}
	}
	raw, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	return resp, nil
}

// More attachments than a client reads, which anybody who may push can make, do not keep the machine that built an
// artifact from reusing it.
func TestReuseInCrowd(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	must(t, cfg, request("17800.0.9"))
	cfg.Registry = func(string) registry.Options { return registry.Options{Transport: crowded{}} }
	res, log, err := build(t, cfg, request("17800.0.9"))
	if err != nil || !res.Reused {
		t.Errorf("Run = reused %t, %v; want the artifact reused\n%s", res.Reused, err, log)
	}
}

// TestDamagedIndex has a bucket whose index cannot be parsed. The build must end with the index's URL, and publish in
// no destination, whether it notices the index before the compile or only before it publishes.
func TestDamagedIndex(t *testing.T) {
	t.Parallel()
	for recipe, want := range map[string]bool{"": false, bundle.PackRecipe: true} {
		t.Run("recipe="+recipe, func(t *testing.T) {
			t.Parallel()
			cfg := newFarm(t).config(t, emptyCache(t))
			folder := filepath.Join(t.TempDir(), "bucket")
			index := filepath.Join(folder, tarball.IndexName(target.Kernel{BuildID: "17800.0.9", Board: "lakitu"}))
			err := errors.Join(os.MkdirAll(filepath.Dir(index), 0o755), os.WriteFile(index, []byte(`{"format":1,`), 0o644))
			if err != nil {
				t.Fatal(err)
			}
			cfg.Destinations = append(cfg.Destinations, "file://"+folder)
			req := request("17800.0.9")
			req.PackRecipe = recipe
			res, log, err := build(t, cfg, req)
			if !fault.Is(err, fault.PublishRefused) || !strings.Contains(err.Error(), index) || fault.Hint(err) == "" ||
				len(res.Repositories) != 0 {
				t.Errorf("Run = %v, published in %v; want it refused because of %s\n%s", err, res.Repositories, index, log)
			}
			if compiled := slices.Contains(phases(res), "publish"); compiled != want {
				t.Errorf("phases %v; want the phase publish: %t", phases(res), want)
			}
		})
	}
}
