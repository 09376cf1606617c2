package pipeline_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// An artifact that is older than RebuildAfter is compiled again, even with a full cache, and gets a new provenance. A
// run that reuses the artifact claims no new build.
func TestRenew(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	first := must(t, cfg, request("17800.0.9"))
	provenances := func() int {
		t.Helper()
		repo, err := registry.Open(f.repo, registry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		attached, err := repo.Attached(t.Context(), first.Digest, trust.ArtifactTypeBundle)
		if err != nil {
			t.Fatal(err)
		}
		return len(f.verifier(t).Statements(attached, first.Digest, trust.PredicateProvenance))
	}
	cfg.RebuildAfter = time.Hour
	if res := must(t, cfg, request("17800.0.9")); !res.Reused || provenances() != 1 {
		t.Errorf("a young artifact: reused %v, %d provenances; want it reused, and one", res.Reused, provenances())
	}
	cfg.RebuildAfter = time.Nanosecond
	res := must(t, cfg, request("17800.0.9"))
	if res.Reused || res.Digest != first.Digest || provenances() != 2 ||
		!slices.Equal(phases(res), whole) {
		t.Errorf("an old artifact: reused %v, digest %s, %d provenances; want %s made again, and two", res.Reused, res.Digest,
			provenances(), first.Digest)
	}
}

// A provenance by a wrong clock, with a time in the future, does not make an old artifact young for ever.
func TestRenewWrongClock(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	first := must(t, cfg, request("17800.0.9"))
	signer, err := sign.LoadSigner(t.Context(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	statement, err := sign.Provenance(first.Digest, sign.BuildFacts{Kernel: first.Kernel, Fingerprint: first.Fingerprint,
		Driver: first.Driver, BuilderID: cfg.BuilderID, Started: time.Now(), Finished: time.Now().AddDate(50, 0, 0),
		Facts: pipeline.Recipes()})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := sign.Bundle(t.Context(), signer, statement)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	subject, err := repo.Resolve(t.Context(), first.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Attach(t.Context(), subject, trust.ArtifactTypeBundle, raw,
		trust.OfType(trust.PredicateProvenance)); err != nil {
		t.Fatal(err)
	}
	cfg.RebuildAfter = time.Nanosecond
	res, log, err := build(t, cfg, request("17800.0.9"))
	if err != nil || !slices.ContainsFunc(res.Phases, func(p timeline.Phase) bool {
		return p.Name == "look up" && strings.Contains(p.Note, "because of its age")
	}) {
		t.Errorf("Run = %v, phases %+v; want it built again because of its age\n%s", err, res.Phases, log)
	}
}

// Useless statements, which anybody who may push can attach, do not make a young artifact old.
func TestRenewBesideJunk(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	first := must(t, cfg, request("17800.0.9"))
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	testkit.AttachJunk(t, repo, first.Digest, trust.PredicateProvenance)
	for _, after := range []time.Duration{0, time.Hour} {
		cfg.RebuildAfter = after
		if res := must(t, cfg, request("17800.0.9")); !res.Reused {
			t.Errorf("with RebuildAfter %v: phases %+v; want the artifact reused", after, res.Phases)
		}
	}
}

// A run that builds again publishes only bytes that it made itself: no product of other modules comes from the cache.
func TestRenewOtherBytes(t *testing.T) {
	t.Parallel()
	for _, signed := range []bool{false, true} {
		t.Run(fmt.Sprintf("signed modules %t", signed), func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			files := driverFiles()
			files["kernel-open/Makefile"] = "modules:\n" + // each compile gives other bytes
				"\t" + `@echo "const char salt[] = \"$$(date +%N)\";" >>nv.c` + "\n" +
				"\t@$(CC) -c nv.c -o nvidia.ko\n"
			f.driver(t, files)
			cfg := f.config(t, emptyCache(t))
			if signed {
				tree := headerFiles()
				tree[headers+".config"] += "CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_HASH=\"sha512\"\n"
				f.kernel(t, "17800.0.9", tree)
				cfg.ModuleKey, cfg.ModuleCert = moduleKey(t)
			}
			first := must(t, cfg, request("17800.0.9"))
			cfg.RebuildAfter = time.Nanosecond
			res, log, err := build(t, cfg, request("17800.0.9"))
			if !fault.Is(err, fault.PublishRefused) || res.Digest == first.Digest {
				t.Errorf("Run = %v, digest %s; want another digest than %s refused\n%s", err, res.Digest, first.Digest, log)
			}
		})
	}
}

// A run that builds again does not take compiled objects from the cache.
func TestRenewWithoutObjects(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	usesObjects := func(after time.Duration) bool {
		t.Helper()
		cfg := f.config(t, emptyCache(t))
		cfg.RebuildAfter = after
		must(t, cfg, request("17800.0.9"))
		// Package compile keeps a fact about the headers wherever it may keep objects.
		kept, err := filepath.Glob(filepath.Join(cfg.Cache.Dir(), "facts", "header-view-*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(kept) > 0
	}
	if first, again := usesObjects(0), usesObjects(time.Nanosecond); !first || again {
		t.Errorf("the first build uses objects: %t, and a build because of age: %t; want true, false", first, again)
	}
}

// cutter fails the n-th upload of a manifest and all later requests.
type cutter struct {
	n    atomic.Int64
	done atomic.Bool
}

func (c *cutter) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") && c.n.Add(-1) == 0 {
		c.done.Store(true)
	}
	if c.done.Load() {
		return nil, errors.New("the machine lost its network")
	}
	return http.DefaultTransport.RoundTrip(r)
}

// A run that was cut off between two statements is completed by the next run, also for a sibling of a published cell.
func TestRetryAddsTestResult(t *testing.T) {
	t.Parallel()
	for n := int64(1); n <= 2; n++ {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			tree := headerFiles()
			tree[headers+"Module.symvers"] += "0x00000000\tdrm_open\tdrivers/gpu/drm/drm\tEXPORT_SYMBOL\t\n"
			f.kernel(t, "17800.0.9", tree)
			f.kernel(t, "17800.1.9", tree)
			files := driverFiles()
			files["kernel-open/nv.c"] = strings.Replace(files["kernel-open/nv.c"], "depends=", "depends=drm", 1)
			f.driver(t, files)
			cfg := f.config(t, emptyCache(t))
			cfg.GuestInit, cfg.NVMLProbe = "none", "none" // the load test ends before it needs them
			must(t, cfg, request("17800.0.9"))
			var boot bytes.Buffer
			tarOf(t, map[string]string{"vmlinuz": "no kernel"}, gzip.NewWriter(&boot))
			f.putChecked(t, "cos/17800.1.9/lakitu/prebake-boot.tgz", boot.Bytes())

			cut := &cutter{}
			cut.n.Store(n)
			cfg.Registry = func(string) registry.Options { return registry.Options{Transport: cut} }
			if _, log, err := build(t, cfg, request("17800.1.9")); err == nil {
				t.Fatalf("Run without a network succeeded\n%s", log)
			}
			cfg.Registry = nil
			res := must(t, cfg, request("17800.1.9"))
			f.checkArtifact(t, res, 6) // a kernel match and a test result more than the first build's
		})
	}
}
