package api

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Token is a secret that an administrator made for somebody, without the secret.
type Token struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Scopes    []string   `json:"scopes"`
	CreatedAt time.Time  `json:"createdAt"`
	CreatedBy string     `json:"createdBy"`
	ExpiresAt time.Time  `json:"expiresAt"`
	UsedAt    *time.Time `json:"usedAt,omitempty"` // to the hour
	RevokedAt *time.Time `json:"revokedAt,omitempty"`
	// Secret is what its holder sends. It is told once, to who made the token.
	Secret string `json:"secret,omitempty"`
}

// NewToken asks for a token.
type NewToken struct {
	Name   string   `json:"name" doc:"name of the token's holder, such as node-pool-a"`
	Scopes []string `json:"scopes" doc:"ask, announce, build, push, operate or admin"`
	// LifeSeconds is how long it counts; 0 means 90 days.
	LifeSeconds int64 `json:"lifeSeconds,omitempty" doc:"lifetime in seconds; 0 is 90 days"`
}

// AuditEntry is a call that changed something, or that was forbidden.
type AuditEntry struct {
	At     time.Time `json:"at"`
	Actor  string    `json:"actor"`
	Method string    `json:"method"`
	Path   string    `json:"path"`
	Status int       `json:"status"`
	// Request is the id that the server's log and the answer have, too.
	Request string `json:"request"`
	// Source is the address that the call came from.
	Source string `json:"source"`
}

// Tokens lists the tokens, without their secrets.
func (c *Client) Tokens(ctx context.Context) (all []Token, err error) {
	return all, c.call(ctx, http.MethodGet, "/v1/tokens", nil, &all)
}

// CreateToken makes a token; its secret is told in this answer only.
func (c *Client) CreateToken(ctx context.Context, n NewToken) (t Token, err error) {
	return t, c.call(ctx, http.MethodPost, "/v1/tokens", n, &t)
}

// RevokeToken makes a token worth nothing.
func (c *Client) RevokeToken(ctx context.Context, id string) error {
	return c.sendOnly(ctx, http.MethodDelete, "/v1/tokens/"+url.PathEscape(id), nil)
}

// Audit lists who changed what, newest first; actor "" is anybody.
func (c *Client) Audit(ctx context.Context, actor string) ([]AuditEntry, error) {
	return collect(c.EachAudit(ctx, Filter{Actor: actor}))
}
