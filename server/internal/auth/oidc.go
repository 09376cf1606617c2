package auth

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/fault"
)

// The first three constants are maximum sizes of foreign input, in bytes. The others are about requests to an issuer.
const (
	maxIssuers  = 1 << 20          // of the rules file
	maxJWT      = 16 << 10         // of a token
	maxKeys     = 1 << 20          // of a file with keys
	askIssuer   = 10 * time.Second // time limit of one request
	retryIssuer = 10 * time.Second // pause after a failed request
)

// Rule says which tokens of an issuer are trusted.
type Rule struct {
	// Issuer is the value of the claim iss, an https URL.
	Issuer string `yaml:"issuer"`
	// Audience is the value that the claim aud must contain.
	Audience string `yaml:"audience"`
	// Claims has a pattern of [path.Match] for each claim that is checked; a * does not match /. A rule needs at least
	// one claim, because an issuer such as GitHub's signs tokens for everybody.
	Claims map[string]string `yaml:"claims"`
	// Scopes are the scopes of a caller whose token fits the rule.
	Scopes []string `yaml:"scopes"`
	// Name is the caller's name in the audit log, in which {claim} stands for a claim's value. "" means the claim sub.
	Name string `yaml:"name"`
	// Keys is a file with the issuer's keys, as a JWK set. A relative path starts at the folder of the rules file. ""
	// means that the server gets the keys by OpenID Connect Discovery.
	Keys string `yaml:"keys"`
	// CA is a PEM file with the roots of the issuer's certificate. "" means the system's roots.
	CA string `yaml:"ca"`

	scopes   []Scope
	verifier *lazyVerifier
}

// Issuers has the rules that decide which OpenID Connect tokens are trusted.
type Issuers struct{ rules []*Rule }

// ReadIssuers reads a YAML list of [Rule]. It refuses unknown fields.
func ReadIssuers(file string) (*Issuers, error) {
	fail := func(err error) error {
		return fault.Wrap(
			fault.Usage,
			fmt.Errorf("read issuers from %s: %w", file, err),
			"compare the file with the example docs/examples/issuers.yaml, which explains each field",
		)
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, fail(err)
	}
	if info.Size() > maxIssuers {
		return nil, fail(fmt.Errorf("the file has %d bytes; want at most %d bytes", info.Size(), maxIssuers))
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, fail(err)
	}
	all := &Issuers{}
	decoder := yaml.NewDecoder(bytes.NewReader(raw))
	decoder.KnownFields(true)
	if err := decoder.Decode(&all.rules); err != nil {
		return nil, fail(err)
	}
	for i, r := range all.rules {
		if r == nil {
			return nil, fail(fmt.Errorf("rule %d is empty", i+1))
		}
		if err := r.prepare(filepath.Dir(file)); err != nil {
			return nil, fail(fmt.Errorf("check rule %d: %w", i+1, err))
		}
	}
	return all, nil
}

// prepare checks a rule and makes its verifier, without a request to the issuer.
func (r *Rule) prepare(dir string) error {
	u, err := url.Parse(r.Issuer)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("issuer %q is not an https URL", r.Issuer)
	case r.Audience == "":
		return errors.New("audience is missing: without an audience, the server would accept tokens for other services")
	case len(r.Claims) == 0:
		return errors.New("claims are missing: a rule needs at least one, such as sub or repository")
	}
	for name, want := range r.Claims {
		if _, err := path.Match(want, ""); err != nil || want == "" {
			return fmt.Errorf("claim %s: %q is not a pattern; want a text with * for any characters except /", name, want)
		}
	}
	if r.scopes, err = parseScopes(r.Scopes); err != nil {
		return err
	}
	in := func(name string) string {
		if filepath.IsAbs(name) {
			return name
		}
		return filepath.Join(dir, name)
	}
	r.verifier = &lazyVerifier{issuer: r.Issuer, client: &http.Client{Timeout: askIssuer}}
	if r.CA != "" {
		pem, err := os.ReadFile(in(r.CA))
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("the file %s has no certificate in PEM", r.CA)
		}
		r.verifier.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool,
			MinVersion: tls.VersionTLS12}}
	}
	if r.Keys == "" {
		return nil
	}
	keys, err := readKeys(in(r.Keys))
	if err != nil {
		return err
	}
	r.verifier.verifier = oidc.NewVerifier(r.Issuer, keys, verifierConfig())
	return nil
}

func readKeys(file string) (*oidc.StaticKeySet, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if len(raw) > maxKeys {
		return nil, fmt.Errorf("the file %s has %d bytes; want at most %d bytes", file, len(raw), maxKeys)
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, fmt.Errorf("the file %s is not a JWK set: %w", file, err)
	}
	out := &oidc.StaticKeySet{}
	for _, k := range set.Keys {
		if !k.IsPublic() {
			return nil, fmt.Errorf("the file %s has a private or secret key; want only public keys", file)
		}
		out.PublicKeys = append(out.PublicKeys, crypto.PublicKey(k.Key))
	}
	if len(out.PublicKeys) == 0 {
		return nil, fmt.Errorf("the file %s has no key", file)
	}
	return out, nil
}

// verifierConfig returns a configuration that does not check the audience. Each rule checks the audience itself,
// because several rules may have the same issuer.
func verifierConfig() *oidc.Config {
	return &oidc.Config{SkipClientIDCheck: true, SupportedSigningAlgs: []string{
		oidc.RS256, oidc.RS384, oidc.RS512, oidc.ES256, oidc.ES384, oidc.ES512, oidc.PS256, oidc.PS384, oidc.PS512,
		oidc.EdDSA,
	}}
}

// lazyVerifier requests an issuer's keys when the first token arrives. The server therefore starts even if the issuer
// does not answer.
type lazyVerifier struct {
	issuer string
	client *http.Client

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
	failed   time.Time
	err      error
}

func (l *lazyVerifier) get(now time.Time) (*oidc.IDTokenVerifier, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.verifier != nil || now.Sub(l.failed) < retryIssuer && l.err != nil {
		return l.verifier, l.err
	}
	// The provider's key set keeps this context for later requests, so it must not be the context of one call.
	provider, err := oidc.NewProvider(oidc.ClientContext(context.Background(), l.client), l.issuer)
	if err != nil {
		l.failed, l.err = now, fault.Wrap(fault.Transient, fmt.Errorf("ask issuer %s for its keys: %w", l.issuer, err), "")
		return nil, l.err
	}
	l.verifier, l.err = provider.Verifier(verifierConfig()), nil
	return l.verifier, nil
}

// authenticate returns the caller of a token that one of the rules trusts.
func (all *Issuers) authenticate(ctx context.Context, raw string, now time.Time) (Principal, error) {
	issuer, err := issuerOf(raw)
	if err != nil {
		return Principal{}, unknown("the token is not an OpenID Connect token: " + err.Error())
	}
	var refusal error
	for _, r := range all.rules {
		if r.Issuer != issuer {
			continue
		}
		v, err := r.verifier.get(now)
		if err != nil {
			return Principal{}, err
		}
		token, err := v.Verify(ctx, raw)
		if err != nil {
			return Principal{}, unknown("the token is not valid: " + err.Error())
		}
		p, err := r.callerOf(token)
		if err == nil {
			return p, nil
		}
		refusal = err
	}
	if refusal != nil {
		return Principal{}, unknown("no rule of the server accepts this token: " + refusal.Error())
	}
	return Principal{}, unknown("no rule of the server is about the issuer of this token")
}

// issuerOf returns the issuer of an unverified token, to choose the keys.
func issuerOf(raw string) (string, error) {
	if len(raw) > maxJWT {
		return "", fmt.Errorf("the token has more than %d bytes", maxJWT)
	}
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return "", errors.New("the token does not have the three parts of a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return "", errors.New("the token's payload is not base64")
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return "", errors.New("the token's payload is not JSON")
	}
	return claims.Issuer, nil
}

// callerOf returns the caller of a verified token, or an error if the rule does not accept the token.
func (r *Rule) callerOf(token *oidc.IDToken) (Principal, error) {
	if !slices.Contains(token.Audience, r.Audience) {
		return Principal{}, errors.New("the token is for another audience")
	}
	var claims map[string]any
	if err := token.Claims(&claims); err != nil {
		return Principal{}, err
	}
	for name, want := range r.Claims {
		has, ok := claimText(claims[name])
		if fits, err := path.Match(want, has); !ok || err != nil || !fits {
			return Principal{}, fmt.Errorf("the token's claim %s does not have the value that the rule wants", name)
		}
	}
	name := token.Subject
	if r.Name != "" {
		name = claimInName.ReplaceAllStringFunc(r.Name, func(in string) string {
			text, _ := claimText(claims[strings.Trim(in, "{}")])
			return text
		})
	}
	return Principal{Name: "oidc:" + printableName(name), Scopes: r.scopes}, nil
}

var claimInName = regexp.MustCompile(`\{[A-Za-z0-9_.-]+\}`)

func claimText(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case bool, float64:
		return fmt.Sprint(v), true
	}
	return "", false
}

// printableName makes a foreign name safe for logs and tables. It cuts the name to 128 characters, and replaces each
// that is not printable ASCII by a ?.
func printableName(name string) string {
	const most = 128
	clean := strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, name)
	return clean[:min(len(clean), most)]
}
