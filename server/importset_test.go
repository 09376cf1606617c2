package main

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// site is a running server without artifacts, and a bundle to import.
type site struct {
	url, layout string
	client      *api.Client
	farm        *testkit.Key
	repo        *registry.Repository // the repository in the bundle
	served      *registry.Repository
	flags       []string
}

func newSite(t *testing.T) site {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	url, _, _ := start(t, dir)
	s := site{url: url, layout: t.TempDir(), client: api.NewClient(url, secretOf(t, dir), nil), farm: testkit.NewKey(t)}
	pem := filepath.Join(t.TempDir(), "farm.pub")
	if err := os.WriteFile(pem, s.farm.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	s.flags = []string{"--server", url, "--key", pem, "--token-file", filepath.Join(dir, "token")}
	var err error
	if s.repo, err = registry.Open("oci:"+s.layout, registry.Options{}); err != nil {
		t.Fatal(err)
	}
	s.served, err = registry.Open(strings.TrimPrefix(url, "http://")+"/prebake/driver", registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s site) sample(t *testing.T, build string) testkit.Sample {
	t.Helper()
	one := testkit.NewSample(t, s.farm, testkit.SampleKernel(build),
		target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
	one.Publish(t, s.repo)
	return one
}

func (s site) imports(t *testing.T) (code int, stdout, stderr string) {
	t.Helper()
	return run(t, append([]string{"import", packBundle(t, s.layout)}, s.flags...)...)
}

// TestImportOfADamagedLayer damages a layer of the last driver in a bundle. The import must fail before it sends
// anything to the server.
func TestImportOfADamagedLayer(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	first, second := s.sample(t, "1"), s.sample(t, "2")
	blob := filepath.Join(s.layout, "blobs/sha256", strings.TrimPrefix(second.Layers[0].Digest, "sha256:"))
	raw, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(blob, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := s.imports(t)
	if code != fault.Unverified.ExitCode() || !strings.Contains(errs, second.Digest) ||
		!strings.Contains(errs, second.Layers[0].Digest) {
		t.Errorf("import = %d\n%s%s\nwant %d, and driver and layer named", code, out, errs, fault.Unverified.ExitCode())
	}
	if _, err := s.served.Resolve(t.Context(), first.Digest); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Resolve of the undamaged driver = %v; want no-artifact, because nothing may be sent", err)
	}
	if tags, err := s.served.Tags(t.Context()); err == nil && len(tags) > 0 {
		t.Errorf("the server has tags %v; want none", tags)
	}
	hash, err := v1.NewHash(first.Layers[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := registry.Compare(t.Context(), s.served,
		v1.Descriptor{Digest: hash, Size: first.Layers[0].Size}); err == nil {
		t.Error("the server has a layer of the undamaged driver; want nothing, because nothing may be sent")
	}
	if known, err := s.client.Artifacts(t.Context()); err != nil || len(known) != 0 {
		t.Errorf("the catalogue has %d artifacts, %v; want none", len(known), err)
	}
}

// TestImportOfAttachments checks which attachments of a driver an import sends: statements with a trusted signature,
// content that such a statement names, and small deltas.
func TestImportOfAttachments(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	one, other := s.sample(t, "1"), testkit.NewSample(t, s.farm, testkit.SampleKernel("2"),
		target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
	d, err := s.repo.Resolve(t.Context(), one.Digest)
	if err != nil {
		t.Fatal(err)
	}
	log := []byte("log of the build")
	sum := sha256.Sum256(log)
	parameters := trust.Parameters{Kernel: one.Kernel, Fingerprint: one.Identity.Fingerprint, Driver: one.Identity.Driver}
	provenance := testkit.ProvenancePredicate(parameters)
	details, _ := provenance["runDetails"].(map[string]any)
	details = maps.Clone(details)
	details["byproducts"] = []any{map[string]any{"name": "build log",
		"digest": map[string]string{"sha256": hex.EncodeToString(sum[:])}}}
	provenance["runDetails"] = details
	from := map[string]string{bundle.AnnotationDeltaFrom: other.Layers[0].DiffID}
	const logType = "application/vnd.prebake.build-log.v1+zstd"
	want := map[string]string{}
	for name, row := range map[string]struct {
		kind        string
		payload     []byte
		annotations map[string]string
		goes        bool
	}{
		"signed": {trust.ArtifactTypeBundle,
			s.farm.Statement(t, one.Digest, trust.PredicateProvenance, provenance), nil, true},
		"signed, of another kind": {trust.ArtifactTypeBundle,
			s.farm.Statement(t, one.Digest, trust.PredicateSBOM, map[string]string{"spdxVersion": "SPDX-2.3"}), nil, true},
		"a stranger's": {trust.ArtifactTypeBundle,
			testkit.NewKey(t).KernelMatch(t, one.Digest, trust.KernelMatch{Kernel: one.Kernel}), nil, false},
		"about another driver":    {trust.ArtifactTypeBundle, other.Bundles[1], nil, false},
		"no statement":            {trust.ArtifactTypeBundle, []byte("{}"), nil, false},
		"unsigned":                {"application/vnd.test", []byte("x"), nil, false},
		"log that is named":       {logType, log, nil, true},
		"log that is not":         {logType, []byte("another log"), nil, false},
		"delta":                   {bundle.ArtifactTypeDelta, []byte("delta"), from, true},
		"delta of nothing":        {bundle.ArtifactTypeDelta, []byte("delta of nothing"), nil, false},
		"delta that saves little": {bundle.ArtifactTypeDelta, make([]byte, one.Layers[0].Size), from, false},
	} {
		attached, err := s.repo.Attach(t.Context(), d, row.kind, row.payload, row.annotations)
		if err != nil {
			t.Fatal(err)
		}
		if row.goes {
			want[attached.Digest.String()] = name
		}
	}
	before, err := s.repo.Referrers(t.Context(), one.Digest, "")
	if err != nil || len(before) != 13 {
		t.Fatalf("the bundle has %d attached, %v; want 13", len(before), err)
	}
	code, out, errs := s.imports(t)
	if code != 0 || !strings.Contains(out, "left out 7 attached manifests") {
		t.Fatalf("import = %d\n%s%s\nwant 0, and that 7 were left out", code, out, errs)
	}
	got, err := s.served.Referrers(t.Context(), one.Digest, "")
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want)+len(one.Bundles) {
		t.Errorf("the server has %d attached; want %d", len(got), len(want)+len(one.Bundles))
	}
	for digest, name := range want {
		if !slices.ContainsFunc(got, func(d v1.Descriptor) bool { return d.Digest.String() == digest }) {
			t.Errorf("the server lacks the attachment %q", name)
		}
	}
}
