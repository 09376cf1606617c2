// Package auth identifies callers and decides what they may do. It accepts three kinds of secrets: the server's first
// token; tokens that an administrator made, whose hashes are in the database; and OpenID Connect tokens of the issuers
// in a file of rules. It knows no routes: the packages that serve routes say which scope each route needs.
package auth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Scope is a right of a caller. Most reads need no scope.
type Scope string

// These are all scopes.
const (
	// Ask is for nodes. They may request builds for kernels that the catalogue knows, with a limit per hour. They may also
	// report what happened to a driver.
	Ask Scope = "ask"
	// Announce is for release pipelines. They may announce a COS build and request any build.
	Announce Scope = "announce"
	// Build is for builders. They may report the progress of a build, send its log, and record an artifact.
	Build Scope = "build"
	// Push is for writing to the registry.
	Push Scope = "push"
	// Operate is for people. They may change wish lists, cancel builds, yank artifacts and delete from the registry. The
	// scope includes Ask and Announce.
	Operate Scope = "operate"
	// Admin is for making and revoking tokens and for reading the audit log. The scope includes all other scopes.
	Admin Scope = "admin"
)

// includes returns the other scopes that a scope includes.
func includes(s Scope) []Scope {
	switch s {
	case Operate:
		return []Scope{Ask, Announce}
	case Announce:
		return []Scope{Ask}
	case Admin:
		return Scopes()
	}
	return nil
}

// Scopes returns all scopes.
func Scopes() []Scope { return []Scope{Ask, Announce, Build, Push, Operate, Admin} }

// parseScopes parses the names of scopes. The result has each scope once. At least one name is needed.
func parseScopes(names []string) ([]Scope, error) {
	var all []Scope
	for _, name := range names {
		if !slices.Contains(Scopes(), Scope(name)) {
			return nil, fault.New(fault.Usage, fmt.Sprintf("there is no scope %.40q", name), hintScopes())
		}
		if !slices.Contains(all, Scope(name)) {
			all = append(all, Scope(name))
		}
	}
	if len(all) == 0 {
		return nil, fault.New(fault.Usage, "no scope is given", hintScopes())
	}
	return all, nil
}

func hintScopes() string {
	var names []string
	for _, s := range Scopes() {
		names = append(names, string(s))
	}
	return "give one or more of the scopes " + strings.Join(names, ", ")
}

// Principal is a caller that sent a valid secret.
type Principal struct {
	// Name is the caller's name in the audit log. It is "first" for the first token, token:NAME for a token that an
	// administrator made, and otherwise what an issuer's rule makes of the token's claims.
	Name   string
	Scopes []Scope
}

// May reports whether the caller has the scope.
func (p Principal) May(s Scope) bool {
	return slices.ContainsFunc(p.Scopes, func(has Scope) bool { return has == s || slices.Contains(includes(has), s) })
}

// tokenStore is the part of the database that the authenticator uses.
type tokenStore interface {
	// Token reads a token and its hash by its id. The error has kind NotFound if there is no such token.
	Token(ctx context.Context, id string) (api.Token, []byte, error)
	// TokenUsed records when a token was used.
	TokenUsed(ctx context.Context, id string, at time.Time) error
}

// Config says which secrets an authenticator accepts.
type Config struct {
	// First is the server's first token, which has all scopes; "" means that there is none.
	First string
	// Tokens stores the tokens that administrators made; nil means that there are none.
	Tokens tokenStore
	// Issuers are the issuers whose OpenID Connect tokens are accepted; see [ReadIssuers].
	Issuers *Issuers
	// Now returns the current time; nil means time.Now.
	Now func() time.Time
}

// Authenticator identifies callers.
type Authenticator struct{ Config }

// New returns an authenticator.
func New(c Config) *Authenticator {
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Authenticator{c}
}

// Authenticate returns the caller that a secret belongs to. If the secret belongs to no caller, the error has kind
// Unauthorized. If it cannot be checked now, for example because the issuer of a token does not answer, the error has
// kind Transient.
func (a *Authenticator) Authenticate(ctx context.Context, secret string) (Principal, error) {
	switch {
	case equalSecrets(secret, a.First):
		return Principal{Name: "first", Scopes: []Scope{Admin}}, nil
	case strings.HasPrefix(secret, tokenPrefix) && a.Tokens != nil:
		return a.ofToken(ctx, secret)
	case strings.Count(secret, ".") == 2 && a.Issuers != nil:
		return a.Issuers.authenticate(ctx, secret, a.Now())
	}
	return Principal{}, unknown("the token is not known")
}

func unknown(why string) error {
	return fault.New(fault.Unauthorized, why,
		"ask an administrator for a token; administrators make one with: server tokens create NAME --scope SCOPE")
}

// equalSecrets reports whether two secrets are equal. It compares them in constant time. An empty secret is not equal
// to another empty secret.
func equalSecrets(given, secret string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && secret != ""
}

// Secret returns the secret of a request: its Bearer token, or the password of HTTP Basic authentication. Clients of
// registries send a password; their user name does not matter. The result given is false if the request has no secret.
func Secret(r *http.Request) (secret string, given bool) {
	if _, password, ok := r.BasicAuth(); ok {
		return password, true
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.TrimSpace(token), strings.EqualFold(scheme, "Bearer")
}

// Need returns nil if the caller has the scope, and otherwise an error of kind Forbidden.
func Need(p Principal, s Scope) error {
	if p.May(s) {
		return nil
	}
	return fault.New(fault.Forbidden, fmt.Sprintf("%s has no scope %q", cmp.Or(p.Name, "the caller"), s),
		fmt.Sprintf("use a token that has this scope; to make one, run: server tokens create NAME --scope %s", s))
}

type contextKey struct{}

// Note returns a context with a place for the caller. The handler that identifies the caller stores it there with
// [Write]. A handler around that one reads it with [Noted].
func Note(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, new(Principal))
}

// Write stores the caller in the place that [Note] added.
func Write(ctx context.Context, p Principal) {
	if at, ok := ctx.Value(contextKey{}).(*Principal); ok {
		*at = p
	}
}

// Noted returns the caller that [Write] stored. If there is none, the name is empty.
func Noted(ctx context.Context) Principal {
	if at, ok := ctx.Value(contextKey{}).(*Principal); ok {
		return *at
	}
	return Principal{}
}
