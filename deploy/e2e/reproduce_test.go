package e2e

import (
	"debug/elf"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// TestReproduce rebuilds a published artifact from its provenance, without using results in the builder's caches. A
// second party signs that the result is the same. `builder reproduce` must also find a changed byte in an artifact that
// a trusted key has signed.
func TestReproduce(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server") {
		return
	}
	defer shared.turns.take(100)()
	k := shared.kernel(1)
	digest := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary).Digest
	insider := testkit.NewKey(t)
	tampered := tamper(t, shared.srv.Repository(), digest, insider)

	dir := t.TempDir()
	believed, second := filepath.Join(dir, "believed.pub"), filepath.Join(dir, "second.key")
	farm, err := os.ReadFile(shared.key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(believed, append(farm, insider.PEM(t)...), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := shared.Must(t.Context(), "builder", "keygen", second); err != nil {
		t.Fatal(err)
	}
	res, err := shared.Run(t.Context(), "builder", "reproduce", "--public-key", believed, "--attest", "--key", second,
		"--builder-id", "https://example.com/second",
		"--username", "prebake", "--password", shared.srv.Token, "--kernel-mirror", shared.mirror.KernelURL(),
		"--driver-mirror", shared.mirror.DriverURL(),
		"--cache", shared.BuildCache(), "--output", "json", shared.srv.Repository()+"@"+digest, tampered)
	if err != nil {
		t.Fatal(err)
	}
	if res.Code != fault.Mismatch.ExitCode() {
		t.Errorf("reproduce ends with %d; want %d, for the second artifact", res.Code, fault.Mismatch.ExitCode())
	}
	var reports []struct {
		Identical   bool
		Made        string
		Attested    string
		Differences []struct{ Name, What string }
	}
	if err := json.Unmarshal(res.Stdout, &reports); err != nil || len(reports) != 2 {
		t.Fatalf("reproduce prints %q, %v; want two reports", res.Stdout, err)
	}
	if r := reports[0]; !r.Identical || r.Made != digest || r.Attested == "" || len(r.Differences) != 0 {
		t.Errorf("the published artifact: %+v; want identical and attested", r)
	}
	if r := reports[1]; r.Identical || r.Made != digest || r.Attested != "" || len(r.Differences) != 1 ||
		r.Differences[0].Name != "drivers/nvidia-modeset.ko" || r.Differences[0].What != "differs in section .text" {
		t.Errorf("the artifact with one changed object: %+v; want drivers/nvidia-modeset.ko, section .text", r)
	}
	// Anybody who has the second party's public key can verify its statement.
	key, err := os.ReadFile(second + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	if said := statements(t, open(t, shared.srv.Repository()), digest, verifier(t, key)); len(said) != 1 ||
		said[0].PredicateType != "https://prebake.dev/reproduced/v1" {
		t.Errorf("the second party says %v; want reproduced and nothing else", said)
	}
}

func open(t *testing.T, ref string) *registry.Repository {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

func verifier(t *testing.T, pem []byte) *trust.Verifier {
	t.Helper()
	keys, err := trust.ParsePublicKeys(pem)
	if err != nil {
		t.Fatal(err)
	}
	v, err := trust.NewVerifier(trust.Policy{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// statements returns an artifact's statements whose signature the verifier accepts. There is one kernel match for each
// COS build that the artifact fits.
func statements(t *testing.T, repo *registry.Repository, digest string, v *trust.Verifier) (all []*trust.Statement) {
	t.Helper()
	attached, err := repo.Attached(t.Context(), digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range attached {
		if st, err := v.Statement(raw); err == nil && st.About(digest) {
			all = append(all, st)
		}
	}
	return all
}

// tamper publishes a copy of an artifact with one changed byte in a module, and returns its reference. The key insider,
// which the test trusts, signs the original's provenance and kernel matches for the copy.
func tamper(t *testing.T, repository, digest string, insider *testkit.Key) string {
	t.Helper()
	ctx, repo := t.Context(), open(t, repository)
	farm, err := os.ReadFile(shared.key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := repo.Manifest(ctx, digest)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := bundle.ConfigDescriptor(manifest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := repo.Small(ctx, desc)
	if err != nil {
		t.Fatal(err)
	}
	content, err := bundle.ParseManifest(manifest, config)
	if err != nil {
		t.Fatal(err)
	}
	var layers []bundle.Layer
	for _, l := range content.Layers {
		blob, err := repo.Blob(ctx, l.Digest, l.Size)
		if err != nil {
			t.Fatal(err)
		}
		if l.Kind == bundle.LayerModules {
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := bundle.Unpack(ctx, blob, l.Digest, l.DiffID, l.Size, root); err != nil {
				t.Fatal(err)
			}
			changeText(t, filepath.Join(dir, "drivers", "nvidia-modeset.ko"))
			layer, err := bundle.PackLayer(ctx, dir, l.Kind, filepath.Join(t.TempDir(), "layer"))
			if err != nil {
				t.Fatal(err)
			}
			layers = append(layers, layer)
		} else {
			path := filepath.Join(t.TempDir(), "layer")
			out, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(out, blob); err != nil {
				t.Fatal(err)
			}
			if err := out.Close(); err != nil {
				t.Fatal(err)
			}
			layers = append(layers, bundle.Layer{Kind: l.Kind, Digest: l.Digest, DiffID: l.DiffID, Size: l.Size, Path: path})
		}
		if err := blob.Close(); err != nil {
			t.Fatal(err)
		}
	}
	img, err := bundle.Image(content.Identity, layers)
	if err != nil {
		t.Fatal(err)
	}
	place := "oci:" + filepath.Join(t.TempDir(), "tampered")
	to := open(t, place)
	subject, err := to.Push(ctx, img)
	if err != nil {
		t.Fatal(err)
	}
	copied := 0
	for _, st := range statements(t, repo, digest, verifier(t, farm)) {
		if st.PredicateType != trust.PredicateProvenance && st.PredicateType != trust.PredicateKernelMatch {
			continue
		}
		raw := insider.Statement(t, subject.Digest.String(), st.PredicateType, json.RawMessage(st.Predicate))
		if _, err := to.Attach(ctx, subject, trust.ArtifactTypeBundle, raw, nil); err != nil {
			t.Fatal(err)
		}
		copied++
	}
	if copied < 2 {
		t.Fatalf("%s has %d statements to copy; want its provenance and a kernel match", digest, copied)
	}
	return place + "@" + subject.Digest.String()
}

// changeText flips a bit in the code section of a module.
func changeText(t *testing.T, path string) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	text := f.Section(".text")
	if err := f.Close(); err != nil || text == nil {
		t.Fatalf("%s has no code: %v", path, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[text.Offset+text.Size/2] ^= 1
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
