package sign_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

const issuer = "https://login.example.com"

func farmToken(t *testing.T) func() ([]byte, error) {
	return func() ([]byte, error) {
		return testkit.Token(t, issuer, "farm@example.com", time.Now().Add(time.Hour)), nil
	}
}

// deployment returns a Sigstore deployment inside this process, and the root that trusts it.
func deployment(t *testing.T) (farm *testkit.Authority, r *trust.Root) {
	t.Helper()
	farm = testkit.NewAuthority(t)
	r, err := trust.ParseRoot(farm.Root(t, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	return farm, r
}

func keylessRef(t *testing.T, ca string, stamps ...string) string {
	t.Helper()
	return sign.PrefixKeyless + testkit.SigningConfig(t, ca, stamps...)
}

// withLog adds a transparency log to the signing configuration to which ref points.
func withLog(t *testing.T, ref, url string) string {
	t.Helper()
	path := strings.TrimPrefix(ref, sign.PrefixKeyless)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := json.Unmarshal(text, &cfg); err != nil {
		t.Fatal(err)
	}
	cfg["rekorTlogUrls"] = []any{map[string]any{"url": url, "majorApiVersion": 2, "operator": "example.com",
		"validFor": map[string]string{"start": "2020-01-01T00:00:00Z"}}}
	if text, err = json.Marshal(cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestKeyless(t *testing.T) {
	t.Parallel()
	farm, r := deployment(t)
	signer, err := sign.LoadSigner(t.Context(), keylessRef(t, farm.ServeCertificates(t), farm.ServeTime(t)),
		sign.WithIdentity(r, farmToken(t)))
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
	if n := farm.Issued(); n != 1 {
		t.Errorf("%d certificates for statements within a moment; want one", n)
	}
}

// TestKeylessRenews has an authority whose certificates are valid for 50 seconds. The signer must get a new certificate
// for each statement, because it uses no certificate that expires soon.
func TestKeylessRenews(t *testing.T) {
	t.Parallel()
	farm, r := deployment(t)
	farm.Lifetime = 50 * time.Second
	email := "farm@example.com"
	signer, err := sign.LoadSigner(t.Context(), keylessRef(t, farm.ServeCertificates(t), farm.ServeTime(t)),
		sign.WithIdentity(r, func() ([]byte, error) {
			return testkit.Token(t, issuer, email,
				time.Now().Add(time.Hour)), nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	s := sample(t)
	all := bundles(t, signer, s)
	if n := farm.Issued(); n != 1+len(all) {
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
	farm, r := deployment(t)
	url, stamps := farm.ServeCertificates(t), farm.ServeTime(t)
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
		{"no root and no token", keylessRef(t, url, stamps), nil, fault.Usage, "--trusted-root"},
		{"no file", sign.PrefixKeyless + junk + "x", []sign.Option{good}, fault.Usage, "signing-config create"},
		{"another file", sign.PrefixKeyless + junk, []sign.Option{good}, fault.Usage, "signing_config.json"},
		{"nobody to say the time", keylessRef(t, url), []sign.Option{good}, fault.Usage, "timestamp authority"},
		{"expired token", keylessRef(t, url, stamps),
			[]sign.Option{given(testkit.Token(t, issuer, "farm@example.com", time.Unix(1, 0)))}, fault.Usage, "fresh token"},
		{"no token", keylessRef(t, url, stamps), []sign.Option{given([]byte("x"))}, fault.Usage, "fresh token"},
		{"a token for nobody", keylessRef(t, url, stamps), []sign.Option{given(testkit.Token(t, issuer, "", time.Now()))},
			fault.Usage, "fresh token"},
		{"authority of another root", keylessRef(t, testkit.NewAuthority(t).ServeCertificates(t), stamps),
			[]sign.Option{good}, fault.Usage, "deployment in the signing configuration"},
		{"authority out of reach", keylessRef(t, gone.URL, stamps), []sign.Option{good}, fault.Transient, "can be reached"},
	}
	for _, row := range rows {
		if s, err := sign.LoadSigner(t.Context(), row.ref, row.opts...); !fault.Is(err, row.kind) ||
			!strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: LoadSigner = %v, %v (hint %q); want %v and hint with %q", row.name, s, err, fault.Hint(err), row.kind,
				row.hint)
		}
	}
	s := sample(t)
	match, err := sign.KernelMatch(s.Digest, s.Kernel, s.Identity.Fingerprint, s.Identity.Driver)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, ref string
		kind      fault.Kind
		hint      string
	}{
		{"time out of reach", keylessRef(t, url, gone.URL), fault.Transient, "can be reached"},
		{"no timestamp authority", keylessRef(t, url, refusing.URL), fault.Usage, "timestamp authority's URL"},
		{"time of another root", keylessRef(t, url, testkit.NewAuthority(t).ServeTime(t)), fault.Usage,
			"that is in the trusted root"},
		{"log out of reach", withLog(t, keylessRef(t, url, stamps), gone.URL), fault.Transient, "can be reached"},
	} {
		signer, err := sign.LoadSigner(t.Context(), row.ref, good)
		if err != nil {
			t.Fatal(err)
		}
		if raw, err := sign.Bundle(t.Context(), signer, match); !fault.Is(err, row.kind) ||
			!strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: Bundle = %s, %v (hint %q); want %v and hint with %q", row.name, raw, err, fault.Hint(err), row.kind,
				row.hint)
		}
	}
}
