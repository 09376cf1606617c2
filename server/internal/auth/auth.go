// Package auth identifies callers and decides what they may do. It accepts the server's first token, administrators'
// tokens, and OpenID Connect tokens of the issuers in a file of rules. It knows no routes.
package auth

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Scope is a right of a caller.
type Scope string

// These are all scopes.
const (
	// Ask is for nodes. They may request some builds per hour, of known kernels, and report what happened to a driver.
	Ask Scope = "ask"
	// Announce is for release pipelines. They may announce COS builds and request any build.
	Announce Scope = "announce"
	// Build is for builders. They may report on builds, send logs, and record artifacts.
	Build Scope = "build"
	// Push is for writing to the registry.
	Push Scope = "push"
	// Operate is for people. They may change wish lists, cancel builds, yank artifacts and delete from the registry.
	// Operate includes Ask and Announce.
	Operate Scope = "operate"
	// Admin is for making and revoking tokens, and for reading the audit log. It includes all other scopes.
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

// parseScopes parses the names of scopes, at least one. The result has each scope once.
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
	// Name is the caller's name in the audit log: "first" for the first token, and token:NAME for an administrator's
	// token. For an issuer's token, the rule says how to make the name.
	Name   string
	Scopes []Scope
}

// May reports whether the caller has the scope.
func (p Principal) May(s Scope) bool {
	return slices.ContainsFunc(p.Scopes, func(has Scope) bool { return has == s || slices.Contains(includes(has), s) })
}

// tokenStore is the part of the database that the authenticator uses.
type tokenStore interface {
	// Token reads a token and its hash by its id. If the token does not exist, the error has kind NotFound.
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
	// Log receives errors that do not make a request fail. If Log is nil, these errors are dropped.
	Log *slog.Logger
	// Now returns the current time; nil means time.Now.
	Now func() time.Time
}

// Authenticator identifies callers.
type Authenticator struct {
	Config
	noRecordUntil atomic.Int64 // nanoseconds since 1970; see recordUse
}

// New returns an authenticator.
func New(c Config) *Authenticator {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Authenticator{Config: c}
}

// Authenticate returns the caller with the given secret. For an unknown secret, the error has kind Unauthorized. If the
// issuer of a token does not answer, the error has kind Transient.
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

// equalSecrets reports whether two secrets are equal, in constant time. Empty secrets are never equal.
func equalSecrets(given, secret string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && secret != ""
}

// Secret returns the secret of a request: its Bearer token, or the password of its HTTP Basic authentication. The user
// name does not matter. The second result is false if the request has no secret.
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

// Note returns a context with a place for the caller. [Write] stores the caller there, and an outer handler reads it
// with [Noted].
func Note(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, new(Principal))
}

// Write stores the caller in the place that [Note] added.
func Write(ctx context.Context, p Principal) {
	if at, ok := ctx.Value(contextKey{}).(*Principal); ok {
		*at = p
	}
}

// Noted returns the caller that [Write] stored, or a caller without a name.
func Noted(ctx context.Context) Principal {
	if at, ok := ctx.Value(contextKey{}).(*Principal); ok {
		return *at
	}
	return Principal{}
}
