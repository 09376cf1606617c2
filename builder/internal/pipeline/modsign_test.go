package pipeline_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/smallstep/pkcs7"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// moduleKey makes an RSA key and a certificate. The kernel could use the certificate to verify modules.
func moduleKey(t *testing.T) (key, cert string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: "modules of a test"},
		NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("modules.key", "PRIVATE KEY", pkcs8), write("modules.crt", "CERTIFICATE", der)
}

// TestSignedModules checks that a build with a module key signs the modules with the kernel's CONFIG_MODULE_SIG_HASH,
// and that the artifact differs from that with unsigned modules.
func TestSignedModules(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	files := headerFiles()
	files[headers+".config"] += "CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_HASH=\"sha512\"\n"
	f.kernel(t, "17800.0.9", files)
	cfg := f.config(t, emptyCache(t))
	unsigned := cfg
	unsigned.Destinations = []string{"oci:" + filepath.Join(t.TempDir(), "unsigned")}
	plain := must(t, unsigned, request("17800.0.9"))

	cfg.ModuleKey, cfg.ModuleCert = moduleKey(t)
	signed := must(t, cfg, request("17800.0.9"))
	if diff := cmp.Diff(slices.Insert(slices.Clone(whole), 3, "sign modules"), phases(signed)); diff != "" ||
		signed.Digest == plain.Digest {
		t.Errorf("signed build is %s, unsigned %s; phases (-want +got):\n%s", signed.Digest, plain.Digest, diff)
	}
	f.checkArtifact(t, signed, 4)
	certs, err := modsign.ReadCertificates(cfg.ModuleCert)
	if err != nil {
		t.Fatal(err)
	}
	got, err := modsign.VerifyFile(f.module(t, signed), certs)
	if err != nil || !got.Hash.Equal(pkcs7.OIDDigestAlgorithmSHA512) {
		t.Errorf("VerifyFile of the published module = %+v, %v; want a signature over sha512", got, err)
	}

	// With another cache, the same inputs must give the same bytes, including the signatures.
	other := cfg
	other.Cache, other.Destinations = emptyCache(t), []string{"oci:" + filepath.Join(t.TempDir(), "again")}
	if again := must(t, other, request("17800.0.9")); again.Digest != signed.Digest {
		t.Errorf("signed again it is %s; want %s", again.Digest, signed.Digest)
	}
	if again := must(t, cfg, request("17800.0.9")); !again.Reused {
		t.Errorf("the same build again: %+v; want it reused", again)
	}
	// A build of unsigned modules must not replace the artifact with signed modules.
	cfg.ModuleKey, cfg.ModuleCert = "", ""
	if res, _, err := build(t, cfg, request("17800.0.9")); !fault.Is(err, fault.PublishRefused) {
		t.Errorf("without the key: %+v, %v; want it refused", res, err)
	}
	// If the kernel has no support for module signatures, the build must end before the compile.
	f.kernel(t, "17800.0.10", headerFiles())
	cfg.ModuleKey, cfg.ModuleCert = moduleKey(t)
	res, _, err := build(t, cfg, request("17800.0.10"))
	if diff := cmp.Diff(whole[:2], phases(res)); diff != "" || !fault.Is(err, fault.Unsupported) {
		t.Errorf("a kernel without signatures: %v; phases (-want +got):\n%s", err, diff)
	}
}

// module unpacks the only module of a published artifact.
func (f *farm) module(t *testing.T, res *pipeline.Result) string {
	t.Helper()
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	l := res.Layers[0]
	blob, err := repo.Blob(t.Context(), l.Digest, l.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	if err := bundle.Unpack(t.Context(), blob, l.Digest, l.DiffID, l.Size, root); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "drivers", "nvidia.ko")
}

// TestForcedSignatures has a kernel that loads only signed modules. A build without a key must end before the compile.
func TestForcedSignatures(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	files := headerFiles()
	files[headers+".config"] += "CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_FORCE=y\nCONFIG_MODULE_SIG_HASH=\"sha512\"\n"
	f.kernel(t, "17800.0.9", files)
	cfg := f.config(t, emptyCache(t))
	res, _, err := build(t, cfg, request("17800.0.9"))
	if !fault.Is(err, fault.Unsupported) || !strings.Contains(fault.Hint(err), "--module-key") ||
		slices.Contains(phases(res), "compile") {
		t.Errorf("Run = %v (hint %q) after %v; want %v before the compile", err, fault.Hint(err), phases(res),
			fault.Unsupported)
	}
	cfg.ModuleKey, cfg.ModuleCert = moduleKey(t)
	must(t, cfg, request("17800.0.9"))
}

// TestOddListOfGPUs checks that a build succeeds even if the release's list of GPUs is invalid.
func TestOddListOfGPUs(t *testing.T) {
	t.Parallel()
	for text, attached := range map[string]int{"{": 4,
		`{"chips":[{"devid":"0x1EB8","features":["kernelopen"]},{"devid":"odd"}]}`: 5} {
		f := newFarm(t)
		files := driverFiles()
		files["supported-gpus/supported-gpus.json"] = text
		f.driver(t, files)
		f.checkArtifact(t, must(t, f.config(t, emptyCache(t)), request("17800.0.9")), attached)
	}
}
