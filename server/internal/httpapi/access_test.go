package httpapi_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/httpapi"
	"github.com/prebake/prebake/server/internal/store"
	"github.com/prebake/prebake/server/internal/web"
)

// neededScopes has the scope that each route needs; "" means that the route is open. The table is written by hand, so
// that each change needs a decision.
var neededScopes = map[string]auth.Scope{
	"GET /":                               "",
	"GET /assets/{name}":                  "",
	"GET /badge.svg":                      "",
	"GET /builds/{id}":                    "",
	"GET /cells/{board}/{build}/{driver}": "",
	"GET /cells/{board}/{build}/{driver}/{flavour}": "",
	"GET /feed.atom":    "",
	"GET /preflight":    "",
	"GET /queue":        "",
	"GET /warnings":     "",
	"GET /releases":     "",
	"GET /healthz":      "",
	"GET /metrics":      "",
	"GET /openapi.json": "", "GET /openapi.yaml": "", "GET /openapi-3.0.json": "", "GET /openapi-3.0.yaml": "",
	"GET /readyz":                           "",
	"GET /snapshot/*":                       "",
	"GET /v1/artifacts":                     "",
	"GET /v1/artifacts/{digest}":            "",
	"GET /v1/audit":                         auth.Admin,
	"GET /v1/builds":                        "",
	"GET /v1/builds/{id}":                   "",
	"GET /v1/builds/{id}/events":            "",
	"GET /v1/builds/{id}/log":               "",
	"GET /v1/cells":                         "",
	"GET /v1/drivers":                       "",
	"GET /v1/kernels":                       "",
	"GET /v1/ready-times":                   "",
	"GET /v1/releases":                      "",
	"GET /v1/releases/{buildId}":            "",
	"GET /v1/resolve":                       "",
	"GET /v1/tokens":                        auth.Admin,
	"GET /v1/wish-lists":                    "",
	"GET /v1/wish-lists/{name}":             "",
	"POST /v1/preflight":                    "",
	"GET /v1/coverage":                      "",
	"GET /v1/warnings":                      "",
	"GET /v1/reports":                       "",
	"GET /v1/quarantine":                    "",
	"POST /v1/reports":                      auth.Ask,
	"POST /v1/artifacts/{digest}/free-tags": auth.Operate,
	"POST /v1/artifacts/{digest}/lift":      auth.Operate,
	"POST /v1/artifacts":                    auth.Build,
	"DELETE /v1/artifacts/{digest}":         auth.Operate,
	"POST /v1/artifacts/{digest}/unyank":    auth.Operate,
	"POST /v1/artifacts/{digest}/yank":      auth.Operate,
	"POST /v1/builds":                       auth.Ask,
	"POST /v1/builds/{id}/cancel":           auth.Operate,
	"PATCH /v1/builds/{id}/log":             auth.Build,
	"PATCH /v1/builds/{id}":                 auth.Build,
	"PUT /v1/builds/{id}/log":               auth.Build,
	"POST /v1/releases":                     auth.Announce,
	"POST /v1/releases/push":                auth.Announce,
	"POST /v1/tokens":                       auth.Admin,
	"DELETE /v1/tokens/{id}":                auth.Admin,
	"PUT /v1/wish-lists/{name}":             auth.Operate,
	"DELETE /v1/wish-lists/{name}":          auth.Operate,
	"GET /v2/x/tags/list":                   "",
	"GET /v2/x/manifests/latest":            "",
	"GET /v2/x/blobs/DIGEST":                "",
	"GET /v2/x/referrers/DIGEST":            "",
	"PUT /v2/x/manifests/latest":            auth.Push,
	"POST /v2/x/blobs/uploads/":             auth.Push,
	"PATCH /v2/x/blobs/uploads/1":           auth.Push,
	"PUT /v2/x/blobs/uploads/1":             auth.Push,
	"DELETE /v2/x/blobs/uploads/1":          auth.Push,
	"DELETE /v2/x/manifests/latest":         auth.Operate,
	"DELETE /v2/x/blobs/DIGEST":             auth.Operate,
	"POST /v2/x/blobs/uploads/?from=y":      auth.Push,
	"GET /v2/x/blobs/uploads/1":             "",
	"HEAD /v2/x/manifests/latest":           "",
	"PUT /v2/x/manifests/sha256-y.referrer": auth.Push,
}

// satisfyingScopes has, for each needed scope, the scopes that satisfy it.
var satisfyingScopes = map[auth.Scope][]auth.Scope{
	auth.Ask:      {auth.Ask, auth.Announce, auth.Operate, auth.Admin},
	auth.Announce: {auth.Announce, auth.Operate, auth.Admin},
	auth.Build:    {auth.Build, auth.Admin},
	auth.Push:     {auth.Push, auth.Admin},
	auth.Operate:  {auth.Operate, auth.Admin},
	auth.Admin:    {auth.Admin},
}

// makeToken stores a token with one scope that is valid for one hour, starting at from.
func makeToken(t *testing.T, db *store.Store, name string, s auth.Scope, from time.Time) api.Token {
	t.Helper()
	made, hash, err := auth.NewToken(api.NewToken{Name: name, Scopes: []string{string(s)}, LifeSeconds: 3600}, "test",
		from)
	check(t, err)
	check(t, db.CreateToken(t.Context(), made, hash))
	return made
}

// TestAuthorization calls every route as every kind of caller, and compares the answers with neededScopes.
func TestAuthorization(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	secrets := map[string]string{"nobody": "", "stranger": "prebake_x_y", "forger": "a.b.c", "first": token}
	may := map[string]auth.Scope{"first": auth.Admin}
	for _, s := range auth.Scopes() {
		secrets[string(s)], may[string(s)] = makeToken(t, db, string(s), s, time.Now()).Secret, s
	}
	secrets["expired"] = makeToken(t, db, "expired", auth.Admin, time.Now().Add(-2*time.Hour)).Secret
	revoked := makeToken(t, db, "revoked", auth.Admin, time.Now())
	check(t, db.RevokeToken(t.Context(), revoked.ID, time.Now()))
	secrets["revoked"] = revoked.Secret
	secrets["half"] = strings.TrimRight(secrets["admin"], "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") // only its ID

	for route, scope := range neededScopes {
		method, pattern, _ := strings.Cut(route, " ")
		path := strings.NewReplacer("{id}", "1", "{buildId}", "17800.66.78", "{name}", "x", "{digest}", digest, "DIGEST",
			digest,
			"/assets/{name}", "/assets/style.css", "{board}", "lakitu", "{build}", "17800.66.78", "{driver}", "535.261.03",
			"{flavour}", "open").Replace(pattern)
		for caller, secret := range secrets {
			status := ask(t, method, url+path, secret)
			refused := status == http.StatusUnauthorized || status == http.StatusForbidden
			has, known := may[caller]
			switch {
			case scope == "" && refused:
				t.Errorf("%s by %s = %d; it is open", route, caller, status)
			case scope != "" && !known && status != http.StatusUnauthorized:
				t.Errorf("%s by %s = %d; want 401", route, caller, status)
			case scope != "" && known && !slices.Contains(satisfyingScopes[scope], has) && status != http.StatusForbidden:
				t.Errorf("%s by %s = %d; want 403", route, caller, status)
			case scope != "" && known && slices.Contains(satisfyingScopes[scope], has) && refused:
				t.Errorf("%s by %s = %d; it has the scope", route, caller, status)
			}
		}
	}

	routes, ok := httpapi.New(httpapi.Config{Auth: auth.New(auth.Config{}), Log: slog.New(slog.DiscardHandler),
		Pages: http.NotFoundHandler(), PageRoutes: web.Routes, Snapshot: http.NotFoundHandler()}).(chi.Routes)
	if !ok {
		t.Fatal("the handler does not list its routes")
	}
	check(t, chi.Walk(routes, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		if _, listed := neededScopes[method+" "+route]; !listed {
			t.Errorf("route %s %s is not in the authorization table", method, route)
		}
		return nil
	}))
}

// ask sends a request whose body is incomplete, so that it changes nothing. It returns the status.
func ask(t *testing.T, method, url, secret string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader("{"))
	check(t, err)
	req.Header.Set("Content-Type", "application/json")
	if secret != "" {
		req.Header.Set("Authorization", "Bearer "+secret)
	}
	resp, err := http.DefaultClient.Do(req)
	check(t, err)
	_, err = io.Copy(io.Discard, resp.Body)
	check(t, errors.Join(err, resp.Body.Close()))
	return resp.StatusCode
}

// TestNodeAsks checks that a node may request builds only for known kernels, and only a limited number per hour. A
// request for an existing build does not count.
func TestNodeAsks(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	node := api.NewClient(url, makeToken(t, db, "node", auth.Ask, time.Now()).Secret, nil)
	pipeline := api.NewClient(url, makeToken(t, db, "pipeline", auth.Announce, time.Now()).Secret, nil)
	request := func(c *api.Client, build int, driver string) error {
		_, err := c.RequestBuild(t.Context(),
			api.BuildRequest{BuildID: fmt.Sprintf("17800.66.%d", build), Board: "lakitu", Driver: driver, Flavour: "open"})
		return err
	}
	if err := request(node, 78, "550.54.15"); !fault.Is(err, fault.Forbidden) {
		t.Errorf("RequestBuild(unknown kernel) by a node = %v; want forbidden", err)
	}
	check(t, request(pipeline, 78, "550.54.15"))
	check(t, request(node, 78, "550.54.15"))
	for i := range 2 { // serveLogging allows two in an hour
		check(t, request(node, 78, fmt.Sprintf("550.54.%d", 20+i)))
	}
	if err := request(node, 78, "550.54.30"); !fault.Is(err, fault.TooMany) {
		t.Errorf("RequestBuild(third new build) by a node = %v; want too-many", err)
	}
	check(t, request(node, 78, "550.54.20"))
	check(t, request(pipeline, 79, "550.54.30"))
}

// TestAudit checks that the audit log has changes and refusals, but no reports of builders.
func TestAudit(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	first := api.NewClient(url, token, nil)
	made, err := first.CreateToken(t.Context(), api.NewToken{Name: "ci", Scopes: []string{"announce"}})
	check(t, err)
	if made.Secret == "" || made.CreatedBy != "first" || made.ExpiresAt.Sub(made.CreatedAt) != auth.DefaultLifetime {
		t.Errorf("CreateToken() = %+v; want a secret, by first, for %s", made, auth.DefaultLifetime)
	}
	ci := api.NewClient(url, made.Secret, nil)
	b, err := ci.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: "17800.66.78", Board: "lakitu", Driver: "550.54.15", Flavour: "open"})
	check(t, err)
	if _, err := ci.Cancel(t.Context(), b.ID); !fault.Is(err, fault.Forbidden) {
		t.Errorf("Cancel() by ci = %v; want forbidden", err)
	}
	_, err = first.UpdateBuild(t.Context(), b.ID,
		api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Phase: "compile"})
	check(t, err)
	check(t, first.AppendBuildLog(t.Context(), b.ID, 0, []byte("x")))
	check(t, first.PutBuildLog(t.Context(), b.ID, strings.NewReader("x")))
	check(t, first.RevokeToken(t.Context(), made.ID))
	if _, err := ci.Announce(t.Context(), "17800.66.78"); !fault.Is(err, fault.Unauthorized) ||
		!strings.Contains(err.Error(), "revoked") {
		t.Errorf("Announce() with a revoked token = %v; want unauthorized, revoked", err)
	}
	all, err := first.Audit(t.Context(), "")
	check(t, err)
	var got []string
	for _, e := range all {
		if e.Request == "" || e.Source == "" || time.Since(e.At) > time.Hour {
			t.Errorf("entry %+v lacks its request, source or time", e)
		}
		got = append(got, fmt.Sprintf("%s %s %s %d", e.Actor, e.Method, e.Path, e.Status))
	}
	want := []string{
		"first DELETE /v1/tokens/" + made.ID + " 204",
		fmt.Sprintf("token:ci POST /v1/builds/%d/cancel 403", b.ID),
		"token:ci POST /v1/builds 202",
		"first POST /v1/tokens 201",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("audit log (-want +got):\n%s", diff)
	}
	if mine, err := first.Audit(t.Context(), "token:ci"); err != nil || len(mine) != 2 {
		t.Errorf("Audit(token:ci) = %d entries, %v; want 2", len(mine), err)
	}
	tokens, err := first.Tokens(t.Context())
	check(t, err)
	if len(tokens) != 1 || tokens[0].Secret != "" || tokens[0].UsedAt == nil || tokens[0].RevokedAt == nil {
		t.Errorf("Tokens() = %+v; want one, used, revoked, without its secret", tokens)
	}
	check(t, db.TrimAudit(t.Context(), time.Now()))
	if all, err := first.Audit(t.Context(), ""); err != nil || len(all) != 0 {
		t.Errorf("Audit() after a trim = %d entries, %v; want none", len(all), err)
	}
}

// TestPush checks that a message of Cloud Pub/Sub about a COS build starts a lookup. Any other message must get status
// 204. Otherwise Pub/Sub would send the message again.
func TestPush(t *testing.T) {
	t.Parallel()
	url := serve(t)
	push := func(body string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/v1/releases/push", strings.NewReader(body))
		check(t, err)
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		check(t, err)
		check(t, resp.Body.Close())
		return resp.StatusCode
	}
	around := `{"message": {"attributes": {%s}, "messageId": "1", "publishTime": "2026-11-01T00:00:00Z"}, "subscription": "s"}`
	if got := push(fmt.Sprintf(around,
		`"eventType": "OBJECT_FINALIZE", "objectId": "readme.txt"`)); got != http.StatusNoContent {
		t.Errorf("push about no build = %d; want 204", got)
	}
	// This server has no mirror, so the lookup fails.
	if got := push(fmt.Sprintf(around, `"buildId": "17800.66.78"`)); got != http.StatusUnprocessableEntity {
		t.Errorf("push about a build = %d; want 422", got)
	}
}

// TestClientRate checks the answer after too many calls from one IP address. Calls from another address must still be
// answered.
func TestClientRate(t *testing.T) {
	t.Parallel()
	h := httpapi.New(httpapi.Config{Auth: auth.New(auth.Config{}), CallsPerMinute: 3, Log: slog.New(slog.DiscardHandler),
		Pages: http.NotFoundHandler(), PageRoutes: web.Routes})
	ask := func(from string) (int, string) {
		r := httptest.NewRequest(http.MethodGet, "/openapi.json", nil)
		r.RemoteAddr = from
		out := httptest.NewRecorder()
		h.ServeHTTP(out, r)
		return out.Code, out.Header().Get("Retry-After")
	}
	for i := range 3 {
		if code, _ := ask(fmt.Sprintf("192.0.2.1:%d", 1000+i)); code != http.StatusOK {
			t.Errorf("call %d = %d; want 200", i+1, code)
		}
	}
	if code, wait := ask("192.0.2.1:2000"); code != http.StatusTooManyRequests || wait == "" {
		t.Errorf("fourth call in a minute = %d, Retry-After %q; want 429 and a time", code, wait)
	}
	if code, _ := ask("192.0.2.2:1000"); code != http.StatusOK {
		t.Errorf("call of another address = %d; want 200", code)
	}
}
