package pipeline_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/testdriver"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// TestRenew checks that an artifact older than RebuildAfter is compiled again, even with a full cache, and gets a
// second provenance. A run that reuses the artifact must not add a provenance.
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

// TestRenewWrongClock adds a provenance with a time in the future, as by a builder with a wrong clock. The artifact
// must nevertheless count as old.
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

// TestRenewBesideJunk attaches invalid statements to an artifact, as anybody with the right to push can. The artifact
// must still count as young.
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

// TestRenewOtherBytes builds an old artifact again with a driver that gives other bytes in each compile. The build must
// publish only what it made itself. If it took a product of the earlier modules from the cache, the bytes would not
// differ.
func TestRenewOtherBytes(t *testing.T) {
	t.Parallel()
	for _, signed := range []bool{false, true} {
		t.Run(fmt.Sprintf("signed modules %t", signed), func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			f.driver(t, salted(driverFiles()))
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

// TestRenewWithoutObjects checks that a build because of age takes no compiled object from the cache.
func TestRenewWithoutObjects(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	usesObjects := func(after time.Duration) bool {
		t.Helper()
		cfg := f.config(t, emptyCache(t))
		cfg.RebuildAfter = after
		must(t, cfg, request("17800.0.9"))
		// If package compile may store objects in the cache, it stores this fact about the headers first.
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

// newSiblings returns a farm with a driver whose objects can be shared, and two COS builds. Their kernels differ only
// in the checksum of a symbol.
func newSiblings(t *testing.T) (f *farm, builds []string) {
	t.Helper()
	f = newFarm(t)
	files := map[string]string{"kernel-open/nvidia/info.c": driverFiles()["kernel-open/nv.c"], "nvidia-smi*": "ELF",
		"firmware/gsp_tu10x.bin": "gsp"}
	for name, text := range testdriver.Sources() {
		files["kernel-open/"+name] = text
	}
	files["kernel-open/nvidia/info.c"] = strings.Replace(files["kernel-open/nvidia/info.c"], "SMP mod_unload",
		"modversions", 1)
	f.driver(t, files)
	for build, crc := range map[string]string{"17800.0.9": "0x11111111", "17800.1.9": "0x22222222"} {
		tree := map[string]string{headers + "include/config/kernel.release": "6.1.0-9-test\n"}
		for name, text := range testdriver.Headers("6.1.0-9-test", crc) {
			tree[headers+name] = text
		}
		tree[headers+".config"] = "CONFIG_64BIT=y\nCONFIG_MODVERSIONS=y\n" // without a salt, which the module would lack
		f.kernel(t, build, tree)
	}
	return f, []string{"17800.0.9", "17800.1.9"}
}

// notes returns the notes of the parts of a compile, and the note of the phase package without the sizes in it.
func notes(res *pipeline.Result) (all []string) {
	for _, p := range res.Phases {
		switch {
		case p.Of == "compile" && (p.Name == "conftest" || p.Name == "compile"):
			all = append(all, p.Note)
		case p.Name == "package":
			_, cached, _ := strings.Cut(p.Note, " MB")
			all = append(all, "package"+cached)
		}
	}
	return all
}

// TestRenewShares checks the cells that one pass builds again because of their age. They share objects and layers with
// each other. They must take nothing from an earlier pass or from the cache, and must leave nothing behind.
func TestRenewShares(t *testing.T) {
	t.Parallel()
	f, builds := newSiblings(t)
	cfg := f.config(t, emptyCache(t))
	alone := []string{"6 tests", "3 files", "package"}
	shared := []string{"6 tests, 6 remembered", "3 files, 1 reused", "package, 2 cached"}
	var first []*pipeline.Result
	for i, build := range builds {
		first = append(first, must(t, cfg, request(build)))
		if diff := cmp.Diff([][]string{alone, shared}[i], notes(first[i])); diff != "" {
			t.Fatalf("first build of %s (-want +got):\n%s", build, diff)
		}
	}
	if first[0].Digest == first[1].Digest {
		t.Fatalf("both kernels have artifact %s, so this test proves nothing", first[0].Digest)
	}
	cfg.RebuildAfter = time.Nanosecond
	for pass := range 2 {
		fresh, remove, err := pipeline.OpenFresh(cfg.Cache)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Fresh = fresh
		for i, build := range builds {
			res := must(t, cfg, request(build))
			if diff := cmp.Diff([][]string{alone, shared}[i], notes(res)); diff != "" || res.Digest != first[i].Digest {
				t.Errorf("pass %d, build of %s: %s; want %s made again (-want +got):\n%s", pass, build, res.Digest,
					first[i].Digest, diff)
			}
		}
		if err := remove(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(fresh.Dir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the pass left its cache: %v", err)
		}
	}
	// Without a cache for the pass, each build has a cache of its own, so it shares nothing.
	cfg.Fresh = nil
	for i, build := range builds {
		if diff := cmp.Diff(alone, notes(must(t, cfg, request(build)))); diff != "" {
			t.Errorf("alone, build of %s (-want +got):\n%s", builds[i], diff)
		}
	}
	if left, err := filepath.Glob(filepath.Join(cfg.Cache.Dir(), "work", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("left in the cache: %v, %v", left, err)
	}
}

// TestRenewKeepsNoModules checks that the cache of a pass keeps no modules after a build. The modules' provenance is
// about that one build, so no other build could use them.
func TestRenewKeepsNoModules(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	tree := headerFiles()
	tree[headers+".config"] += "CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_HASH=\"sha512\"\n"
	f.kernel(t, "17800.0.9", tree)
	cfg := f.config(t, emptyCache(t))
	cfg.ModuleKey, cfg.ModuleCert = moduleKey(t)
	first := must(t, cfg, request("17800.0.9"))
	fresh, remove, err := pipeline.OpenFresh(cfg.Cache)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = remove() }()
	cfg.Fresh, cfg.RebuildAfter = fresh, time.Nanosecond
	if res := must(t, cfg, request("17800.0.9")); res.Reused || res.Digest != first.Digest {
		t.Fatalf("reused %v, %s; want %s made again", res.Reused, res.Digest, first.Digest)
	}
	kinds, err := fresh.Kinds(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kinds {
		if (k.Name == "modules" || k.Name == "signed") && k.Entries > 0 {
			t.Errorf("the pass keeps %d entries of %s with %d bytes; want none", k.Entries, k.Name, k.Bytes)
		}
	}
	if left, err := filepath.Glob(filepath.Join(fresh.Dir(), "work", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("left in the cache of the pass: %v, %v", left, err)
	}
}

// TestRenewSecondAttempt cuts the first attempt off while it publishes. A second attempt in the same pass must compile
// again, and so publish a second provenance.
func TestRenewSecondAttempt(t *testing.T) {
	t.Parallel()
	f, builds := newSiblings(t)
	cfg := f.config(t, emptyCache(t))
	first := must(t, cfg, request(builds[0]))
	cfg.RebuildAfter = time.Nanosecond
	fresh, remove, err := pipeline.OpenFresh(cfg.Cache)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = remove() }()
	cfg.Fresh = fresh
	cut := &cutter{}
	cut.n.Store(1)
	cfg.Registry = func(string) registry.Options { return registry.Options{Transport: cut} }
	if _, log, err := build(t, cfg, request(builds[0])); err == nil {
		t.Fatalf("Run without a network succeeded\n%s", log)
	}
	cfg.Registry = nil
	must(t, cfg, request(builds[0]))
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	attached, err := repo.Attached(t.Context(), first.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(f.verifier(t).Statements(attached, first.Digest, trust.PredicateProvenance)); n != 2 {
		t.Errorf("%d provenances; want two", n)
	}
}

// TestOpenFreshAfterKill checks that the next Open of a cache removes the pass's cache that a killed run left inside
// it.
func TestOpenFreshAfterKill(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cache, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	fresh, remove, err := pipeline.OpenFresh(cache)
	if err != nil {
		t.Fatal(err)
	}
	fill := func(_ context.Context, dir string) error {
		return os.WriteFile(filepath.Join(dir, "object"), nil, 0o644)
	}
	if _, _, err := fresh.Tree(t.Context(), "object", "key", fill); err != nil {
		t.Fatal(err)
	}
	inside, err := filepath.Rel(dir, fresh.Dir())
	if err != nil {
		t.Fatal(err)
	}
	dead := t.TempDir() // a copy has no locks, as if the run had been killed
	if err := os.CopyFS(dead, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(remove(), cache.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dead, inside, "trees", "object", "key", "object")); err != nil {
		t.Fatalf("the copy lacks the object, so this test proves nothing: %v", err)
	}
	next, err := cas.Open(dead)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = next.Close() }()
	if _, err := os.Stat(filepath.Join(dead, inside)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the cache of the killed run is still there: %v", err)
	}
}

// TestRenewAfterKeyChange changes the signing key. The verifier of the new key trusts no statement about the artifact's
// age, so the age is unknown. The build must say so, take nothing from the cache, and sign with the new key. After that
// the artifact counts as young.
func TestRenewAfterKeyChange(t *testing.T) {
	t.Parallel()
	f, builds := newSiblings(t)
	cfg := f.config(t, emptyCache(t))
	first := must(t, cfg, request(builds[0]))
	f.newKey(t)
	cfg.Key, cfg.RebuildAfter = f.key, time.Hour
	res := must(t, cfg, request(builds[0]))
	if res.Reused || res.Digest != first.Digest || !slices.ContainsFunc(res.Phases, func(p timeline.Phase) bool {
		return p.Name == "look up" && strings.Contains(p.Note, "says its age")
	}) {
		t.Errorf("with a new key: reused %v, %s, phases %+v; want %s made again, as nobody says its age", res.Reused,
			res.Digest, res.Phases, first.Digest)
	}
	if diff := cmp.Diff([]string{"6 tests", "3 files", "package"}, notes(res)); diff != "" {
		t.Errorf("with a new key (-want +got):\n%s", diff)
	}
	if res := must(t, cfg, request(builds[0])); !res.Reused {
		t.Errorf("after that: %+v; want it reused", res)
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

// TestRetryAddsTestResult cuts a run off before one of its two statements for a sibling kernel. The next run must add
// what is missing.
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
			cfg.GuestInit, cfg.NVMLProbe = "none", "none" // the load test ends before it starts these programs
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
			f.checkArtifact(t, res, 6) // the second COS build adds a kernel match and a test result
		})
	}
}
