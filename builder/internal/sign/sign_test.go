package sign_test

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature/kms/fake"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/trust"
)

func facts(s testkit.Sample) sign.BuildFacts {
	return sign.BuildFacts{
		Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: s.Identity.Driver,
		Materials: []sign.Material{
			{Name: "kernel-headers.tgz", URI: "gs://cos-tools/17800.0.47/lakitu/kernel-headers.tgz",
				Digest: "sha256:" + strings.Repeat("1", 64)},
			{Name: "toolchain.tar.xz", URI: "gs://cos-tools/17800.0.47/lakitu/toolchain.tar.xz",
				Digest: "sha256:" + strings.Repeat("2", 64)},
		},
		BuilderID: "https://example.com/builder", InvocationID: "42",
		Started:   time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("x", 3600)),
		Finished:  time.Date(2026, 1, 2, 3, 8, 0, 0, time.UTC),
		LogDigest: "sha256:" + strings.Repeat("3", 64), Facts: map[string]string{"compiler": "gcc 12.2.0"},
	}
}

func bundles(t *testing.T, signer *sign.Signer, s testkit.Sample) [][]byte {
	t.Helper()
	provenance, err := sign.Provenance(s.Digest, facts(s))
	if err != nil {
		t.Fatal(err)
	}
	match, err := sign.KernelMatch(s.Digest, s.Kernel, s.Identity.Fingerprint, s.Identity.Driver)
	if err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	for _, st := range []sign.Statement{provenance, match} {
		raw, err := sign.Bundle(t.Context(), signer, st)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, raw)
	}
	return all
}

func sample(t *testing.T) testkit.Sample {
	t.Helper()
	return testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"),
		target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
}

// keyFile makes a key in a file. It returns the key's signer, and a verifier for the public key.
func keyFile(t *testing.T) (*sign.Signer, *trust.Verifier) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(path); err != nil {
		t.Fatal(err)
	}
	signer, err := sign.LoadSigner(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := trust.ParsePublicKeys(public)
	if err != nil {
		t.Fatal(err)
	}
	v, err := trust.NewVerifier(trust.Policy{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return signer, v
}

func TestSignedWithFileVerifies(t *testing.T) {
	t.Parallel()
	signer, v := keyFile(t)
	s := sample(t)
	got, err := v.Verify(bundles(t, signer, s), s.Expect())
	if err != nil {
		t.Fatalf("Verify(Bundle) = %v", err)
	}
	want := &trust.Verdict{
		KeyID: signer.PublicKey().ID(), BuilderID: "https://example.com/builder", InvocationID: "42",
		Built: trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: s.Identity.Driver},
		Match: trust.KernelMatch{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint}, MatchedBy: signer.PublicKey().ID(),
		Materials: []trust.Material{
			{Name: "kernel-headers.tgz", URI: "gs://cos-tools/17800.0.47/lakitu/kernel-headers.tgz",
				Digest: "sha256:" + strings.Repeat("1", 64)},
			{Name: "toolchain.tar.xz", URI: "gs://cos-tools/17800.0.47/lakitu/toolchain.tar.xz",
				Digest: "sha256:" + strings.Repeat("2", 64)},
		},
	}
	want.BuiltOn = time.Date(2026, 1, 2, 3, 8, 0, 0, time.UTC)
	for _, kind := range []string{trust.PredicateProvenance, trust.PredicateKernelMatch} {
		want.Signatures = append(want.Signatures,
			trust.Signature{Statement: kind, Signer: signer.PublicKey().ID(), Role: "publisher"})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Verify(Bundle) (-want +got):\n%s", diff)
	}
}

func TestSignedWithKMSVerifies(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ctx := context.WithValue(t.Context(), fake.KmsCtxKey{}, key.Private())
	signer, err := sign.LoadSigner(ctx, "fakekms://key")
	if err != nil {
		t.Fatal(err)
	}
	s := sample(t)
	if _, err := key.Verifier(t).Verify(bundles(t, signer, s), s.Expect()); err != nil {
		t.Errorf("Verify(Bundle signed in a KMS) = %v", err)
	}
	if _, err := sign.LoadSigner(t.Context(), "nokms://key"); !fault.Is(err, fault.Usage) ||
		!strings.Contains(fault.Hint(err), "sigstore-kms-nokms") {
		t.Errorf("LoadSigner(unknown KMS) = %v, hint %q; want the plugin's name", err, fault.Hint(err))
	}
}

func TestProvenanceIsStable(t *testing.T) {
	t.Parallel()
	s := sample(t)
	one, err := sign.Provenance(s.Digest, facts(s))
	if err != nil {
		t.Fatal(err)
	}
	// The library protojson varies its white space on purpose, so one comparison would prove nothing.
	for range 20 {
		again, err := sign.Provenance(s.Digest, facts(s))
		if err != nil || string(one.JSON()) != string(again.JSON()) {
			t.Fatalf("Provenance = %s, %v; before it was %s", again.JSON(), err, one.JSON())
		}
	}
	var st struct {
		Type      string `json:"_type"`
		Predicate struct {
			BuildDefinition struct {
				InternalParameters map[string]string
			}
			RunDetails struct {
				Metadata   map[string]string
				Byproducts []struct{ Digest map[string]string }
			}
		}
	}
	if err := json.Unmarshal(one.JSON(), &st); err != nil {
		t.Fatal(err)
	}
	run := st.Predicate.RunDetails
	want := map[string]string{"invocationId": "42", "startedOn": "2026-01-02T02:04:05Z",
		"finishedOn": "2026-01-02T03:08:00Z"}
	if diff := cmp.Diff(want, run.Metadata); diff != "" || st.Type != "https://in-toto.io/Statement/v1" ||
		run.Byproducts[0].Digest["sha256"] != strings.Repeat("3", 64) ||
		st.Predicate.BuildDefinition.InternalParameters["compiler"] != "gcc 12.2.0" {
		t.Errorf("Provenance = %s\n%s", one.JSON(), diff)
	}
}

func TestProvenanceRefuses(t *testing.T) {
	t.Parallel()
	s := sample(t)
	for name, change := range map[string]func(f *sign.BuildFacts){
		"no builder":      func(f *sign.BuildFacts) { f.BuilderID = "" },
		"bad digest":      func(f *sign.BuildFacts) { f.Materials[0].Digest = "md5:1" },
		"bad log digest":  func(f *sign.BuildFacts) { f.LogDigest = "x" },
		"nameless source": func(f *sign.BuildFacts) { f.Materials[0].Digest = "" },
	} {
		f := facts(s)
		change(&f)
		if st, err := sign.Provenance(s.Digest, f); err == nil {
			t.Errorf("%s: Provenance = %s; want an error", name, st.JSON())
		}
	}
	if st, err := sign.KernelMatch("sha256:1", s.Kernel, s.Identity.Fingerprint, s.Identity.Driver); err == nil {
		t.Errorf("KernelMatch(bad digest) = %s; want an error", st.JSON())
	}
}

func TestGenerateKeyNeverOverwrites(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the key = %v, %v; want 0600", info.Mode(), err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := sign.GenerateKey(path); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("GenerateKey(existing) = %v; want kind usage and a hint", err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Error("GenerateKey changed an existing key")
	}
	other := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(other, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sign.GenerateKey(other); err == nil {
		t.Error("GenerateKey overwrote a file")
	}
	if _, err := os.Stat(other + ".pub"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("GenerateKey failed and left the public key: %v", err)
	}
}

func TestLoadSignerFiles(t *testing.T) {
	t.Parallel()
	write := func(text []byte) string {
		path := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	long, err := x509.MarshalPKCS8PrivateKey(p384)
	if err != nil {
		t.Fatal(err)
	}
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	exchange, err := x509.MarshalPKCS8PrivateKey(x25519)
	if err != nil {
		t.Fatal(err)
	}
	rsa1536, err := rsa.GenerateKey(rand.Reader, 1536)
	if err != nil {
		t.Fatal(err)
	}
	short, err := x509.MarshalPKCS8PrivateKey(rsa1536)
	if err != nil {
		t.Fatal(err)
	}
	password := func(bool) ([]byte, error) { return []byte("secret"), nil }
	encrypted, _, err := cryptoutils.GeneratePEMEncodedECDSAKeyPair(elliptic.P256(), password)
	if err != nil {
		t.Fatal(err)
	}
	given := sign.WithPassword(func() ([]byte, error) { return []byte("secret"), nil })
	rows := []struct {
		name string
		path string
		opts []sign.Option
		ok   bool
	}{
		{"SEC 1", write(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})), nil, true},
		{"encrypted as cosign does", write(encrypted), []sign.Option{given}, true},
		{"encrypted, no password", write(encrypted), nil, false},
		{"encrypted, wrong password", write(encrypted),
			[]sign.Option{sign.WithPassword(func() ([]byte, error) { return []byte("x"), nil })}, false},
		{"another curve", write(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: long})), nil, true},
		{"no curve for signatures", write(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: exchange})), nil, false},
		{"a short RSA key", write(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: short})), nil, false},
		{"a public key", write(testkit.NewKey(t).PEM(t)), nil, false},
		{"no PEM", write([]byte("hello")), nil, false},
		{"too long", write(make([]byte, 70000)), nil, false},
		{"missing", filepath.Join(t.TempDir(), "none"), nil, false},
	}
	for _, row := range rows {
		_, err := sign.LoadSigner(t.Context(), row.path, row.opts...)
		if row.ok != (err == nil) || err != nil && !fault.Is(err, fault.Usage) {
			t.Errorf("%s: LoadSigner = %v (%v); want success %v", row.name, err, fault.Of(err), row.ok)
		}
	}
}

// TestEncryptedKeys loads keys with a password, as cosign and openssl make them. The error's hint must lead to a usable
// key.
func TestEncryptedKeys(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	refused := func(file, hint string) {
		t.Helper()
		_, err := sign.LoadSigner(t.Context(), file)
		if !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "encrypted with a password") ||
			!strings.Contains(fault.Hint(err), hint) {
			t.Errorf("LoadSigner(%s) = %v, hint %q; want kind usage, the cause, and a hint with %q", filepath.Base(file), err,
				fault.Hint(err), hint)
		}
	}
	text, _, err := cryptoutils.GeneratePEMEncodedECDSAKeyPair(elliptic.P256(),
		func(bool) ([]byte, error) { return []byte("secret"), nil })
	if err != nil {
		t.Fatal(err)
	}
	theirs := filepath.Join(dir, "cosign")
	if err := os.WriteFile(theirs, text, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(theirs, "builder keygen")

	program := installed.Program(t, "openssl")
	openssl := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %s = %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	pkcs8, older, plain := filepath.Join(dir, "pkcs8"), filepath.Join(dir, "older"), filepath.Join(dir, "plain")
	openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-aes-256-cbc", "-pass", "pass:secret",
		"-out", pkcs8)
	openssl("pkey", "-in", pkcs8, "-passin", "pass:secret", "-traditional", "-aes256", "-passout", "pass:secret", "-out",
		older)
	for _, file := range []string{pkcs8, older} {
		refused(file, "openssl pkey -in "+file+" -out ")
		openssl("pkey", "-in", file, "-passin", "pass:secret", "-out", plain)
		if _, err := sign.LoadSigner(t.Context(), plain); err != nil {
			t.Errorf("LoadSigner(decrypted %s) = %v; want none", filepath.Base(file), err)
		}
	}
}
