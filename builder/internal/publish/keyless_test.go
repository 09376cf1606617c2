package publish_test

import (
	"bufio"
	"crypto/ecdsa"
	"encoding/json"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// login is a minimal OpenID Connect issuer, which the certificate authority Fulcio accepts.
type login struct {
	url string
	key *ecdsa.PrivateKey
}

func newLogin(t *testing.T) *login {
	t.Helper()
	l := &login{key: testkit.NewKey(t).Private()}
	mux := http.NewServeMux()
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	l.url = s.URL
	answer := func(path string, v any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) })
	}
	answer("/.well-known/openid-configuration", map[string]any{
		"issuer": l.url, "jwks_uri": l.url + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"},
		"authorization_endpoint": l.url + "/none", "token_endpoint": l.url + "/none",
		"response_types_supported": []string{"id_token"}, "subject_types_supported": []string{"public"},
	})
	answer("/keys", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: l.key.Public(), KeyID: "k", Algorithm: "ES256",
		Use: "sig"}}})
	return l
}

// token returns an identity token for the given audience, signed with key.
func (l *login) token(t *testing.T, key *ecdsa.PrivateKey, audience string) []byte {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	claims, err := json.Marshal(map[string]any{
		"iss": l.url, "aud": audience, "sub": "farm", "email": "farm@example.com", "email_verified": true,
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return []byte(text)
}

// startFulcio runs the certificate authority Fulcio and returns its URL. Fulcio accepts the identity tokens of l, signs
// certificates with the farm's keys, and writes no log of certificates.
func startFulcio(t *testing.T, program string, farm *testkit.Authority, l *login) string {
	t.Helper()
	dir := t.TempDir()
	file := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	config, err := json.Marshal(map[string]any{"OIDCIssuers": map[string]any{l.url: map[string]string{"IssuerURL": l.url,
		"ClientID": "sigstore", "Type": "email"}}})
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"serve", "--host=127.0.0.1", "--grpc-host=127.0.0.1", "--grpc-port=0", "--metrics-port=0",
		"--legacy-unix-domain-socket=" + filepath.Join(dir, "grpc"),
		"--ct-log-url=", "--config-path=" + file("config.json", config), "--ca=fileca", "--fileca-watch=false",
		"--fileca-key-passwd=none", "--fileca-key=" + keyFile(t, farm.CAKey),
		"--fileca-cert=" + file("ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: farm.CA.Raw}))}
	var said string
	for range 5 { // tries again, because another process may have taken the free port
		var address string
		if address, said = runFulcio(t, program, args); address != "" {
			return "http://" + address
		}
	}
	t.Fatalf("start fulcio: it said %s", said)
	return ""
}

func runFulcio(t *testing.T, program string, args []string) (address, said string) {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(address)
	cmd := exec.CommandContext(t.Context(), program, append(args, "--port="+port)...)
	cmd.Env = []string{"HOME=" + t.TempDir()}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var text strings.Builder
	go func() {
		defer close(ended)
		_, _ = io.Copy(&text, bufio.NewReader(stderr))
		_ = cmd.Wait() // the program was killed, so its exit status has no meaning
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // an error means that the program has ended already
		<-ended
	})
	for look := time.NewTicker(10 * time.Millisecond); ; {
		select {
		case <-ended:
			look.Stop()
			return "", text.String()
		case <-look.C:
		}
		if c, err := net.Dial("tcp", address); err == nil {
			look.Stop()
			_ = c.Close()
			return address, ""
		}
	}
}

// TestCosignVerifiesKeyless signs with certificates of a real Fulcio. cosign must verify the statements for the right
// identity and root only.
func TestCosignVerifiesKeyless(t *testing.T) {
	t.Parallel()
	cosign := tool(t, "cosign")
	program, err := exec.LookPath("fulcio")
	if err != nil {
		t.Skip("fulcio is not on PATH: deploy/tool.sh builds it; make test runs this test with it")
	}
	farm, l := testkit.NewAuthority(t), newLogin(t)
	ref := sign.PrefixKeyless + testkit.SigningConfig(t, startFulcio(t, program, farm, l), farm.ServeTime(t))
	rootJSON := farm.Root(t, nil, nil)
	r, err := trust.ParseRoot(rootJSON)
	if err != nil {
		t.Fatal(err)
	}
	with := func(token []byte) sign.Option {
		return sign.WithIdentity(r, func() ([]byte, error) { return token, nil })
	}
	for name, token := range map[string][]byte{
		"for another audience": l.token(t, l.key, "registry"),
		"that another signed":  l.token(t, testkit.NewKey(t).Private(), "sigstore"),
		"of another issuer":    newLogin(t).token(t, l.key, "sigstore"),
	} {
		if signer, err := sign.LoadSigner(t.Context(), ref, with(token)); !fault.Is(err, fault.Usage) ||
			!strings.Contains(fault.Hint(err), "fresh token") {
			t.Errorf("LoadSigner with a token %s = %v, %v; want kind usage and a hint", name, signer, err)
		}
	}
	signer, err := sign.LoadSigner(t.Context(), ref, with(l.token(t, l.key, "sigstore")))
	if err != nil {
		t.Fatal(err)
	}
	who := trust.Identity{Subject: "farm@example.com", Issuer: l.url}
	if signer.String() != who.String() {
		t.Errorf("Signer = %s; want %s", signer, who)
	}
	where, digest, s := publishedBy(t, false, signer)
	attached, err := open(t, where, nil).Attached(t.Context(), digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	v, err := trust.NewVerifier(trust.Policy{Root: r, Identities: []trust.Identity{who}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := v.Verify(attached, s.Expect()); err != nil || got.SignedBy() != who.String() {
		t.Errorf("Verify = %+v, %v; want it signed by %s", got, err, who)
	}
	rootFile := func(text []byte) string {
		path := filepath.Join(t.TempDir(), "trusted_root.json")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	trusted, other := rootFile(rootJSON), rootFile(testkit.NewAuthority(t).Root(t, nil, nil))
	for _, row := range []struct {
		name, root, who, issuer string
		ok                      bool
	}{
		{"the identity", trusted, who.Subject, who.Issuer, true},
		{"another name", trusted, "x@example.com", who.Issuer, false},
		{"another issuer", trusted, who.Subject, "https://login.example.com", false},
		{"another root", other, who.Subject, who.Issuer, false},
	} {
		for _, kind := range []string{"slsaprovenance1", trust.PredicateKernelMatch, "spdxjson"} {
			// This deployment has a timestamp authority, but no transparency log.
			out, err := cosign("verify-attestation", "--trusted-root", row.root, "--certificate-identity", row.who,
				"--certificate-oidc-issuer", row.issuer,
				"--use-signed-timestamps", "--insecure-ignore-tlog", "--insecure-ignore-sct", "--allow-http-registry", "--type",
				kind, where+"@"+digest)
			if (err == nil) != row.ok {
				t.Errorf("%s: cosign verify-attestation --type %s = %v\n%s", row.name, kind, err, out)
			}
		}
	}
}
