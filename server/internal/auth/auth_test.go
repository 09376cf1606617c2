package auth

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/cluster"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// memory is a token store with one token.
type memory struct {
	token api.Token
	hash  []byte
	used  int
	fail  error // the result of TokenUsed; nil means success
}

func (m *memory) Token(_ context.Context, id string) (api.Token, []byte, error) {
	if id != m.token.ID {
		return api.Token{}, nil, fault.New(fault.NotFound, "no such token", "")
	}
	return m.token, m.hash, nil
}

func (m *memory) TokenUsed(_ context.Context, _ string, at time.Time) error {
	m.used++
	if m.fail != nil {
		return m.fail
	}
	m.token.UsedAt = &at
	return nil
}

// TestToken checks that a token is accepted until it expires, and that similar secrets are refused.
func TestToken(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	made, hash, err := NewToken(api.NewToken{Name: "node-pool-a", Scopes: []string{"ask"}, LifeSeconds: 86400}, "first",
		now)
	check(t, err)
	m := &memory{token: made, hash: hash}
	m.token.Secret = ""
	a := New(Config{First: "0123456789abcdef", Tokens: m, Now: func() time.Time { return now }})
	p, err := a.Authenticate(t.Context(), made.Secret)
	if diff := cmp.Diff(Principal{Name: "token:node-pool-a", Scopes: []Scope{Ask}}, p); diff != "" || err != nil {
		t.Errorf("Authenticate(token) = %v (-want +got):\n%s", err, diff)
	}
	for i := range 3 {
		now = now.Add(25 * time.Minute * time.Duration(i))
		if _, err := a.Authenticate(t.Context(), made.Secret); err != nil {
			t.Errorf("Authenticate(token) again = %v", err)
		}
	}
	if m.used != 2 {
		t.Errorf("the use of the token was recorded %d times in 75 minutes; want 2", m.used)
	}
	for name, secret := range map[string]string{
		"nothing": "", "prefix": tokenPrefix, "id alone": tokenPrefix + made.ID,
		"id and nothing": tokenPrefix + made.ID + "_",
		"another secret": tokenPrefix + made.ID + "_" + rand.Text(), "one letter less": made.Secret[:len(made.Secret)-1],
		"one letter more": made.Secret + "A", "first in upper case": "0123456789ABCDEF",
	} {
		if p, err := a.Authenticate(t.Context(), secret); !fault.Is(err, fault.Unauthorized) {
			t.Errorf("Authenticate(%s) = %+v, %v; want unauthorized", name, p, err)
		}
	}
	now = made.ExpiresAt
	if _, err := a.Authenticate(t.Context(), made.Secret); !fault.Is(err, fault.Unauthorized) ||
		!strings.Contains(err.Error(), "expired") {
		t.Errorf("Authenticate(token at its end) = %v; want unauthorized, expired", err)
	}
	if _, err := New(Config{}).Authenticate(t.Context(), ""); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("Authenticate(nothing) of a server without secrets = %v; want unauthorized", err)
	}
}

// TestTokenOfFullDatabase uses a token while the database cannot be written. The server must accept the token. It must
// try once a minute to record the use, until that succeeds.
func TestTokenOfFullDatabase(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	made, hash, err := NewToken(api.NewToken{Name: "node-pool-a", Scopes: []string{"ask"}}, "first", now)
	check(t, err)
	m := &memory{token: made, hash: hash, fail: fault.New(fault.DiskFull, "database or disk is full", "")}
	a := New(Config{Tokens: m, Now: func() time.Time { return now }})
	for _, row := range []struct {
		after time.Duration
		fail  error
		tries int
	}{
		{0, m.fail, 1}, {59 * time.Second, m.fail, 1}, {time.Second, m.fail, 2}, {time.Minute, nil, 3},
		{time.Minute, nil, 3},
	} {
		now, m.fail = now.Add(row.after), row.fail
		if p, err := a.Authenticate(t.Context(), made.Secret); err != nil || p.Name != "token:node-pool-a" {
			t.Errorf("Authenticate() = %+v, %v; want the token's holder", p, err)
		}
		if m.used != row.tries {
			t.Errorf("at %s, the use was recorded %d times; want %d", now, m.used, row.tries)
		}
	}
}

func TestNewTokenRefuses(t *testing.T) {
	t.Parallel()
	for name, n := range map[string]api.NewToken{
		"no name":        {Scopes: []string{"ask"}},
		"a path":         {Name: "../x", Scopes: []string{"ask"}},
		"no scope":       {Name: "x"},
		"another scope":  {Name: "x", Scopes: []string{"root"}},
		"a life of ages": {Name: "x", Scopes: []string{"ask"}, LifeSeconds: 1 << 40},
		"no life":        {Name: "x", Scopes: []string{"ask"}, LifeSeconds: -1},
	} {
		if _, _, err := NewToken(n, "first", time.Now()); !fault.Is(err, fault.Usage) {
			t.Errorf("NewToken(%s) = %v; want usage", name, err)
		}
	}
}

// key makes a signing key of an issuer. It returns the key, and the path of a file with the public key.
func key(t *testing.T, dir, id string) (*ecdsa.PrivateKey, string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	raw, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: k.Public(), KeyID: id, Algorithm: "ES256",
		Use: "sig"}}})
	check(t, err)
	name := filepath.Join(dir, id+".json")
	check(t, os.WriteFile(name, raw, 0o600))
	return k, name
}

func sign(t *testing.T, alg jose.SignatureAlgorithm, k crypto.PrivateKey, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: k}, (&jose.SignerOptions{}).WithType("JWT"))
	check(t, err)
	text, err := jwt.Signed(signer).Claims(claims).Serialize()
	check(t, err)
	return text
}

const issuer = "https://token.actions.githubusercontent.com"

// TestIssuer checks which tokens of an issuer are refused. Each row changes an accepted token in one way. The claims
// are those in GitHub's "OpenID Connect reference" (docs.github.com).
func TestIssuer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	k, _ := key(t, dir, "github")
	other, _ := key(t, dir, "other")
	rules := filepath.Join(dir, "rules.yaml")
	check(t, os.WriteFile(rules, []byte(`
- issuer: `+issuer+`
  audience: https://prebake.example
  claims: {repository: my-org/cos, ref: refs/heads/release-*, repository_visibility: private}
  scopes: [announce]
  name: "{repository}@{ref}"
  keys: github.json
`), 0o600))
	all, err := ReadIssuers(rules)
	check(t, err)
	a := New(Config{Issuers: all})
	claims := func(change map[string]any) map[string]any {
		c := map[string]any{
			"iss": issuer, "aud": "https://prebake.example", "sub": "repo:my-org/cos:ref:refs/heads/release-1",
			"exp": time.Now().Add(5 * time.Minute).Unix(), "iat": time.Now().Unix(), "nbf": time.Now().Unix(),
			"repository": "my-org/cos", "ref": "refs/heads/release-1", "repository_visibility": "private", "run_attempt": "1",
		}
		for name, v := range change {
			c[name] = v
		}
		return c
	}
	p, err := a.Authenticate(t.Context(), sign(t, jose.ES256, k, claims(nil)))
	want := Principal{Name: "oidc:my-org/cos@refs/heads/release-1", Scopes: []Scope{Announce}}
	if diff := cmp.Diff(want, p); diff != "" || err != nil {
		t.Fatalf("Authenticate(token) = %v (-want +got):\n%s", err, diff)
	}
	good := sign(t, jose.ES256, k, claims(nil))
	parts := strings.Split(good, ".")
	for name, secret := range map[string]string{
		"another repository":    sign(t, jose.ES256, k, claims(map[string]any{"repository": "my-org/cos-fork"})),
		"a branch further down": sign(t, jose.ES256, k, claims(map[string]any{"ref": "refs/heads/release-1/x"})),
		"no such claim":         sign(t, jose.ES256, k, claims(map[string]any{"repository_visibility": nil})),
		"a claim that is a map": sign(t, jose.ES256, k, claims(map[string]any{"repository": map[string]any{"x": 1}})),
		"another audience":      sign(t, jose.ES256, k, claims(map[string]any{"aud": "https://other.example"})),
		"another issuer":        sign(t, jose.ES256, k, claims(map[string]any{"iss": "https://evil.example"})),
		"expired":               sign(t, jose.ES256, k, claims(map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})),
		"not yet":               sign(t, jose.ES256, k, claims(map[string]any{"nbf": time.Now().Add(time.Hour).Unix()})),
		"another key":           sign(t, jose.ES256, other, claims(nil)),
		"HMAC":                  sign(t, jose.HS256, []byte(strings.Repeat("k", 32)), claims(nil)),
		"no signature":          parts[0] + "." + parts[1] + ".",
		"no algorithm":          "eyJhbGciOiJub25lIn0." + parts[1] + ".",
		"payload of another": parts[0] + "." + strings.Split(sign(t, jose.ES256, other,
			claims(map[string]any{"ref": "refs/heads/release-2"})), ".")[1] + "." + parts[2],
		"no token": "a.b.c",
		"endless":  parts[0] + "." + strings.Repeat("A", 1<<20) + "." + parts[2],
	} {
		if p, err := a.Authenticate(t.Context(), secret); !fault.Is(err, fault.Unauthorized) {
			t.Errorf("Authenticate(%s) = %+v, %v; want unauthorized", name, p, err)
		}
	}
}

func TestReadIssuersRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	k, _ := key(t, dir, "k")
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: k, KeyID: "p"}}})
	check(t, err)
	check(t, os.WriteFile(filepath.Join(dir, "private.json"), private, 0o600))
	public, err := os.ReadFile(filepath.Join(dir, "k.json"))
	check(t, err)
	check(t, os.WriteFile(filepath.Join(dir, "large.json"), append(public, make([]byte, maxKeys)...), 0o600))
	good := "issuer: https://a.example, audience: x, claims: {sub: y}, scopes: [ask]"
	for name, text := range map[string]string{
		"no YAML":          "[",
		"unknown member":   "[{" + good + ", scope: admin}]",
		"empty rule":       "[null]",
		"http":             "[{issuer: http://a.example, audience: x, claims: {sub: y}, scopes: [ask]}]",
		"no audience":      "[{issuer: https://a.example, claims: {sub: y}, scopes: [ask]}]",
		"no claims":        "[{issuer: https://a.example, audience: x, scopes: [ask]}]",
		"an empty claim":   "[{issuer: https://a.example, audience: x, claims: {sub: \"\"}, scopes: [ask]}]",
		"a broken pattern": "[{issuer: https://a.example, audience: x, claims: {sub: \"[\"}, scopes: [ask]}]",
		"no scopes":        "[{issuer: https://a.example, audience: x, claims: {sub: y}}]",
		"no keys":          "[{" + good + ", keys: absent.json}]",
		"private keys":     "[{" + good + ", keys: private.json}]",
		"too large keys":   "[{" + good + ", keys: large.json}]",
		"no certificate":   "[{" + good + ", ca: k.json}]",
	} {
		file := filepath.Join(dir, "rules.yaml")
		check(t, os.WriteFile(file, []byte(text), 0o600))
		if _, err := ReadIssuers(file); !fault.Is(err, fault.Usage) {
			t.Errorf("ReadIssuers(%s) = %v; want usage", name, err)
		}
	}
	check(t, os.WriteFile(filepath.Join(dir, "rules.yaml"), []byte("[{"+good+"}]"), 0o600))
	if _, err := ReadIssuers(filepath.Join(dir, "rules.yaml")); err != nil {
		t.Errorf("ReadIssuers(a good one) = %v", err)
	}
}

// TestKubernetesToken checks that a pod's token is accepted. Token and keys are from a real kube-apiserver.
func TestKubernetesToken(t *testing.T) {
	c := cluster.Start(t)
	dir := t.TempDir()
	keys, err := c.Do(http.MethodGet, "/openid/v1/jwks", nil)
	check(t, err)
	check(t, os.WriteFile(filepath.Join(dir, "keys.json"), keys, 0o600))
	rule := func(subject string) *Authenticator {
		file := filepath.Join(dir, "rules.yaml")
		check(t, os.WriteFile(file,
			[]byte("[{issuer: https://cluster.test, audience: prebake, scopes: [ask], keys: keys.json, claims: {sub: \""+subject+
				"\"}}]"), 0o600))
		all, err := ReadIssuers(file)
		check(t, err)
		return New(Config{Issuers: all})
	}
	token := func(audience string) string {
		var out struct {
			Status struct {
				Token string `json:"token"`
			} `json:"status"`
		}
		c.Must(http.MethodPost, "/api/v1/namespaces/default/serviceaccounts/default/token", map[string]any{
			"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
			"spec": map[string]any{"audiences": []string{audience}},
		}, &out)
		return out.Status.Token
	}
	p, err := rule("system:serviceaccount:default:default").Authenticate(t.Context(), token("prebake"))
	want := Principal{Name: "oidc:system:serviceaccount:default:default", Scopes: []Scope{Ask}}
	if diff := cmp.Diff(want, p); diff != "" || err != nil {
		t.Errorf("Authenticate(pod's token) = %v (-want +got):\n%s", err, diff)
	}
	if _, err := rule("system:serviceaccount:default:default").Authenticate(t.Context(), token("another")); !fault.Is(err,
		fault.Unauthorized) {
		t.Errorf("Authenticate(token for another audience) = %v; want unauthorized", err)
	}
	if _, err := rule("system:serviceaccount:kube-system:*").Authenticate(t.Context(), token("prebake")); !fault.Is(err,
		fault.Unauthorized) {
		t.Errorf("Authenticate(token of another account) = %v; want unauthorized", err)
	}
}

// TestExample checks that the server accepts the example file in docs.
func TestExample(t *testing.T) {
	t.Parallel()
	all, err := ReadIssuers("../../../docs/examples/issuers.yaml")
	if err != nil || len(all.rules) != 3 {
		t.Errorf("ReadIssuers(docs/examples/issuers.yaml) = %v; want three rules", err)
	}
}
