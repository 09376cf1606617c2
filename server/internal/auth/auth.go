// Package auth says who calls and what a caller may do. It knows three kinds of
// secret: the server's first token, tokens that an administrator made, of which
// the database keeps hashes, and OpenID Connect tokens of issuers that a file
// trusts. It refuses to know routes: who serves them says what each needs.
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

// Scope is a kind of thing that a caller may do. Reading needs none.
type Scope string

// The scopes.
const (
	// Ask is for nodes: ask for builds of kernels that the catalogue knows, so many
	// an hour, and report what happened to a driver.
	Ask Scope = "ask"
	// Announce is for release pipelines: tell of a COS build, and ask for any build.
	Announce Scope = "announce"
	// Build is for builders: report a build's progress and its log, record an artifact.
	Build Scope = "build"
	// Push writes to the registry.
	Push Scope = "push"
	// Operate is for people: wish lists, cancel, yank, removing from the registry.
	// It includes ask and announce.
	Operate Scope = "operate"
	// Admin makes and revokes tokens and reads the audit log. It includes all others.
	Admin Scope = "admin"
)

// includes lists what else a scope opens.
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

// Scopes lists all of them.
func Scopes() []Scope { return []Scope{Ask, Announce, Build, Push, Operate, Admin} }

// parseScopes reads scopes by their names, each once, at least one.
func parseScopes(names []string) ([]Scope, error) {
	var all []Scope
	for _, name := range names {
		if !slices.Contains(Scopes(), Scope(name)) {
			return nil, fault.New(fault.Usage, fmt.Sprintf("there is no scope %.40q", name), "scopes: "+scopeNames())
		}
		if !slices.Contains(all, Scope(name)) {
			all = append(all, Scope(name))
		}
	}
	if len(all) == 0 {
		return nil, fault.New(fault.Usage, "no scope is given", "scopes: "+scopeNames())
	}
	return all, nil
}

func scopeNames() string {
	var names []string
	for _, s := range Scopes() {
		names = append(names, string(s))
	}
	return strings.Join(names, ", ")
}

// Principal is a caller that showed a secret.
type Principal struct {
	// Name is what the audit log calls it: first, token:NAME, or what an issuer's
	// rule makes of the caller's claims.
	Name   string
	Scopes []Scope
}

// May reports whether the caller may do what needs the scope.
func (p Principal) May(s Scope) bool {
	return slices.ContainsFunc(p.Scopes, func(has Scope) bool { return has == s || slices.Contains(includes(has), s) })
}

// tokenStore is what the authenticator asks a database.
type tokenStore interface {
	// Token reads a token and its hash by its id; fault.NotFound if there is none.
	Token(ctx context.Context, id string) (api.Token, []byte, error)
	// TokenUsed records when a token was used.
	TokenUsed(ctx context.Context, id string, at time.Time) error
}

// Config is what an authenticator knows.
type Config struct {
	// First is the token that opens everything; "" means none.
	First string
	// Tokens are those that an administrator made; nil means none.
	Tokens tokenStore
	// Issuers are whose OpenID Connect tokens count; see ReadIssuers.
	Issuers *Issuers
	// Now is the clock; nil means the machine's.
	Now func() time.Time
}

// Authenticator finds out who calls.
type Authenticator struct{ Config }

// New returns an authenticator.
func New(c Config) *Authenticator {
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Authenticator{c}
}

// Authenticate returns the caller that a secret belongs to: fault.Unauthorized if to none,
// fault.Transient if that cannot be found out now.
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
	return fault.New(fault.Unauthorized, why, "get one from the operator of the server: server tokens create")
}

// equalSecrets compares secrets in constant time. An empty secret lets nobody in.
func equalSecrets(given, secret string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && secret != ""
}

// Secret returns what a request says to be allowed by: a Bearer token, or the
// password of Basic under any user name, which is what clients of registries send.
func Secret(r *http.Request) (secret string, given bool) {
	if _, password, ok := r.BasicAuth(); ok {
		return password, true
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	return strings.TrimSpace(token), strings.EqualFold(scheme, "Bearer")
}

// Need returns nil if the caller may do what needs the scope, or fault.Forbidden.
func Need(p Principal, s Scope) error {
	if p.May(s) {
		return nil
	}
	return fault.New(fault.Forbidden, fmt.Sprintf("%s has no scope %q", cmp.Or(p.Name, "the caller"), s),
		fmt.Sprintf("use a token that has it: server tokens create NAME --scope %s", s))
}

type contextKey struct{}

// Note makes room in a context for the caller, which [Noted] tells once a handler
// further in has found it out with [Write].
func Note(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, new(Principal))
}

// Write says who calls to everyone who shares the context of [Note].
func Write(ctx context.Context, p Principal) {
	if at, ok := ctx.Value(contextKey{}).(*Principal); ok {
		*at = p
	}
}

// Noted returns who calls; nobody has no name.
func Noted(ctx context.Context) Principal {
	if at, ok := ctx.Value(contextKey{}).(*Principal); ok {
		return *at
	}
	return Principal{}
}
