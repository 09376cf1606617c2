package publish_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sbom"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// tool returns a function that runs another project's program. If the program is missing, it skips the test.
func tool(t *testing.T, name string) func(args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not on PATH: deploy/tool.sh builds cosign, and go tool has crane; make test runs this test with them",
			name)
	}
	return func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), path, args...)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "DOCKER_CONFIG="+t.TempDir())
		out, err := cmd.CombinedOutput()
		t.Logf("%s %s\n%s", name, strings.Join(args, " "), out)
		return string(out), err
	}
}

func newSigner(t *testing.T) *sign.Signer {
	t.Helper()
	signer, err := sign.LoadSigner(t.Context(), keyFile(t, testkit.NewKey(t).Private()))
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// keyFile writes a private key to a file.
func keyFile(t *testing.T, key crypto.Signer) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// publishSample signs a sample with a key file and publishes it in a registry. referrers says whether the registry has
// the referrers API.
func publishSample(t *testing.T, referrers bool, key string) (ref, digest, pub string, s testkit.Sample) {
	t.Helper()
	signer, err := sign.LoadSigner(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signer.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	pub = filepath.Join(t.TempDir(), "key.pub")
	if err := os.WriteFile(pub, text, 0o600); err != nil {
		t.Fatal(err)
	}
	ref, digest, s = publishedBy(t, referrers, signer)
	return ref, digest, pub, s
}

func publishedBy(t *testing.T, referrers bool, signer *sign.Signer) (ref, digest string, s testkit.Sample) {
	t.Helper()
	s = testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	v, err := signer.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	provenance, err := sign.Provenance(s.Digest,
		sign.BuildFacts{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: driver,
			BuilderID: "https://example.com/builder",
			Materials: []sign.Material{{Name: "kernel-headers.tgz", URI: "gs://cos-tools/x",
				Digest: "sha256:" + strings.Repeat("1", 64)}}})
	if err != nil {
		t.Fatal(err)
	}
	match, err := sign.KernelMatch(s.Digest, s.Kernel, s.Identity.Fingerprint, driver)
	if err != nil {
		t.Fatal(err)
	}
	tested, err := sign.TestResult(s.Digest,
		sign.TestFacts{Driver: driver,
			LoadTest: trust.LoadTest{Verdict: trust.VerdictLoaded, Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint}})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := sbom.JSON(sbom.Facts{Digest: s.Digest, Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint,
		Driver: driver, Layers: s.Layers,
		Materials: []sign.Material{
			{Name: "kernel-headers.tgz", URI: "gs://cos-tools/x", Digest: "sha256:" + strings.Repeat("1", 64)},
			{Name: "NVIDIA-Linux-x86_64-535.261.03.run", URI: "gs://x/y", Digest: "sha256:" + strings.Repeat("2", 64)},
		},
		Modules: map[string]string{"nvidia": s.Layers[0].Path}}) // any file will do, because only its digest counts
	if err != nil {
		t.Fatal(err)
	}
	contents, err := sign.SBOM(s.Digest, driver, doc)
	if err != nil {
		t.Fatal(err)
	}
	a := publish.Artifact{Image: s.Image, Identity: s.Identity, Kernel: s.Kernel, Verifier: v}
	for _, st := range []sign.Statement{provenance, match, tested, contents} {
		raw, err := sign.Bundle(t.Context(), signer, st)
		if err != nil {
			t.Fatal(err)
		}
		a.Bundles = append(a.Bundles, raw)
	}
	ref = testkit.Registry(t, referrers) + "/prebake/driver"
	digest, _, err = publish.Publish(t.Context(), open(t, ref, nil), a)
	if err != nil {
		t.Fatal(err)
	}
	return ref, digest, s
}

func TestCosignVerifies(t *testing.T) {
	t.Parallel()
	cosign := tool(t, "cosign")
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.pub")
	if err := os.WriteFile(other, testkit.NewKey(t).PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name string
		key  crypto.Signer
		args []string
	}{
		{"ECDSA P-256", testkit.NewKey(t).Private(), nil},
		{"ECDSA P-384", p384, []string{"--signature-digest-algorithm", "sha384"}},
		{"RSA", rsa2048, nil},
		{"Ed25519", ed, nil},
	} {
		// The sample registry with the referrers API reports no artifact types, which cosign needs. So use the other one.
		ref, digest, pub, _ := publishSample(t, false, keyFile(t, row.key))
		for _, kind := range []string{"slsaprovenance1", trust.PredicateKernelMatch, trust.PredicateTestResult, "spdxjson"} {
			verify := func(key string) (string, error) {
				args := append([]string{"verify-attestation", "--key", key, "--insecure-ignore-tlog=true", "--allow-http-registry",
					"--type", kind}, row.args...)
				return cosign(append(args, ref+"@"+digest)...)
			}
			if _, err := verify(pub); err != nil {
				t.Errorf("%s: cosign verify-attestation --type %s: %v", row.name, kind, err)
			}
			if out, err := verify(other); err == nil {
				t.Errorf("%s: cosign verify-attestation --type %s accepted another key: %s", row.name, kind, out)
			}
		}
	}
}

func TestCranePulls(t *testing.T) {
	t.Parallel()
	crane := tool(t, "crane")
	ref, digest, _, s := publishSample(t, true, keyFile(t, testkit.NewKey(t).Private()))
	tagged := ref + ":" + bundle.KernelTag(s.Kernel, driver)
	if got, err := crane("digest", tagged); err != nil || strings.TrimSpace(got) != digest {
		t.Errorf("crane digest = %q, %v; want %s", got, err, digest)
	}
	raw, err := crane("manifest", tagged)
	if err != nil || !json.Valid([]byte(raw)) {
		t.Errorf("crane manifest = %v", err)
	}
	// Without --fast, crane reads all layers, and it can read gzip layers only.
	if _, err := crane("validate", "--fast", "--remote", tagged); err != nil {
		t.Errorf("crane validate = %v", err)
	}
	if _, err := crane("pull", tagged, filepath.Join(t.TempDir(), "image.tar")); err != nil {
		t.Errorf("crane pull = %v", err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if _, err := crane("pull", "--format=oci", tagged, dir); err != nil {
		t.Errorf("crane pull --format=oci = %v", err)
	}
	out := filepath.Join(t.TempDir(), "root.tar")
	if _, err := crane("export", tagged, out); err != nil {
		t.Errorf("crane export = %v", err)
	}
	list, err := exec.CommandContext(t.Context(), "tar", "-tf", out).CombinedOutput()
	if err != nil || !strings.Contains(string(list), "drivers/nvidia.ko") ||
		!strings.Contains(string(list), "lib64/libnvidia-ml.so.1") {
		t.Errorf("tar -tf = %s, %v; want the files of all layers", list, err)
	}
}

// TestVerifyPage runs the commands of docs/how-to/verify.md exactly as the page shows them.
func TestVerifyPage(t *testing.T) {
	t.Parallel()
	const begin = "$ cosign verify-attestation --key "
	text, err := os.ReadFile(filepath.FromSlash("../../../docs/how-to/verify.md"))
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", " ")) {
		if args, ok := strings.CutPrefix(strings.TrimSpace(line), begin); ok {
			lines = append(lines, args)
		}
	}
	if len(lines) == 0 {
		t.Fatalf("no line of the page begins with %q", begin)
	}
	cosign := tool(t, "cosign")
	ref, digest, pub, _ := publishSample(t, false, keyFile(t, testkit.NewKey(t).Private()))
	for _, args := range lines {
		words := strings.Fields("verify-attestation --allow-http-registry --key " + args)
		for i, w := range words {
			switch {
			case w == "prebake.key.pub":
				words[i] = pub
			case strings.HasSuffix(w, "@sha256:…"):
				words[i] = ref + "@" + digest
			}
		}
		if out, err := cosign(words...); err != nil {
			t.Errorf("cosign %s: %v\n%s", args, err, out)
		}
	}
}
