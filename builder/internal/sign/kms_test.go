package sign_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sigstore/sigstore/pkg/signature/kms/fake"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/trust"
)

// keys returns one key of each kind with which a farm may sign.
func keys(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	all := map[string]crypto.Signer{}
	add := func(name string, key crypto.Signer, err error) {
		if err != nil {
			t.Fatal(err)
		}
		all[name] = key
	}
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		add("ECDSA "+c.Params().Name, key, err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	add("RSA 2048", rsaKey, err)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	add("Ed25519", ed, err)
	return all
}

func keyPEM(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// checkSigner signs a sample. The signer's public key must verify the signature, and another key must not.
func checkSigner(t *testing.T, name string, signer *sign.Signer) {
	t.Helper()
	public, err := signer.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	trusted, err := trust.ParsePublicKeys(public)
	if err != nil {
		t.Fatalf("%s: ParsePublicKeys = %v", name, err)
	}
	v, err := trust.NewVerifier(trust.Policy{Keys: trusted})
	if err != nil {
		t.Fatal(err)
	}
	s := sample(t)
	all := bundles(t, signer, s)
	if _, err := v.Verify(all, s.Expect()); err != nil {
		t.Errorf("%s: Verify = %v", name, err)
	}
	if _, err := testkit.NewKey(t).Verifier(t).Verify(all, s.Expect()); !fault.Is(err, fault.Unverified) {
		t.Errorf("%s: Verify with another key = %v; want unverified", name, err)
	}
}

func TestKindsOfKeys(t *testing.T) {
	t.Parallel()
	for name, key := range keys(t) {
		path := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(path, keyPEM(t, key), 0o600); err != nil {
			t.Fatal(err)
		}
		signer, err := sign.LoadSigner(t.Context(), path)
		if err != nil {
			t.Errorf("%s: LoadSigner(file) = %v", name, err)
			continue
		}
		checkSigner(t, name+" in a file", signer)
		signer, err = sign.LoadSigner(context.WithValue(t.Context(), fake.KmsCtxKey{}, key), "fakekms://key")
		if err != nil {
			t.Errorf("%s: LoadSigner(KMS) = %v", name, err)
			continue
		}
		checkSigner(t, name+" in a KMS", signer)
	}
}

// vault is a server that answers for one key as the transit engine of HashiCorp Vault does.
func vault(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	answer := func(w http.ResponseWriter, data map[string]any) {
		_ = json.NewEncoder(w).Encode(map[string]any{"data": data})
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/transit/keys/drivers", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"latest_version": 1,
			"keys": map[string]any{"1": map[string]any{"name": "P-256", "public_key": public}}})
	})
	mux.HandleFunc("PUT /v1/transit/sign/drivers/sha2-256", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Input     string `json:"input"`
			Prehashed bool   `json:"prehashed"`
		}
		digest, err := []byte(nil), json.NewDecoder(r.Body).Decode(&in)
		if err == nil {
			digest, err = base64.StdEncoding.DecodeString(in.Input)
		}
		if err != nil || !in.Prehashed || len(digest) != crypto.SHA256.Size() {
			http.Error(w, `{"errors":["want a digest"]}`, http.StatusBadRequest)
			return
		}
		sig, err := ecdsa.SignASN1(rand.Reader, key, digest)
		if err != nil {
			http.Error(w, `{"errors":["cannot sign"]}`, http.StatusInternalServerError)
			return
		}
		answer(w, map[string]any{"signature": "vault:v1:" + base64.StdEncoding.EncodeToString(sig)})
	})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Vault-Token") != "s.token" {
			http.Error(w, `{"errors":["permission denied"]}`, http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// TestVault signs with a key in HashiCorp Vault. It is not parallel, because it sets environment variables for the
// client.
func TestVault(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("VAULT_ADDR", vault(t, key))
	t.Setenv("VAULT_TOKEN", "s.token")
	t.Setenv("TRANSIT_SECRET_ENGINE_PATH", "")
	t.Setenv("HOME", t.TempDir())
	signer, err := sign.LoadSigner(t.Context(), "hashivault://drivers")
	if err != nil {
		t.Fatal(err)
	}
	checkSigner(t, "Vault", signer)
	if _, err := sign.LoadSigner(t.Context(), "hashivault://another"); !fault.Is(err, fault.Transient) {
		t.Errorf("LoadSigner(key that Vault does not have) = %v; want transient", err)
	}
	if _, err := sign.LoadSigner(t.Context(), "hashivault:///a/b"); !fault.Is(err, fault.Usage) ||
		!strings.Contains(fault.Hint(err), "hashivault://KEY") {
		t.Errorf("LoadSigner(bad name) = %v, hint %q; want a hint with the form of a key's name", err, fault.Hint(err))
	}
	t.Setenv("VAULT_TOKEN", "s.wrong")
	if _, err := sign.LoadSigner(t.Context(), "hashivault://drivers"); !fault.Is(err, fault.Usage) ||
		!strings.Contains(err.Error(), "permission denied") {
		t.Errorf("LoadSigner(wrong token) = %v; want permission denied", err)
	}
	t.Setenv("VAULT_ADDR", "")
	if _, err := sign.LoadSigner(t.Context(), "hashivault://drivers"); !fault.Is(err, fault.Usage) ||
		!strings.Contains(fault.Hint(err), "VAULT_ADDR") {
		t.Errorf("LoadSigner(no address) = %v, hint %q; want the variable's name", err, fault.Hint(err))
	}
}

// TestGoogleWithoutCredentials checks that the program contains the client of Google's KMS, and that its error has a
// useful hint.
func TestGoogleWithoutCredentials(t *testing.T) {
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", filepath.Join(t.TempDir(), "none"))
	_, err := sign.LoadSigner(t.Context(), "gcpkms://projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1")
	if !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "GOOGLE_APPLICATION_CREDENTIALS") {
		t.Errorf("LoadSigner = %v, hint %q; want usage, and a hint about credentials", err, fault.Hint(err))
	}
	if _, err := sign.LoadSigner(t.Context(), "gcpkms://x"); !fault.Is(err, fault.Usage) ||
		!strings.Contains(fault.Hint(err), "gcpkms://projects/") {
		t.Errorf("LoadSigner(bad name) = %v, hint %q; want a hint with the form of a key's name", err, fault.Hint(err))
	}
}

// TestPlugin signs through a program that follows Sigstore's KMS plugin protocol, as a plugin for a PKCS #11 token
// would.
func TestPlugin(t *testing.T) {
	plugin := program.Build(t, "builder/internal/sign/testdata/sigstore-kms-filekey", "")
	t.Setenv("PATH", filepath.Dir(plugin)+":"+os.Getenv("PATH"))
	for name, key := range keys(t) {
		path := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(path, keyPEM(t, key), 0o600); err != nil {
			t.Fatal(err)
		}
		signer, err := sign.LoadSigner(t.Context(), "filekey://"+path)
		if err != nil {
			t.Errorf("%s: LoadSigner(plugin) = %v", name, err)
			continue
		}
		checkSigner(t, name+" in a plugin", signer)
	}
	if _, err := sign.LoadSigner(t.Context(), "filekey:///none"); !fault.Is(err, fault.Transient) ||
		!strings.Contains(err.Error(), "no such file") {
		t.Errorf("LoadSigner(plugin that fails) = %v; want the plugin's error text", err)
	}
}
