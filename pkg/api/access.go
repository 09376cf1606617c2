package api

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Token describes an access token of the server.
type Token struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Scopes    []string   `json:"scopes"`
	CreatedAt time.Time  `json:"createdAt"`
	CreatedBy string     `json:"createdBy"`
	ExpiresAt time.Time  `json:"expiresAt"`
	UsedAt    *time.Time `json:"usedAt,omitempty"` // time of the last use, rounded to the hour
	RevokedAt *time.Time `json:"revokedAt,omitempty"`
	// Secret is the value that the holder sends with each request. Only CreateToken returns it.
	Secret string `json:"secret,omitempty"`
}

// NewToken is the body of a request for a token.
type NewToken struct {
	Name   string   `json:"name" doc:"name of the token's holder, such as node-pool-a"`
	Scopes []string `json:"scopes" doc:"ask, announce, build, push, operate or admin"`
	// LifeSeconds is the time until the token expires, in seconds; 0 means 90 days.
	LifeSeconds int64 `json:"lifeSeconds,omitempty" doc:"lifetime in seconds; 0 means 90 days"`
}

// AuditEntry is the record of one call that changed something, or that the server refused as forbidden.
type AuditEntry struct {
	At     time.Time `json:"at"`
	Actor  string    `json:"actor"`
	Method string    `json:"method"`
	Path   string    `json:"path"`
	Status int       `json:"status"`
	// Request is the id of the HTTP request. The server also writes this id into its log and into its response.
	Request string `json:"request"`
	// Source is the network address of the caller.
	Source string `json:"source"`
}

// Tokens lists the tokens, without their secrets.
func (c *Client) Tokens(ctx context.Context) (all []Token, err error) {
	return all, c.call(ctx, http.MethodGet, "/v1/tokens", nil, &all)
}

// CreateToken creates a token. No later call returns the token's secret.
func (c *Client) CreateToken(ctx context.Context, n NewToken) (t Token, err error) {
	return t, c.call(ctx, http.MethodPost, "/v1/tokens", n, &t)
}

// RevokeToken makes a token invalid.
func (c *Client) RevokeToken(ctx context.Context, id string) error {
	return c.sendOnly(ctx, http.MethodDelete, "/v1/tokens/"+url.PathEscape(id), nil)
}

// Audit lists the entries of the audit log with this actor, newest first. An empty actor means any actor.
func (c *Client) Audit(ctx context.Context, actor string) ([]AuditEntry, error) {
	return collect(c.EachAudit(ctx, Filter{Actor: actor}))
}
