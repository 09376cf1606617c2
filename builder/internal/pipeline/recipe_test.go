package pipeline_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// newOldFarm returns a farm whose registry and bucket have an artifact that an earlier builder packed, with the first
// recipe for layers. A second COS build has the same fingerprint and also a boot image.
func newOldFarm(t *testing.T) (f *farm, cfg pipeline.Config, folder string, first *pipeline.Result) {
	t.Helper()
	f = newFarm(t)
	tree := headerFiles()
	tree[headers+"Module.symvers"] += "0x00000000\tdrm_open\tdrivers/gpu/drm/drm\tEXPORT_SYMBOL\t\n"
	f.kernel(t, "17800.0.9", tree)
	f.kernel(t, "17800.1.9", tree)
	var boot bytes.Buffer
	tarOf(t, map[string]string{"vmlinuz": "no kernel"}, gzip.NewWriter(&boot))
	f.putChecked(t, "cos/17800.1.9/lakitu/prebake-boot.tgz", boot.Bytes())
	files := driverFiles()
	// This driver needs the module drm, which the bucket lacks. So the load test ends before it boots a machine.
	files["kernel-open/nv.c"] = strings.Replace(files["kernel-open/nv.c"], "depends=", "depends=drm", 1)
	files["nvidia-smi*"] = strings.Repeat("ELF\n", 1<<16) // zstd writes the window into archives of more than 128 KiB
	f.driver(t, files)
	cfg = f.config(t, emptyCache(t))
	cfg.GuestInit, cfg.NVMLProbe = "none", "none"
	folder = "file://" + filepath.Join(t.TempDir(), "bucket")
	cfg.Destinations = append(cfg.Destinations, folder)
	old := request("17800.0.9")
	old.PackRecipe = "tar-zstd-1"
	first = must(t, cfg, old)
	cfg.Destinations = cfg.Destinations[:1]

	elsewhere := cfg
	elsewhere.Destinations = []string{"oci:" + filepath.Join(t.TempDir(), "elsewhere")}
	if newest := must(t, elsewhere, request("17800.0.9")); newest.Digest == first.Digest {
		t.Fatalf("both recipes give %s, so this test proves nothing", newest.Digest)
	}
	return f, cfg, folder, first
}

// TestPackedAsPublished makes an artifact again that an earlier builder packed with an old recipe. The new artifact
// must have the same bytes, because the tag exists already and never moves to another artifact.
func TestPackedAsPublished(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		build  string
		change func(t *testing.T, f *farm, cfg *pipeline.Config, folder string)
	}{
		{"a sibling with a boot image", "17800.1.9", func(*testing.T, *farm, *pipeline.Config, string) {}},
		{"because of its age", "17800.0.9", func(_ *testing.T, _ *farm, cfg *pipeline.Config, _ string) {
			cfg.RebuildAfter = time.Nanosecond
		}},
		{"with an empty cache", "17800.1.9", func(t *testing.T, _ *farm, cfg *pipeline.Config, _ string) {
			cfg.Cache = emptyCache(t)
		}},
		{"with another key", "17800.0.9", func(t *testing.T, f *farm, cfg *pipeline.Config, _ string) {
			f.newKey(t)
			cfg.Key = f.key
		}},
		{"also to a new destination", "17800.0.9", func(t *testing.T, _ *farm, cfg *pipeline.Config, _ string) {
			layout := "oci:" + filepath.Join(t.TempDir(), "layout")
			cfg.Destinations = append([]string{layout}, cfg.Destinations...)
		}},
		{"in a bucket only", "17800.0.9", func(_ *testing.T, _ *farm, cfg *pipeline.Config, folder string) {
			cfg.Destinations = []string{folder}
		}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f, cfg, folder, first := newOldFarm(t)
			row.change(t, f, &cfg, folder)
			res := must(t, cfg, request(row.build))
			if res.Reused || res.Digest != first.Digest {
				t.Errorf("made again: reused %v, %s; want %s", res.Reused, res.Digest, first.Digest)
			}
		})
	}
}

// TestSymbolsPackedAsPublished makes an artifact with debug symbols again. The symbols must be packed by the artifact's
// old recipe too, so that no second set of symbols is published.
func TestSymbolsPackedAsPublished(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	files := driverFiles()
	for i := range 4000 { // as in newOldFarm, the archive must have more than 128 KiB
		files["kernel-open/nv.c"] += fmt.Sprintf("int symbol_%060d = 1;\n", i)
	}
	files["kernel-open/Makefile"] = "modules:\n" +
		"\t@$(CC) $(if $(findstring g0,$(KCFLAGS)),,-g) -nostdlib -r -Wl,--build-id=sha1 nv.c -o nvidia.ko\n"
	f.driver(t, files)
	cfg := f.config(t, emptyCache(t))
	cfg.DebugSymbols = true
	old := request("17800.0.9")
	old.PackRecipe = "tar-zstd-1"
	first := must(t, cfg, old)
	layer := func(destination, manifest string) string {
		t.Helper()
		repo, err := registry.Open(destination, registry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		raw, err := repo.Manifest(t.Context(), manifest)
		if err != nil {
			t.Fatal(err)
		}
		l, err := symbols.ParseManifest(raw)
		if err != nil {
			t.Fatal(err)
		}
		return l.Digest.String()
	}
	elsewhere := cfg
	elsewhere.Destinations = []string{"oci:" + filepath.Join(t.TempDir(), "elsewhere")}
	newest := must(t, elsewhere, request("17800.0.9"))
	if l := layer(f.repo, first.Symbols); l == layer(elsewhere.Destinations[0], newest.Symbols) {
		t.Errorf("the symbols have the layer %s with both recipes; want them packed by the artifact's", l)
	}
	cfg.RebuildAfter = time.Nanosecond
	res := must(t, cfg, request("17800.0.9"))
	if res.Reused || res.Symbols == "" || res.Symbols != first.Symbols {
		t.Errorf("made again: reused %v, symbols %q; want %s", res.Reused, res.Symbols, first.Symbols)
	}
}

// TestPackedAsPublishedSaysSo checks that each provenance names the recipe with which a second party can reproduce the
// artifact.
func TestPackedAsPublishedSaysSo(t *testing.T) {
	t.Parallel()
	f, cfg, _, first := newOldFarm(t)
	cfg.RebuildAfter = time.Nanosecond
	must(t, cfg, request("17800.0.9"))
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	attached, err := repo.Attached(t.Context(), first.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	statements := f.verifier(t).Statements(attached, first.Digest, trust.PredicateProvenance)
	for _, st := range statements {
		if !strings.Contains(string(st.Predicate), `"tar-zstd-1"`) {
			t.Errorf("a provenance is %s; want it to say tar-zstd-1", st.Predicate)
		}
	}
	if len(statements) != 2 {
		t.Errorf("%d provenances; want two", len(statements))
	}
}

// publishWith makes an artifact, and publishes it in a new repository with a provenance that has the given facts. It
// returns cfg with this repository as its destination.
func (f *farm) publishWith(t *testing.T, cfg pipeline.Config, facts map[string]string) pipeline.Config {
	t.Helper()
	made, err := pipeline.Make(t.Context(), cfg, request("17800.0.9"), emptyCache(t), io.Discard, &timeline.Run{})
	if err != nil {
		t.Fatal(err)
	}
	digest, err := made.Image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := sign.LoadSigner(t.Context(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	statement, err := sign.Provenance(digest.String(), sign.BuildFacts{Kernel: made.Kernel,
		Fingerprint: made.Fingerprint, Driver: made.Driver, Materials: made.Materials, BuilderID: "https://example.com/b",
		Started: time.Now(), Finished: time.Now(), Facts: facts})
	if err != nil {
		t.Fatal(err)
	}
	provenance, err := sign.Bundle(t.Context(), signer, statement)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Destinations = []string{testkit.Registry(t, true) + "/prebake/driver"}
	repo, err := registry.Open(cfg.Destinations[0], registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := publish.Publish(t.Context(), repo, publish.Artifact{Image: made.Image, Identity: made.Identity,
		Kernel: made.Kernel, Bundles: [][]byte{provenance}}); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// checkRefusedEarly checks that a build ends before the compile, because it could not publish. The error must contain
// cause, and the hint must contain next. It returns the hint.
func checkRefusedEarly(t *testing.T, cfg pipeline.Config, cause, next string) string {
	t.Helper()
	res, _, err := build(t, cfg, request("17800.0.9"))
	if diff := cmp.Diff(whole[:2], phases(res)); diff != "" || !fault.Is(err, fault.PublishRefused) ||
		!strings.Contains(err.Error(), cause) || !strings.Contains(fault.Hint(err), next) {
		t.Errorf("Run = %v (hint %q); want it refused because of %s, with %s; phases (-want +got):\n%s", err,
			fault.Hint(err), cause, next, diff)
	}
	return fault.Hint(err)
}

// TestUnknownRecipe has an artifact that was made by a recipe of another builder. This builder cannot make it again, so
// the build must end before the compile.
func TestUnknownRecipe(t *testing.T) {
	t.Parallel()
	for step, recipe := range map[string]string{"pack": "tar-zstd-9", "image": "image-9"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			facts := pipeline.Recipes()
			facts[step], facts["builder"] = recipe, "v7.7"
			cfg := f.publishWith(t, f.config(t, emptyCache(t)), facts)
			if res := must(t, cfg, request("17800.0.9")); !res.Reused {
				t.Errorf("%+v; want the artifact reused, as nothing is packed", res)
			}
			cfg.RebuildAfter = time.Nanosecond
			hint := checkRefusedEarly(t, cfg, recipe, "v7.7")
			// Newer builders know the older recipes of layers, but no older recipe of an image. So an upgrade of the builder
			// helps only in the first case.
			if got := strings.Contains(hint, "upgrade"); got != (step == "pack") {
				t.Errorf("hint %q; want an upgrade in it: %t", hint, step == "pack")
			}
		})
	}
}

// TestOtherStage has an artifact that was made with another recipe for its layout. The build must end before the
// compile, but only if this recipe gives the release other bytes.
func TestOtherStage(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	facts := pipeline.Recipes()
	facts["stage"], facts["builder"] = "stage-0", "v7.7"
	cfg := f.publishWith(t, f.config(t, emptyCache(t)), facts)
	cfg.RebuildAfter = time.Nanosecond
	if res := must(t, cfg, request("17800.0.9")); res.Reused {
		t.Errorf("%+v; want it made again, because both recipes give the same layout", res)
	}

	other := newFarm(t) // publishes a driver with another program, as if the older recipe had chosen that program
	files := driverFiles()
	delete(files, "nvidia-smi*")
	files["nvidia-debugdump*"] = "ELF"
	other.key = f.key
	other.driver(t, files)
	old := other.publishWith(t, other.config(t, emptyCache(t)), facts)
	cfg = f.config(t, emptyCache(t))
	cfg.Destinations, cfg.RebuildAfter = old.Destinations, time.Nanosecond
	checkRefusedEarly(t, cfg, "stage-0", "v7.7")
}

// TestOtherBTF checks an artifact whose BTF another version of pahole made. Two versions often give the same bytes, so
// the build makes the artifact again. A build without BTF must end before the compile, because the published artifact
// has BTF.
func TestOtherBTF(t *testing.T) {
	t.Parallel()
	f := newTypedFarm(t)
	facts := pipeline.Recipes()
	facts["btf"] = "v0.99"
	cfg := f.config(t, emptyCache(t))
	cfg.LoadTest, cfg.BTF = pipeline.LoadTestOff, true
	cfg = f.publishWith(t, cfg, facts)
	if res := must(t, cfg, request("17800.0.9")); !res.Reused {
		t.Errorf("%+v; want the artifact reused, as nothing is compiled", res)
	}
	again := cfg
	again.RebuildAfter = time.Nanosecond
	if res := must(t, again, request("17800.0.9")); res.Reused {
		t.Errorf("%+v; want it made again: the modules are by this machine's pahole, whatever the provenance says", res)
	}
	cfg.BTF = false
	checkRefusedEarly(t, cfg, "for ABI fingerprint", "--btf")
}

// TestOtherBTFRefused checks a case where another version of pahole gives other bytes. The first build compiles, and
// its publication is refused. The next build must end before the compile. The errors of both must say which version of
// pahole to install. A builder of another version must compile again, and so must a build with RetrySince.
func TestOtherBTFRefused(t *testing.T) {
	t.Parallel()
	f := newTypedFarm(t)
	f.driver(t, salted(typedDriver()))
	facts := pipeline.Recipes()
	facts["btf"] = "v0.99"
	cfg := f.config(t, emptyCache(t))
	cfg.LoadTest, cfg.BTF = pipeline.LoadTestOff, true
	cfg = f.publishWith(t, cfg, facts)
	cfg.RebuildAfter = time.Nanosecond
	const next = "install pahole v0.99"
	first := func(name string, cfg pipeline.Config) {
		t.Helper()
		res, log, err := build(t, cfg, request("17800.0.9"))
		if !fault.Is(err, fault.PublishRefused) || !slices.Contains(phases(res), "publish") ||
			!strings.Contains(fault.Hint(err), next) {
			t.Fatalf("the first build %s = %v (hint %q), phases %v; want it compiled and refused, with %s\n%s", name, err,
				fault.Hint(err), phases(res), next, log)
		}
		if want := "the published modules have BTF by pahole v0.99, and this machine has pahole v"; !strings.Contains(log,
			want) {
			t.Errorf("the log of the first build %s lacks %q:\n%s", name, want, log)
		}
	}
	for _, version := range []string{cfg.Version, "v9.9"} {
		cfg.Version = version
		first("by version "+version, cfg)
		if hint := checkRefusedEarly(t, cfg, "is not built again before", next); !strings.Contains(hint, "--retry-failed") {
			t.Errorf("hint %q; want --retry-failed in it", hint)
		}
	}
	cfg.RetrySince = time.Now()
	first("with RetrySince", cfg)
}

// TestOtherBytesPublishedNowhere has two repositories, one of which has other bytes than this build makes. The build
// must publish in neither.
func TestOtherBytesPublishedNowhere(t *testing.T) {
	t.Parallel()
	for name, bucket := range map[string]bool{"repository": false, "bucket": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			f.driver(t, salted(driverFiles()))
			cfg := f.config(t, emptyCache(t))
			if bucket {
				cfg.Destinations = []string{"file://" + filepath.Join(t.TempDir(), "bucket")}
			}
			first := must(t, cfg, request("17800.0.9"))
			fresh := "oci:" + filepath.Join(t.TempDir(), "layout")
			cfg.Destinations, cfg.Cache = append([]string{fresh}, cfg.Destinations...), emptyCache(t)
			res, log, err := build(t, cfg, request("17800.0.9"))
			if !fault.Is(err, fault.PublishRefused) || res.Digest == first.Digest {
				t.Fatalf("Run = %v, digest %s; want another digest than %s refused\n%s", err, res.Digest, first.Digest, log)
			}
			repo, err := registry.Open(fresh, registry.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if have, ok, err := publish.Existing(t.Context(), repo, first.Tag); ok || err != nil {
				t.Errorf("the first repository has %s, %v; want nothing in it", have, err)
			}
		})
	}
}

// tagRequests counts, for each repository, the requests for its tags.
type tagRequests map[string]int

func (c tagRequests) RoundTrip(r *http.Request) (*http.Response, error) {
	if path, ref, ok := strings.Cut(r.URL.Path, "/manifests/"); ok && !strings.HasPrefix(ref, "sha256") {
		c[strings.TrimPrefix(path, "/v2/")]++
	}
	return http.DefaultTransport.RoundTrip(r)
}

// TestReuseAsksForTagsOnce checks that a reused artifact in a second repository adds no requests for tags to the first
// repository.
func TestReuseAsksForTagsOnce(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	one := cfg.Destinations
	two := []string{one[0], one[0] + "-second"}
	cfg.Destinations = two
	must(t, cfg, request("17800.0.9"))
	_, name, _ := strings.Cut(one[0], "/")
	count := func(destinations []string) int {
		t.Helper()
		seen := tagRequests{}
		cfg.Destinations = destinations
		cfg.Registry = func(string) registry.Options { return registry.Options{Transport: seen} }
		if res := must(t, cfg, request("17800.0.9")); !res.Reused {
			t.Fatalf("%+v; want the artifact reused", res)
		}
		return seen[name]
	}
	alone, both := count(one), count(two)
	if alone == 0 || both != alone {
		t.Errorf("%d requests for tags of %s with a second repository, and %d without; want as many", both, name, alone)
	}
}
