package auth

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
)

// FuzzWho sends arbitrary secrets to a server that knows the first token, one stored token, and an issuer of tokens.
// The server must refuse all secrets but those two tokens.
func FuzzWho(f *testing.F) {
	const first = "0123456789abcdef"
	dir := f.TempDir()
	keys := `{"keys":[{"kty":"EC","crv":"P-256","kid":"k","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",` +
		`"y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}` // RFC 7517, appendix A.1
	rules := filepath.Join(dir, "rules.yaml")
	for name, text := range map[string]string{
		filepath.Join(dir, "keys.json"): keys,
		rules: "- {issuer: " + issuer +
			", audience: a, claims: {sub: \"*\"}, scopes: [admin], keys: keys.json}\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	all, err := ReadIssuers(rules)
	if err != nil {
		f.Fatal(err)
	}
	made, hash, err := NewToken(api.NewToken{Name: "x", Scopes: []string{"admin"}}, "first", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	claims := base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"` + issuer + `","aud":"a","sub":"x","exp":4102444800}`))
	a := New(Config{First: first, Tokens: &memory{token: made, hash: hash}, Issuers: all})
	for _, seed := range []string{"", first + " ", tokenPrefix, tokenPrefix + "_", "..", "e30.e30.",
		"eyJhbGciOiJub25lIn0.e30.",
		made.Secret[:len(made.Secret)-1], made.Secret + "A", "eyJhbGciOiJFUzI1NiJ9." + claims + ".AAAA"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, secret string) {
		if p, err := a.Authenticate(t.Context(), secret); err == nil && secret != first && secret != made.Secret {
			t.Errorf("Authenticate(%q) = %v; want a refusal", secret, p)
		}
	})
}
