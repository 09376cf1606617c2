package httpapi

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/go-chi/httprate"
	"golang.org/x/time/rate"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

// schemeName is the name of the security scheme in the API's description: the bearer token.
const schemeName = "token"

// scopeOf returns the scope that an operation needs; "" means none.
func scopeOf(op *huma.Operation) auth.Scope {
	for _, s := range op.Security {
		for _, scope := range s[schemeName] {
			return auth.Scope(scope)
		}
	}
	return ""
}

// access returns an error unless the sender of the header has the scope. It stores the caller in the context, for the
// logs.
func access(ctx context.Context, who *auth.Authenticator, authorization string, s auth.Scope) error {
	scheme, secret, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") || strings.TrimSpace(secret) == "" {
		return fault.New(fault.Unauthorized, "this call needs a token",
			"send the header Authorization: Bearer TOKEN; to make a token, run: server tokens create NAME --scope "+string(s))
	}
	p, err := who.Authenticate(ctx, strings.TrimSpace(secret))
	if err != nil {
		return err
	}
	auth.Write(ctx, p)
	return auth.Need(p, s)
}

const challenge = `Bearer realm="prebake"`

// checkSecurity is a middleware for the routes of the [table]. It refuses callers without the route's scope.
func checkSecurity(a huma.API, c Config) func(huma.Context, func(huma.Context)) {
	return func(ctx huma.Context, next func(huma.Context)) {
		if scope := scopeOf(ctx.Operation()); scope != "" {
			if err := access(ctx.Context(), c.Auth, ctx.Header("Authorization"), scope); err != nil {
				if fault.Is(err, fault.Unauthorized) {
					ctx.SetHeader("Www-Authenticate", challenge)
				}
				logOwn(ctx.Context(), c, err)
				writeHuma(a, ctx, problemOf(err))
				return
			}
		}
		next(ctx)
	}
}

// needScope returns a middleware for a route outside the [table]. It refuses callers without the scope.
func needScope(c Config, s auth.Scope) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := access(r.Context(), c.Auth, r.Header.Get("Authorization"), s); err != nil {
				if fault.Is(err, fault.Unauthorized) {
					w.Header().Set("Www-Authenticate", challenge)
				}
				logOwn(r.Context(), c, err)
				writeProblem(w, problemOf(err))
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

// logOwn logs the server's own errors, whose text no response contains.
func logOwn(ctx context.Context, c Config, err error) {
	if fault.Of(err).HTTPStatus() >= http.StatusInternalServerError {
		c.Log.ErrorContext(ctx, "caller not identified", "err", err)
	}
}

// tokenStore stores the tokens and the audit log.
type tokenStore interface {
	Tokens(ctx context.Context) ([]api.Token, error)
	CreateToken(ctx context.Context, t api.Token, hash []byte) error
	RevokeToken(ctx context.Context, id string, at time.Time) error
	Audit(ctx context.Context, actor string, p store.Page) (all []api.AuditEntry, next string, err error)
	Audited(ctx context.Context, e api.AuditEntry) error
}

// maxAuditPath is the maximum length of a path in the audit log, in bytes.
const maxAuditPath = 512

// audit returns a middleware that writes the audit log. It records calls of known callers that would change something,
// even refused ones. It leaves out the reports of builders and nodes, and all requests of a push except that for the
// manifest.
func audit(c Config) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			reads := r.Method == http.MethodGet || r.Method == http.MethodHead
			if reads && r.Header.Get("Authorization") == "" {
				next.ServeHTTP(w, r)
				return
			}
			ctx := auth.Note(r.Context())
			if reads {
				next.ServeHTTP(w, r.WithContext(ctx))
				return
			}
			seen := middleware.NewWrapResponseWriter(w, r.ProtoMajor)
			next.ServeHTTP(seen, r.WithContext(ctx))
			who := auth.Noted(ctx)
			if who.Name == "" || !audited(r) {
				return
			}
			e := api.AuditEntry{
				At:      time.Now(),
				Actor:   who.Name,
				Method:  r.Method,
				Path:    r.URL.Path[:min(len(r.URL.Path), maxAuditPath)],
				Status:  seen.Status(),
				Request: middleware.GetReqID(ctx),
				Source:  r.RemoteAddr,
			}
			// The client may be gone by now, but its change was made.
			if err := c.Access.Audited(context.WithoutCancel(ctx), e); err != nil {
				c.Log.ErrorContext(ctx, "audit log not written", "actor", e.Actor, "method", e.Method, "path", e.Path, "err", err)
			}
		})
	}
}

func audited(r *http.Request) bool {
	if strings.HasPrefix(r.URL.Path, "/v2/") {
		return strings.Contains(r.URL.Path, "/manifests/") ||
			r.Method == http.MethodDelete && !strings.Contains(r.URL.Path, "/blobs/uploads/")
	}
	pattern := ""
	if rc := chi.RouteContext(r.Context()); rc != nil {
		pattern = rc.RoutePattern()
	}
	switch r.Method + " " + pattern {
	case "PATCH /v1/builds/{id}", "PUT /v1/builds/{id}/log", "PATCH /v1/builds/{id}/log", "POST /v1/preflight",
		"POST /v1/reports":
		return false
	}
	return true
}

// limitClients returns a middleware that responds with status 429 and the Retry-After header if an address makes more
// than perMinute calls within a minute. 0 means no limit.
func limitClients(perMinute int) func(http.Handler) http.Handler {
	if perMinute == 0 {
		return func(next http.Handler) http.Handler { return next }
	}
	return httprate.LimitBy(perMinute, time.Minute, peer, httprate.WithLimitHandler(
		func(w http.ResponseWriter, _ *http.Request) {
			writeProblem(w, problemOf(fault.New(fault.TooMany, "this IP address sent too many requests within a minute",
				"wait as many seconds as the Retry-After header of the response says")))
		}))
}

// peer returns the address of a connection, or its /64 network with IPv6. It ignores headers such as X-Forwarded-For,
// because anybody can write them.
func peer(r *http.Request) (string, error) {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	return httprate.CanonicalizeIP(host), err
}

// callers limits the builds that each caller with only the scope ask may add within an hour.
type callers struct {
	perHour int

	mu sync.Mutex
	of map[string]*rate.Limiter
}

// maxCallers is the maximum number of remembered callers. An issuer can make tokens for any number of callers.
const maxCallers = 10_000

// caller returns the limits of the caller in the context.
func (a *callers) caller(ctx context.Context) catalogue.Caller {
	who := auth.Noted(ctx)
	if who.May(auth.Announce) {
		return catalogue.Caller{}
	}
	return catalogue.Caller{KnownOnly: true, Allow: func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		l := a.of[who.Name]
		if l == nil {
			if len(a.of) >= maxCallers {
				clear(a.of)
			}
			l = rate.NewLimiter(rate.Every(time.Hour/time.Duration(a.perHour)), a.perHour)
			a.of[who.Name] = l
		}
		if !l.Allow() {
			return fault.New(fault.TooMany, fmt.Sprintf("%s requested %d new builds within an hour", who.Name, a.perHour),
				"request the build again in some minutes; for a higher limit, start the server with a higher --ask-rate")
		}
		return nil
	}}
}

// access registers the routes for tokens and for the audit log.
func (t table) access() {
	huma.Register(
		t,
		t.adminRead("list-tokens", "/v1/tokens", "List tokens, without their secrets"),
		func(ctx context.Context, _ *struct{}) (*body[[]api.Token], error) {
			return answer(t.Access.Tokens(ctx))
		},
	)
	huma.Register(
		t,
		t.write(
			"create-token",
			auth.Admin,
			http.MethodPost,
			"/v1/tokens",
			"Make a token; its secret is shown once",
			http.StatusCreated,
		),
		func(ctx context.Context, in *body[api.NewToken]) (*body[api.Token], error) {
			made, hash, err := auth.NewToken(in.Body, auth.Noted(ctx).Name, time.Now())
			if err == nil {
				err = t.Access.CreateToken(ctx, made, hash)
			}
			return answer(made, err)
		},
	)
	huma.Register(
		t,
		t.write(
			"revoke-token",
			auth.Admin,
			http.MethodDelete,
			"/v1/tokens/{id}",
			"Revoke a token",
			http.StatusNoContent,
		),
		func(ctx context.Context, in *struct {
			ID string `path:"id" doc:"id of the token"`
		}) (*struct{}, error) {
			if err := t.Access.RevokeToken(ctx, in.ID, time.Now()); err != nil {
				return nil, asProblem(err)
			}
			return nil, nil
		},
	)
	huma.Register(
		t,
		t.adminRead("list-audit", "/v1/audit", "List who changed what, newest first"),
		func(ctx context.Context, in *struct {
			PageQuery
			Actor string `query:"actor" maxLength:"256" doc:"only of this caller"`
		}) (*list[api.AuditEntry], error) {
			all, next, err := t.Access.Audit(
				ctx,
				in.Actor,
				store.Page{After: in.After, Limit: cmp.Or(in.Limit, catalogue.DefaultLimit)},
			)
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
}
