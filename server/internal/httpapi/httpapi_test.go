package httpapi_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/httpapi"
	"github.com/prebake/prebake/server/internal/ocistore"
	"github.com/prebake/prebake/server/internal/store"
	"github.com/prebake/prebake/server/internal/web"
)

const token = "0123456789abcdef"

// serve starts the whole server, without discovery, in a temporary folder. It returns the server's address.
func serve(t *testing.T) string {
	t.Helper()
	url, _ := serveLogging(t, slog.New(slog.DiscardHandler))
	return url
}

func serveLogging(t testing.TB, log *slog.Logger, change ...func(*catalogue.Config)) (string, *store.Store) {
	t.Helper()
	parts, db := open(t, log, change...)
	s := httptest.NewServer(httpapi.New(parts))
	t.Cleanup(s.Close) // runs before the cleanups of its parts
	return s.URL, db
}

// open makes all parts that the HTTP handler needs, in a temporary folder.
func open(t testing.TB, log *slog.Logger, change ...func(*catalogue.Config)) (httpapi.Config, *store.Store) {
	t.Helper()
	dir := t.TempDir()
	db, err := store.Open(t.Context(), "sqlite://"+filepath.Join(dir, "catalogue.db"))
	check(t, err)
	q, err := queue.Open(t.Context(), "sqlite://"+filepath.Join(dir, "queue.db"))
	check(t, err)
	logs, err := store.OpenLogs(filepath.Join(dir, "logs"))
	check(t, err)
	registry, err := ocistore.Open(filepath.Join(dir, "registry"), ocistore.Options{})
	check(t, err)
	config := catalogue.Config{Store: db, Logs: logs, Queue: q, Repository: "/prebake/driver", Log: log}
	for _, f := range change {
		f(&config)
	}
	cat := catalogue.New(config)
	pages, err := web.New(web.Config{Catalogue: cat, Log: log})
	check(t, err)
	who := auth.New(auth.Config{First: token, Tokens: db})
	t.Cleanup(func() { check(t, errors.Join(registry.Close(), logs.Close(), q.Close(), db.Close())) })
	return httpapi.Config{Catalogue: cat, Store: db, Queue: q, Auth: who, Access: db, Version: "test",
		BuildsPerHour: 2, Log: log, Registry: ocistore.Handler(registry, who, log), Pages: pages, PageRoutes: web.Routes}, db
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestFollowLog reads a log while a builder writes it.
func TestFollowLog(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c := api.NewClient(serve(t), token, nil)
	b, err := c.RequestBuild(ctx,
		api.BuildRequest{BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
	check(t, err)
	if err := c.AppendBuildLog(ctx, b.ID, 0, []byte("x")); !fault.Is(err, fault.Mismatch) {
		t.Errorf("AppendBuildLog() to a build that waits = %v; want mismatch", err)
	}
	_, err = c.UpdateBuild(ctx, b.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
	check(t, err)
	out, done := newLines(), make(chan error, 1)
	go func() { done <- api.FollowLog(ctx, c, b.ID, time.Millisecond, out) }()
	check(t, c.AppendBuildLog(ctx, b.ID, 0, []byte("one\n")))
	out.wait(t, "one\n")
	check(t, c.AppendBuildLog(ctx, b.ID, 4, []byte("two\n")))
	out.wait(t, "one\ntwo\n")
	if err := c.AppendBuildLog(ctx, b.ID, 8, make([]byte, api.MaxLiveLogPart+1)); !fault.Is(err, fault.TooLarge) {
		t.Errorf("AppendBuildLog() of too much = %v; want too-large", err)
	}
	// The next attempt must begin a new log.
	_, err = c.UpdateBuild(ctx, b.ID, api.BuildUpdate{State: api.Queued, Class: "transient", Error: "x"})
	check(t, err)
	_, err = c.UpdateBuild(ctx, b.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 2})
	check(t, err)
	check(t, c.AppendBuildLog(ctx, b.ID, 0, []byte("a\n")))
	out.wait(t, "one\ntwo\na\n")
	check(t, c.PutBuildLog(ctx, b.ID, strings.NewReader("a\nb\n")))
	_, err = c.UpdateBuild(ctx, b.ID, api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "x"})
	check(t, err)
	check(t, <-done)
	out.wait(t, "one\ntwo\na\nb\n")
}

// lines collects written text. A test can wait until a text was written.
type lines struct {
	mu   sync.Mutex
	text string
	more chan struct{}
}

func newLines() *lines { return &lines{more: make(chan struct{}, 1)} }

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(p)
	select {
	case l.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (l *lines) wait(t *testing.T, want string) {
	t.Helper()
	for {
		l.mu.Lock()
		text := l.text
		l.mu.Unlock()
		if text == want {
			return
		}
		if !strings.HasPrefix(want, text) {
			t.Fatalf("what was written is %q; want %q", text, want)
		}
		select {
		case <-l.more:
		case <-t.Context().Done():
			t.Fatalf("what was written is %q; want %q", text, want)
		}
	}
}

var (
	finger = target.Fingerprint("sha256:" + strings.Repeat("a", 64))
	digest = "sha256:" + strings.Repeat("c", 64)
)

// TestClient makes a build and follows it to its end with the typed client.
func TestClient(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	url := serve(t)
	c := api.NewClient(url+"/", token, nil)
	b, err := c.RequestBuild(ctx,
		api.BuildRequest{BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
	check(t, err)
	kernel := target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Release: "6.1.0-47", Arch: target.AMD64}
	_, err = c.UpdateBuild(ctx, b.ID,
		api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Kernel: &kernel, Fingerprint: finger})
	check(t, err)
	if _, err := c.BuildLog(ctx, b.ID); !fault.Is(err, fault.NotFound) || fault.Hint(err) == "" {
		t.Errorf("BuildLog(none yet) = %v; want not-found with a hint", err)
	}
	check(t, c.PutBuildLog(ctx, b.ID, strings.NewReader("line 1\nline 2\n")))
	log, err := c.BuildLog(ctx, b.ID)
	check(t, err)
	text, err := io.ReadAll(log)
	check(t, errors.Join(err, log.Close()))
	if string(text) != "line 1\nline 2\n" {
		t.Errorf("BuildLog() = %q", text)
	}
	done, err := c.UpdateBuild(ctx, b.ID, api.BuildUpdate{State: api.Published, Digest: digest,
		Repository: strings.TrimPrefix(url, "http://") + "/prebake/driver"}) // a repository of this server
	check(t, err)
	read, err := c.Build(ctx, b.ID)
	check(t, err)
	if d := cmp.Diff(done, read); d != "" || read.State != api.Published || read.Kernel != kernel {
		t.Errorf("Build() after publishing (-update +read):\n%s%+v", d, read)
	}
	question := api.Question{BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03"}
	r, err := c.Resolve(ctx, question)
	check(t, err)
	if r.State != api.Published || r.Digest != digest || r.Repository != "/prebake/driver" ||
		r.Driver.Flavour != target.Open {
		t.Errorf("Resolve() = %+v; want the published artifact", r)
	}
	_, err = c.AddArtifact(ctx, api.NewArtifact{Digest: digest, Fingerprint: finger, Driver: done.Driver,
		Kernels: []target.Kernel{{BuildID: "17800.1.47", Board: "lakitu"}}})
	check(t, err)
	a, err := c.Yank(ctx, digest, api.YankRequest{Reason: "panics"})
	check(t, err)
	if a.State != api.Yanked || len(a.Kernels) != 2 {
		t.Errorf("Yank() = %+v; want yanked, for two kernels", a)
	}
	if r, err = c.Resolve(ctx, question); err != nil || r.State != api.Yanked || r.Reason != "panics" {
		t.Errorf("Resolve() = %s %q, %v; want yanked", r.State, r.Reason, err)
	}
	a, err = c.Unyank(ctx, digest)
	if err != nil || a.State != api.Published {
		t.Errorf("Unyank() = %s, %v", a.State, err)
	}
	if all, err := c.Kernels(ctx); err != nil || len(all) != 2 {
		t.Errorf("Kernels() = %d, %v; want the kernel of the build, and the kernel of the artifact", len(all), err)
	}
	for what, n := range map[string]func() (int, error){
		"artifacts": func() (int, error) { all, err := c.Artifacts(ctx); return len(all), err },
		"builds":    func() (int, error) { all, err := c.Builds(ctx, ""); return len(all), err },
		"published": func() (int, error) { all, err := c.Builds(ctx, api.Published); return len(all), err },
	} {
		if got, err := n(); err != nil || got != 1 {
			t.Errorf("list of %s has %d, %v; want 1", what, got, err)
		}
	}
	if all, err := c.Drivers(ctx); err != nil || all == nil || len(all) != 0 {
		t.Errorf("Drivers() = %#v, %v; want an empty list", all, err)
	}
	refusals := map[string]struct {
		err  error
		want fault.Kind
	}{
		"no such build": {second(c.Build(ctx, 999)), fault.NotFound},
		"bad state":     {second(c.Builds(ctx, "odd")), fault.Usage},
		"bad kernel":    {second(c.Resolve(ctx, api.Question{BuildID: "x", Board: "y"})), fault.Usage},
		"yank of nothing": {second(c.Yank(ctx, "sha256:"+strings.Repeat("0", 64), api.YankRequest{Reason: "x"})),
			fault.NotFound},
		"final state":    {second(c.UpdateBuild(ctx, b.ID, api.BuildUpdate{State: api.Queued})), fault.Mismatch},
		"log of nothing": {c.PutBuildLog(ctx, 999, strings.NewReader("x")), fault.NotFound},
		"no token":       {second(api.NewClient(url, "", nil).RequestBuild(ctx, api.BuildRequest{})), fault.Unauthorized},
		"wrong token": {api.NewClient(url, "wrong", nil).PutBuildLog(ctx, b.ID, strings.NewReader("x")),
			fault.Unauthorized},
		"nobody there": {second(api.NewClient("http://127.0.0.1:1", "", nil).Kernels(ctx)), fault.Transient},
		"no URL":       {second(api.NewClient("::", "", nil).Kernels(ctx)), fault.Usage},
	}
	for name, row := range refusals {
		if !fault.Is(row.err, row.want) {
			t.Errorf("%s: %v; want %v", name, row.err, row.want)
		}
	}
}

// TestFailuresAreLogged checks that the server's own errors are logged, for routes of the API's description and for
// others.
func TestFailuresAreLogged(t *testing.T) {
	t.Parallel()
	var said bytes.Buffer
	url, db := serveLogging(t, slog.New(slog.NewTextHandler(&said, nil)))
	check(t, db.Close())
	for _, path := range []string{"/v1/kernels", "/v1/builds/1/log"} {
		said.Reset()
		resp, err := http.Get(url + path)
		check(t, err)
		check(t, resp.Body.Close())
		if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(said.String(), "database is closed") ||
			!strings.Contains(said.String(), path) {
			t.Errorf("GET %s without a database = %s, logged %q; want 503 and the cause", path, resp.Status, said.String())
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestRoutes checks status, media type and access of single routes.
func TestRoutes(t *testing.T) {
	t.Parallel()
	url := serve(t)
	problem, text, html := "application/problem+json", "text/plain; charset=utf-8", "text/html; charset=utf-8"
	rows := []struct {
		name, method, path, auth, body string
		status                         int
		kind                           string
		contains                       string
	}{
		{"health", "GET", "/healthz", "", "", 200, text, "ok"},
		{"readiness", "GET", "/readyz", "", "", 200, text, "ok"},
		{"metrics", "GET", "/metrics", "", "", 200, "", `prebake_queue_jobs{state="running"} 0`},
		{"API description", "GET", "/openapi.json", "", "", 200, "application/openapi+json", `"request-build"`},
		{"no documentation page from elsewhere", "GET", "/docs", "", "", 404, problem, `"hint"`},
		{"page", "GET", "/", "", "", 200, html, "Which driver is ready"},
		{"style", "GET", "/assets/style.css", "", "", 200, "text/css; charset=utf-8", "prefers-color-scheme"},
		{"build page of nothing", "GET", "/builds/9", "", "", 404, html, "build 9 does not exist"},
		{"empty list", "GET", "/v1/kernels", "", "", 200, "application/json", "[]"},
		{"no such route", "GET", "/v1/nothing", "", "", 404, problem, `"kind":"not-found"`},
		{"wrong method", "DELETE", "/v1/kernels", "", "", 405, problem, `"hint"`},
		{"question without kernel", "GET", "/v1/resolve", "", "", 400, problem, "BUILD_ID"},
		{"build without number", "GET", "/v1/builds/x", "", "", 400, problem, "path.id"},
		{"log without number", "GET", "/v1/builds/x/log", "", "", 400, problem, "not a number"},
		{"write without token", "POST", "/v1/builds", "", `{}`, 401, problem, "token"},
		{"write with a wrong token", "POST", "/v1/builds", "Bearer x", `{}`, 401, problem, "token"},
		{"log without token", "PUT", "/v1/builds/1/log", "", "x", 401, problem, "token"},
		{"artifact without token", "POST", "/v1/artifacts", "", "{}", 401, problem, "token"},
		{"update without token", "PATCH", "/v1/builds/1", "", "{}", 401, problem, "token"},
		{"yank without token", "POST", "/v1/artifacts/sha256:0/yank", "", "{}", 401, problem, "token"},
		{"unyank without token", "POST", "/v1/artifacts/sha256:0/unyank", "", "", 401, problem, "token"},
		{"body that is no JSON", "POST", "/v1/builds", "Bearer " + token, `{`, 400, problem, `"kind":"usage"`},
		{"body without a member", "POST", "/v1/builds", "Bearer " + token, `{}`, 400, problem, "required property"},
		{"body too large", "POST", "/v1/builds", "Bearer " + token, strings.Repeat(" ", 2<<20), 413, problem,
			`"kind":"too-large"`},
		{"no such artifact", "GET", "/v1/artifacts/" + digest, "", "", 404, problem, `"kind":"not-found"`},
		{"artifact by no digest", "GET", "/v1/artifacts/latest", "", "", 400, problem, "64 lower-case hex digits"},
		{"cancel without token", "POST", "/v1/builds/1/cancel", "", "", 401, problem, `"kind":"unauthorized"`},
		{"cancel of nothing", "POST", "/v1/builds/1/cancel", "Bearer " + token, "", 404, problem, `"kind":"not-found"`},
		{"scheme in lower case", "POST", "/v1/builds/1/cancel", "bearer " + token, "", 404, problem, `"kind":"not-found"`},
		{"parameter that is spelled wrong", "GET", "/v1/builds?stat=failed", "", "", 400, problem, "stat"},
		{"limit too large", "GET", "/v1/builds?limit=100000", "", "", 400, problem, "limit"},
		{"cursor that is none", "GET", "/v1/kernels?after=x", "", "", 400, problem, "cursor"},
		{"cells", "GET", "/v1/cells", "", "", 200, "application/json", "[]"},
		{"coverage", "GET", "/v1/coverage", "", "", 200, "application/json", `"milestones":[]`},
		{"warnings", "GET", "/v1/warnings", "", "", 200, "application/json", "[]"},
		{"coverage as a metric", "GET", "/metrics", "", "", 200, "", `prebake_coverage_cells{state="missing"} 0`},
		{"lift without token", "POST", "/v1/artifacts/sha256:0/lift", "", "", 401, problem, "token"},
		{"report without token", "POST", "/v1/reports", "", "{}", 401, problem, "token"},
		{"reports on nothing", "GET", "/v1/reports", "", "", 400, problem, "no artifact and no COS build is given"},
		{"quarantine", "GET", "/v1/quarantine", "", "", 200, "application/json", "[]"},
		{"head of a list", "HEAD", "/v1/kernels", "", "", 200, "application/json", ""},
		{"head of a page", "HEAD", "/", "", "", 200, html, ""},
		{"list of assets", "GET", "/assets/", "", "", 404, problem, "there is no /assets/"},
		{"registry ping wants credentials", "GET", "/v2/", "", "", 401, "application/json", "UNAUTHORIZED"},
		{"registry takes the token", "GET", "/v2/", "Bearer " + token, "", 200, "", ""},
		{"registry tells of nothing", "GET", "/v2/x/tags/list", "", "", 404, "application/json", "NAME_UNKNOWN"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			req, err := http.NewRequestWithContext(t.Context(), row.method, url+row.path, strings.NewReader(row.body))
			check(t, err)
			req.Header.Set("Content-Type", "application/json")
			if row.auth != "" {
				req.Header.Set("Authorization", row.auth)
			}
			resp, err := http.DefaultClient.Do(req)
			check(t, err)
			body, err := io.ReadAll(resp.Body)
			check(t, errors.Join(err, resp.Body.Close()))
			kind := resp.Header.Get("Content-Type")
			if resp.StatusCode != row.status || (row.kind != "" && kind != row.kind) ||
				!bytes.Contains(body, []byte(row.contains)) {
				t.Errorf("%s %s = %s %q\n%.400s\nwant %d %q with %q", row.method, row.path, resp.Status, kind, body, row.status,
					row.kind, row.contains)
			}
			if resp.StatusCode == http.StatusUnauthorized && resp.Header.Get("Www-Authenticate") == "" {
				t.Error("401 without a challenge")
			}
		})
	}
}

// TestManners checks what clients expect of any HTTP server: an error page for unknown addresses, Allow, ETag,
// compression and request IDs.
func TestManners(t *testing.T) {
	t.Parallel()
	url := serve(t)
	ask := func(method, path string, header ...string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url+path, nil)
		check(t, err)
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultTransport.RoundTrip(req) // RoundTrip does not decompress
		check(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		return resp
	}
	if r := ask("GET", "/nowhere", "Accept", "text/html,*/*"); r.StatusCode != 404 ||
		!strings.HasPrefix(r.Header.Get("Content-Type"), "text/html") {
		t.Errorf("a browser at an unknown page got %s %s; want a page with 404", r.Status, r.Header.Get("Content-Type"))
	}
	if r := ask("DELETE", "/v1/builds"); r.StatusCode != 405 || r.Header.Get("Allow") != "GET, HEAD, POST" {
		t.Errorf("DELETE /v1/builds = %s, Allow %q", r.Status, r.Header.Get("Allow"))
	}
	first := ask("GET", "/v1/kernels")
	tag := first.Header.Get("Etag")
	if r := ask("GET", "/v1/kernels", "If-None-Match", tag); tag == "" || r.StatusCode != http.StatusNotModified {
		t.Errorf("GET with the ETag %q = %s; want 304", tag, r.Status)
	}
	if r := ask("GET", "/", "Accept-Encoding", "gzip"); r.Header.Get("Content-Encoding") != "gzip" {
		t.Errorf("GET / with Accept-Encoding gzip has encoding %q", r.Header.Get("Content-Encoding"))
	}
	if r := ask("GET", "/v1/kernels", "X-Request-Id", "abc-1"); r.Header.Get("X-Request-Id") != "abc-1" {
		t.Errorf("request id = %q; want the client's", r.Header.Get("X-Request-Id"))
	}
	if r := ask("GET", "/v1/kernels", "X-Request-Id", strings.Repeat("x", 1000)); len(r.Header.Get("X-Request-Id")) > 100 {
		t.Error("the answer has the client's request id of 1000 letters; want a new id")
	}
}

// TestPages checks that a long list comes in pages, and that the client reads all pages.
func TestPages(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	const n = 2345
	check(t, db.Write(t.Context(), func(tx *store.Tx) error {
		for i := range n {
			k := api.Kernel{Kernel: target.Kernel{BuildID: fmt.Sprintf("17800.%d.%d", i/10, i%10), Board: "lakitu",
				Milestone: 109}}
			if err := tx.PutKernel(t.Context(), k); err != nil {
				return err
			}
		}
		return nil
	}))
	all, err := api.NewClient(url, "", nil).Kernels(t.Context())
	check(t, err)
	if len(all) != n || !slices.IsSortedFunc(all,
		func(a, b api.Kernel) int { return target.CompareVersions(b.BuildID, a.BuildID) }) {
		t.Errorf("the client got %d kernels, in order or not; want %d, newest first", len(all), n)
	}
	resp, err := http.Get(url + "/v1/kernels?milestone=109")
	check(t, err)
	var page []api.Kernel
	check(t, errors.Join(json.NewDecoder(resp.Body).Decode(&page), resp.Body.Close()))
	if link := resp.Header.Get("Link"); len(page) != 100 || !strings.Contains(link, "milestone=109") ||
		!strings.Contains(link, `rel="next"`) {
		t.Errorf("a page has %d kernels and the link %q; want 100 and the next page with the same filter", len(page), link)
	}
}

// TestTroubleTellsNoSecrets closes the database. Answers must not have the text of the database's error, which may name
// a user and a host.
func TestTroubleTellsNoSecrets(t *testing.T) {
	t.Parallel()
	url, db := serveLogging(t, slog.New(slog.DiscardHandler))
	check(t, db.Close())
	for _, path := range []string{"/v1/kernels", "/readyz", "/"} {
		resp, err := http.Get(url + path)
		check(t, err)
		text, err := io.ReadAll(resp.Body)
		check(t, errors.Join(err, resp.Body.Close()))
		if resp.StatusCode != http.StatusServiceUnavailable || strings.Contains(string(text), "database") {
			t.Errorf("GET %s = %s %.200s; want 503 without the error of the database", path, resp.Status, text)
		}
	}
}
