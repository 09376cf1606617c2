package sign_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	prototrust "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// fulcio answers as a Fulcio does that believes every token. The test of
// package publish has a real one, which does not.
type fulcio struct {
	t      *testing.T
	farm   *testkit.Authority
	issued atomic.Int32
}

func (f *fulcio) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, err := f.certify(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f.issued.Add(1)
	chain := map[string]any{"certificates": []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}))}}
	_ = json.NewEncoder(w).Encode(map[string]any{"signedCertificateDetachedSct": map[string]any{"chain": chain}})
}

func (f *fulcio) certify(r *http.Request) ([]byte, error) {
	var in struct {
		PublicKeyRequest struct {
			PublicKey         struct{ Content string }
			ProofOfPossession []byte
		}
	}
	var claims struct {
		Email   string
		Issuer  string `json:"iss"`
		Expires int64  `json:"exp"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return nil, err
	}
	parts := strings.Split(r.Header.Get("Authorization"), ".")
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(body, &claims); err != nil {
		return nil, err
	}
	if claims.Expires < time.Now().Unix() {
		return nil, errors.New("token is expired")
	}
	pub, err := cryptoutils.UnmarshalPEMToPublicKey([]byte(in.PublicKeyRequest.PublicKey.Content))
	if err != nil {
		return nil, err
	}
	v, err := signature.LoadDefaultVerifier(pub)
	if err != nil {
		return nil, err
	}
	if err := v.VerifySignature(bytes.NewReader(in.PublicKeyRequest.ProofOfPossession), strings.NewReader(claims.Email)); err != nil {
		return nil, err
	}
	return f.farm.Certificate(f.t, pub, trust.Identity{Subject: claims.Email, Issuer: claims.Issuer}, time.Now()).Raw, nil
}

const issuer = "https://login.example.com"

// token is an identity token that nobody signed.
func token(t *testing.T, email string, expires time.Time) []byte {
	t.Helper()
	claims, err := json.Marshal(map[string]any{"email": email, "email_verified": true, "iss": issuer, "exp": expires.Unix()})
	if err != nil {
		t.Fatal(err)
	}
	return []byte("e30." + base64.RawURLEncoding.EncodeToString(claims) + ".e30")
}

func farmToken(t *testing.T) func() ([]byte, error) {
	return func() ([]byte, error) { return token(t, "farm@example.com", time.Now().Add(time.Hour)), nil }
}

// signingConfig writes one, and returns the reference to it.
func signingConfig(t *testing.T, ca string, stamps ...string) string {
	t.Helper()
	service := func(url string) root.Service {
		return root.Service{URL: url, MajorAPIVersion: 1, ValidityPeriodStart: time.Now().AddDate(-1, 0, 0), Operator: url}
	}
	all := root.ServiceConfiguration{Selector: prototrust.ServiceSelector_ALL}
	var tsa []root.Service
	for _, url := range stamps {
		tsa = append(tsa, service(url))
	}
	cfg, err := root.NewSigningConfig(root.SigningConfigMediaType02, []root.Service{service(ca)}, nil, nil, root.ServiceConfiguration{}, tsa, all)
	if err != nil {
		t.Fatal(err)
	}
	text, err := cfg.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "signing_config.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return sign.PrefixKeyless + path
}

// deployment is a Sigstore in this process.
func deployment(t *testing.T) (f *fulcio, r *trust.Root, url string) {
	t.Helper()
	f = &fulcio{t: t, farm: testkit.NewAuthority(t)}
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	r, err := trust.ParseRoot(f.farm.Root(t, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	return f, r, s.URL
}

func TestKeyless(t *testing.T) {
	t.Parallel()
	f, r, url := deployment(t)
	signer, err := sign.LoadSigner(t.Context(), signingConfig(t, url, f.farm.ServeTime(t)), sign.WithIdentity(r, farmToken(t)))
	if err != nil {
		t.Fatal(err)
	}
	who := trust.Identity{Subject: "farm@example.com", Issuer: issuer}
	if signer.String() != who.String() {
		t.Errorf("Signer = %s; want %s", signer, who)
	}
	s := sample(t)
	all := bundles(t, signer, s)
	for _, row := range []struct {
		who trust.Identity
		ok  bool
	}{{who, true}, {trust.Identity{Subject: "x@example.com", Issuer: issuer}, false}} {
		v, err := trust.NewVerifier(trust.Policy{Root: r, Identities: []trust.Identity{row.who}})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := v.Verify(all, s.Expect()); (err == nil) != row.ok || row.ok && got.SignedBy() != who.String() {
			t.Errorf("Verify as %s = %+v, %v; want success %v", row.who, got, err, row.ok)
		}
	}
	own, err := signer.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := own.Verify(all, s.Expect()); err != nil {
		t.Errorf("Verify with the signer's own verifier = %v", err)
	}
	if n := f.issued.Load(); n != 1 {
		t.Errorf("%d certificates for statements within a moment; want one", n)
	}
}

// A certificate that is about to expire, as all of this authority are from the
// beginning, is not used again.
func TestKeylessRenews(t *testing.T) {
	t.Parallel()
	f, r, url := deployment(t)
	f.farm.Lifetime = 50 * time.Second
	email := "farm@example.com"
	signer, err := sign.LoadSigner(t.Context(), signingConfig(t, url, f.farm.ServeTime(t)),
		sign.WithIdentity(r, func() ([]byte, error) { return token(t, email, time.Now().Add(time.Hour)), nil }))
	if err != nil {
		t.Fatal(err)
	}
	s := sample(t)
	all := bundles(t, signer, s)
	if n := int(f.issued.Load()); n != 1+len(all) {
		t.Errorf("%d certificates; want one for loading and for each of %d statements", n, len(all))
	}
	v, err := signer.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(all, s.Expect()); err != nil {
		t.Errorf("Verify = %v", err)
	}
	email = "other@example.com"
	match, err := sign.KernelMatch(s.Digest, s.Kernel, s.Identity.Fingerprint, s.Identity.Driver)
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := sign.Bundle(t.Context(), signer, match); !errors.Is(err, trust.ErrUnknownIdentity) {
		t.Errorf("Bundle after the token names somebody else = %s, %v; want %v", raw, err, trust.ErrUnknownIdentity)
	}
}

func TestKeylessRefuses(t *testing.T) {
	t.Parallel()
	f, r, url := deployment(t)
	stamps := f.farm.ServeTime(t)
	gone := httptest.NewServer(nil)
	gone.Close()
	refusing := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(refusing.Close)
	given := func(text []byte) sign.Option {
		return sign.WithIdentity(r, func() ([]byte, error) { return text, nil })
	}
	good := sign.WithIdentity(r, farmToken(t))
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte(`{"mediaType":"x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name, ref string
		opts      []sign.Option
		kind      fault.Kind
		hint      string
	}{
		{"no root and no token", signingConfig(t, url, stamps), nil, fault.Usage, "--trusted-root"},
		{"no file", sign.PrefixKeyless + junk + "x", []sign.Option{good}, fault.Usage, "signing-config create"},
		{"another file", sign.PrefixKeyless + junk, []sign.Option{good}, fault.Usage, "signing_config.json"},
		{"nobody to say the time", signingConfig(t, url), []sign.Option{good}, fault.Usage, "timestamp authority"},
		{"expired token", signingConfig(t, url, stamps), []sign.Option{given(token(t, "farm@example.com", time.Unix(1, 0)))}, fault.Usage, "fresh token"},
		{"no token", signingConfig(t, url, stamps), []sign.Option{given([]byte("x"))}, fault.Usage, "fresh token"},
		{"a token for nobody", signingConfig(t, url, stamps), []sign.Option{given(token(t, "", time.Now()))}, fault.Usage, "fresh token"},
		{"authority out of reach", signingConfig(t, gone.URL, stamps), []sign.Option{good}, fault.Transient, "can be reached"},
	}
	for _, row := range rows {
		if s, err := sign.LoadSigner(t.Context(), row.ref, row.opts...); !fault.Is(err, row.kind) || !strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: LoadSigner = %v, %v (hint %q); want %v and hint with %q", row.name, s, err, fault.Hint(err), row.kind, row.hint)
		}
	}
	s := sample(t)
	match, err := sign.KernelMatch(s.Digest, s.Kernel, s.Identity.Fingerprint, s.Identity.Driver)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, stamps string
		kind         fault.Kind
		hint         string
	}{
		{"time out of reach", gone.URL, fault.Transient, "can be reached"},
		{"no timestamp authority", refusing.URL, fault.Usage, "timestamp authority's URL"},
		{"time of another root", testkit.NewAuthority(t).ServeTime(t), fault.Unverified, "that the trusted root names"},
	} {
		signer, err := sign.LoadSigner(t.Context(), signingConfig(t, url, row.stamps), good)
		if err != nil {
			t.Fatal(err)
		}
		if raw, err := sign.Bundle(t.Context(), signer, match); !fault.Is(err, row.kind) || !strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: Bundle = %s, %v (hint %q); want %v and hint with %q", row.name, raw, err, fault.Hint(err), row.kind, row.hint)
		}
	}
}
