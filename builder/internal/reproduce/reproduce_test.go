package reproduce_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/reproduce"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

var (
	driver    = target.Driver{Version: "535.261.03", Flavour: target.Proprietary}
	materials = []sign.Material{
		{Name: "kernel-headers.tgz", URI: "file:///cos/17800.0.47/lakitu/kernel-headers.tgz",
			Digest: "sha256:" + strings.Repeat("5", 64)},
		{Name: "NVIDIA-Linux-x86_64-535.261.03.run", URI: "file:///drivers/NVIDIA-Linux-x86_64-535.261.03.run",
			Digest: "sha256:" + strings.Repeat("6", 64)},
	}
)

// farm is a repository with one published artifact, and the keys of its builder and of a second party.
type farm struct {
	cfg             reproduce.Config
	sample          testkit.Sample
	builder, second *sign.Signer
}

func signer(t *testing.T) *sign.Signer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(path); err != nil {
		t.Fatal(err)
	}
	s, err := sign.LoadSigner(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// signed returns the statement with a signature by the given key.
func signed(t *testing.T, by *sign.Signer, st sign.Statement, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := sign.Bundle(t.Context(), by, st)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// provenance returns the provenance of a build that used the given recipes and ended at the given Unix time.
func provenance(t *testing.T, builder *sign.Signer, s testkit.Sample, ended int64, recipes map[string]string) []byte {
	t.Helper()
	st, err := sign.Provenance(s.Digest, sign.BuildFacts{
		Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: s.Identity.Driver, Materials: materials,
		BuilderID: "https://example.com/farm", Started: time.Unix(1, 0), Finished: time.Unix(ended, 0), Facts: recipes,
	})
	return signed(t, builder, st, err)
}

// newFarm publishes a sample with the provenance of a builder that used the given recipes.
func newFarm(t *testing.T, s testkit.Sample, recipes map[string]string) *farm {
	t.Helper()
	repo, err := registry.Open("oci:"+filepath.Join(t.TempDir(), "farm"), registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	builder := signer(t)
	match, err := sign.KernelMatch(s.Digest, s.Kernel, s.Identity.Fingerprint, s.Identity.Driver)
	s.Bundles = [][]byte{provenance(t, builder, s, 2, recipes), signed(t, builder, match, err)}
	s.Publish(t, repo)
	verifier, err := builder.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	return &farm{sample: s, builder: builder, second: signer(t), cfg: reproduce.Config{
		Repo: repo, Ref: s.Digest, Verifier: verifier, By: "https://example.com/second",
		TempDir: func(string) (string, func() error, error) {
			dir, err := os.MkdirTemp(t.TempDir(), "")
			return dir, func() error { return os.RemoveAll(dir) }, err
		},
	}}
}

// rebuild returns a function for Config.Make that returns the given image. The function checks that the request is for
// the sample's cell, and for the newest recipe to pack layers.
func rebuild(want testkit.Sample, image v1.Image, layers []bundle.Layer, inputs []sign.Material) func(context.Context,
	pipeline.Request) (*pipeline.Made, error) {
	return func(_ context.Context, req pipeline.Request) (*pipeline.Made, error) {
		if diff := cmp.Diff(pipeline.Request{BuildID: want.Kernel.BuildID, Board: want.Kernel.Board,
			Driver: target.Wish(driver.Version), Flavour: driver.Flavour, GoogleSignatures: pipeline.GoogleOff,
			PackRecipe: bundle.PackRecipe}, req); diff != "" {
			return nil, fault.Errorf(fault.Internal, "asked for another cell (-want +got):\n%s", diff)
		}
		return &pipeline.Made{Kernel: want.Kernel, Driver: driver, Identity: want.Identity, Layers: layers, Image: image,
			Materials: inputs}, nil
	}
}

func facts() map[string]string {
	f := pipeline.Recipes()
	f["builder"] = "v9"
	return f
}

func sample(t *testing.T, salt string) testkit.Sample {
	t.Helper()
	return testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, salt)
}

func TestIdentical(t *testing.T) {
	t.Parallel()
	s := sample(t, "")
	f := newFarm(t, s, facts())
	f.cfg.Make, f.cfg.Attest = rebuild(s, s.Image, s.Layers, materials), f.second
	report, err := reproduce.Run(t.Context(), f.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !report.Identical || report.Made != s.Digest || len(report.Differences) != 0 ||
		report.BuilderID != "https://example.com/farm" || report.Attested == "" {
		t.Errorf("Run = %+v; want identical, attested", report)
	}
	attached, err := f.cfg.Repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := f.second.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	said := 0
	for _, raw := range attached {
		if st, err := verifier.Statement(raw); err == nil && st.PredicateType == trust.PredicateReproduced &&
			st.About(s.Digest) && strings.Contains(string(st.Predicate), `"identical"`) {
			said++
		}
	}
	if said != 1 {
		t.Errorf("%d statements of the second party; want one", said)
	}
	// The artifact has the statement already, so a second run must not attach another one. Invalid statements, which
	// anybody with the right to push can attach, must not change this.
	testkit.AttachJunk(t, f.cfg.Repo, s.Digest, trust.PredicateReproduced)
	if report, err = reproduce.Run(t.Context(), f.cfg); err != nil || report.Attested != "" {
		t.Errorf("second Run = %+v, %v; want nothing attested anew", report, err)
	}
}

// TestNewestProvenance adds a second provenance, which the registry lists first. The newest provenance that verifies
// must count.
func TestNewestProvenance(t *testing.T) {
	t.Parallel()
	s, other := sample(t, ""), sample(t, "")
	other.Identity.Driver.Version = "535.309.01"
	old := map[string]string{"compile": "compile-0", "builder": "v3"}
	for _, row := range []struct {
		name           string
		present, added map[string]string // recipes of two builds; the present build ended at Unix time 2
		about          testkit.Sample
		ended          int64 // Unix time at which the added build ended
		kind           fault.Kind
		builtOn        int64
		junk           bool // whether the registry also has junk that it lists before the added provenance
	}{
		{"the added one is older", facts(), old, s, 1, -1, 2, false},
		{"the added one is newer", old, facts(), s, 3, -1, 3, false},
		{"the added one is newer, behind junk", old, facts(), s, 3, -1, 3, true},
		{"the newest has other recipes", old, facts(), s, 1, fault.Unsupported, 0, false},
		{"the newest is for another driver", facts(), old, other, 3, -1, 2, false},
	} {
		f := newFarm(t, s, row.present)
		d, err := f.cfg.Repo.Resolve(t.Context(), s.Digest)
		if err != nil {
			t.Fatal(err)
		}
		raw := provenance(t, f.builder, row.about, row.ended, row.added)
		// The registry lists attachments with annotations before those without.
		if _, err := f.cfg.Repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, raw,
			trust.OfType(trust.PredicateProvenance)); err != nil {
			t.Fatal(err)
		}
		if row.junk {
			testkit.AttachJunk(t, f.cfg.Repo, s.Digest, trust.PredicateProvenance)
		}
		f.cfg.Make = rebuild(s, s.Image, s.Layers, materials)
		report, err := reproduce.Run(t.Context(), f.cfg)
		if row.kind >= 0 {
			if !fault.Is(err, row.kind) {
				t.Errorf("%s: Run = %+v, %v; want %v", row.name, report, err, row.kind)
			}
			continue
		}
		if err != nil || !report.Identical || !report.BuiltOn.Equal(time.Unix(row.builtOn, 0)) {
			t.Errorf("%s: Run = %+v, %v; want identical, by the build that ended at %v", row.name, report, err,
				time.Unix(row.builtOn, 0).UTC())
		}
	}
}

// TestGoogle checks that Run asks Make for Google's signatures or Google's modules if the provenance says that the
// artifact has them.
func TestGoogle(t *testing.T) {
	t.Parallel()
	for fact, want := range map[string]pipeline.Request{
		trust.FactGoogleSignatures: {GoogleSignatures: pipeline.GoogleRequire},
		trust.FactGoogleModules:    {GoogleSignatures: pipeline.GoogleOff, GoogleModules: true},
	} {
		s, with := sample(t, ""), facts()
		with[fact] = materials[0].Digest
		f := newFarm(t, s, with)
		var asked pipeline.Request
		f.cfg.Make = func(ctx context.Context, req pipeline.Request) (*pipeline.Made, error) {
			asked = pipeline.Request{GoogleSignatures: req.GoogleSignatures, GoogleModules: req.GoogleModules}
			req.GoogleSignatures, req.GoogleModules = pipeline.GoogleOff, false
			return rebuild(s, s.Image, s.Layers, materials)(ctx, req)
		}
		if report, err := reproduce.Run(t.Context(), f.cfg); err != nil || !report.Identical {
			t.Errorf("%s: Run = %+v, %v; want identical", fact, report, err)
		}
		if diff := cmp.Diff(want, asked); diff != "" {
			t.Errorf("%s: asked for (-want +got):\n%s", fact, diff)
		}
	}
}

// TestPackRecipe has an artifact of an earlier builder. Run must ask Make for the recipe that this builder used to pack
// layers, and must refuse a recipe that is unknown.
func TestPackRecipe(t *testing.T) {
	t.Parallel()
	s, old := sample(t, ""), bundle.PackRecipes()[1]
	with := facts()
	with[pipeline.FactPack] = old
	f := newFarm(t, s, with)
	asked := ""
	f.cfg.Attest = f.second
	f.cfg.Make = func(ctx context.Context, req pipeline.Request) (*pipeline.Made, error) {
		asked, req.PackRecipe = req.PackRecipe, bundle.PackRecipe
		return rebuild(s, s.Image, s.Layers, materials)(ctx, req)
	}
	report, err := reproduce.Run(t.Context(), f.cfg)
	if err != nil || !report.Identical || asked != old {
		t.Fatalf("Run = %+v, %v; asked for recipe %q; want identical, by %s", report, err, asked, old)
	}
	attached, err := f.cfg.Repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := f.second.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	said := verifier.Statements(attached, s.Digest, trust.PredicateReproduced)
	if len(said) != 1 || !strings.Contains(string(said[0].Predicate), `"`+old+`"`) {
		t.Errorf("%d statements of the second party; want one with recipe %s", len(said), old)
	}

	with[pipeline.FactPack] = "tar-zstd-9"
	f = newFarm(t, s, with)
	f.cfg.Make = rebuild(s, s.Image, s.Layers, materials)
	if _, err := reproduce.Run(t.Context(), f.cfg); !fault.Is(err, fault.Unsupported) ||
		!strings.Contains(err.Error(), "tar-zstd-9") {
		t.Errorf("Run with an unknown recipe = %v; want unsupported", err)
	}
}

func TestDifferent(t *testing.T) {
	t.Parallel()
	published, made := sample(t, " with one changed object"), sample(t, "")
	f := newFarm(t, published, facts())
	f.cfg.Make, f.cfg.Attest = rebuild(made, made.Image, made.Layers, materials), f.second
	report, err := reproduce.Run(t.Context(), f.cfg)
	if err != nil {
		t.Fatal(err)
	}
	want := []reproduce.Difference{{Name: "drivers/nvidia.ko",
		What: "56 bytes in the published artifact, 32 in the rebuild"}}
	if diff := cmp.Diff(want, report.Differences); diff != "" || report.Identical || report.Made != made.Digest ||
		report.Files != 3 || report.Attested != "" {
		t.Errorf("Run = %+v; differences (-want +got):\n%s", report, diff)
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	s := sample(t, "")
	rows := []struct {
		name    string
		recipes map[string]string
		inputs  []sign.Material
		edit    func(*reproduce.Config)
		kind    fault.Kind
		want    string
	}{
		{"another recipe", map[string]string{"compile": "compile-0", "builder": "v3"}, materials, nil, fault.Unsupported,
			`recipe compile of the artifact has version "compile-0"`},
		{"another input", facts(), []sign.Material{materials[0], {Name: "x", Digest: "sha256:" + strings.Repeat("7", 64)}},
			nil, fault.Mismatch, "NVIDIA-Linux-x86_64-535.261.03.run"},
		{"one input more", facts(),
			append(materials[:2:2], sign.Material{Name: "x", Digest: "sha256:" + strings.Repeat("7", 64)}), nil, fault.Mismatch,
			"this build has 3"},
		{"not published", facts(), materials, func(c *reproduce.Config) { c.Ref = "sha256:" + strings.Repeat("0", 64) },
			fault.NoArtifact, ""},
		{"another key", facts(), materials, func(c *reproduce.Config) { c.Verifier = testkit.NewKey(t).Verifier(t) },
			fault.Unverified, "key"},
		{"rebuild fails", facts(), materials, func(c *reproduce.Config) {
			c.Make = func(context.Context, pipeline.Request) (*pipeline.Made, error) {
				return nil, fault.New(fault.InputMissing, "no such headers", "")
			}
		}, fault.InputMissing, "build the artifact again"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t, s, row.recipes)
			f.cfg.Make, f.cfg.Attest = rebuild(s, s.Image, s.Layers, row.inputs), f.second
			if row.edit != nil {
				row.edit(&f.cfg)
			}
			report, err := reproduce.Run(t.Context(), f.cfg)
			if fault.Of(err) != row.kind || err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("Run = %+v, %v (%v); want %v with %q", report, err, fault.Of(err), row.kind, row.want)
			}
		})
	}
}
