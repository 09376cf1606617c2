// Package web has the server's web pages, for example the matrix, the cells, the queue and the releases. Every page can
// be read without the script. The pages change nothing, and load nothing from other hosts.
package web

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

//go:embed pages/*.html assets/*
var files embed.FS

// reader reads the data of the pages. [catalogue.Catalogue] implements it.
type reader interface {
	Matrix(ctx context.Context, f store.KernelFilter, d catalogue.DriverFilter, p store.Page) (*catalogue.Matrix, error)
	View(ctx context.Context, buildID, board, version string) (*catalogue.CellView, error)
	Build(ctx context.Context, id int64) (api.Build, error)
	OpenLog(ctx context.Context, id int64) (io.ReadSeekCloser, int64, error)
	Artifact(ctx context.Context, digest string) (api.Artifact, error)
	Workload(ctx context.Context) (*catalogue.Workload, error)
	Releases(ctx context.Context, f store.KernelFilter, p store.Page) ([]api.ReleaseSummary, string, error)
	RecentReadyTimes(ctx context.Context) (api.ReadyDuration, error)
	Groups(ctx context.Context) ([]store.KernelGroup, error)
	Coverage(ctx context.Context) (api.Coverage, error)
	Preflight(ctx context.Context, q api.PreflightRequest) (api.Preflight, error)
	Resolve(ctx context.Context, buildID, board, driver, flavour, release string) (api.Resolution, error)
	Newest(ctx context.Context, n int) ([]catalogue.News, error)
	Warnings(ctx context.Context) ([]api.Warning, error)
}

// labeller returns the labels of at most n attachments of an artifact in this server's registry.
type labeller interface {
	Labels(ctx context.Context, repo, digest string, n int) ([]map[string]string, error)
}

// Config has the parts and settings of the pages.
type Config struct {
	Catalogue reader
	// Registry returns the labels of attachments. If it is nil, the pages do not describe them.
	Registry labeller
	Log      *slog.Logger
	// Now returns the current time. nil means time.Now.
	Now func() time.Time
}

type pages struct {
	Config
	tmpl *template.Template
}

// Routes has the paths of the pages, as patterns for chi and [http.ServeMux].
var Routes = []string{
	"/", "/cells/{board}/{build}/{driver}", "/cells/{board}/{build}/{driver}/{flavour}", "/builds/{id}", "/queue",
	"/releases", "/preflight", "/warnings", "/feed.atom", "/badge.svg", "/assets/{name}",
}

// New returns the handler of the pages.
func New(c Config) (http.Handler, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &pages{Config: c}
	var err error
	p.tmpl, err = template.New("").Funcs(template.FuncMap{
		"mark": mark, "label": label, "short": short, "when": when, "date": date, "took": formatSeconds, "ago": p.ago,
		"dict": dict, "inc": func(n int) int { return n + 1 }, "add": func(a, b int) int { return a + b },
	}).ParseFS(files, "pages/*.html")
	if err != nil {
		return nil, fmt.Errorf("parse pages: %w", err)
	}
	mux := http.NewServeMux()
	handlers := []http.HandlerFunc{
		p.matrix, p.cell, p.cell, p.build, p.queue, p.releases, p.preflight, p.warnings, p.feed, p.badge,
		cached(http.FileServerFS(files)), // serves files only, and no list of the folder
	}
	for i, h := range handlers {
		path := Routes[i]
		if path == "/" {
			path = "/{$}"
		}
		mux.Handle("GET "+path, h)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		p.fail(
			w,
			r,
			fault.New(fault.NotFound, "there is no such page", "start at the matrix, or use the links above"),
		)
	})
	return mux, nil
}

func cached(next http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "public, max-age=300")
		next.ServeHTTP(w, r)
	}
}

// head has the fields that every page needs.
type head struct {
	// Title is the window's title. Here is the path of the current page in the menu.
	Title, Here string
	// Live is the address of a stream of server-sent events about the page. If Refresh is true, the browser reloads the
	// page every 15 seconds, unless the script reads that stream.
	Live    string
	Refresh bool
}

// dict returns the data that one template passes to another, from names and values in turn.
func dict(pairs ...any) map[any]any {
	out := map[any]any{}
	for i := 0; i+1 < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}

// mark returns a symbol for a state, for readers who do not see the colours.
func mark(s api.State) string {
	switch s {
	case api.Published:
		return "✓"
	case api.Building:
		return "⚙"
	case api.Queued:
		return "…"
	case api.Failed:
		return "✗"
	case api.Yanked, api.Quarantined:
		return "⊘"
	case api.Unsupported, api.Cancelled:
		return "–"
	}
	return "·"
}

// label returns the word that the pages show for a state.
func label(s api.State) string {
	if s == api.Unknown {
		return "not built"
	}
	return string(s)
}

func when(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// formatSeconds formats a duration in seconds for a person.
func formatSeconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	switch {
	case d < 10*time.Second:
		return strconv.FormatFloat(s, 'f', 1, 64) + " s"
	case d < 2*time.Minute:
		return strconv.Itoa(int(s+.5)) + " s"
	case d < 2*time.Hour:
		return strconv.Itoa(int(d.Minutes()+.5)) + " min"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours()+.5)) + " h"
	}
	return strconv.Itoa(int(d.Hours()/24+.5)) + " days"
}

// ago returns how long ago a time was, or how far in the future it is.
func (p *pages) ago(t time.Time) string {
	d := p.Now().Sub(t)
	switch {
	case d < 0:
		return "in " + formatSeconds((-d).Seconds())
	case d < time.Second:
		return "now"
	}
	return formatSeconds(d.Seconds()) + " ago"
}

// short shortens a digest or fingerprint to the part that people compare.
func short(v any) string {
	text := strings.TrimPrefix(fmt.Sprint(v), "sha256:")
	return text[:min(12, len(text))]
}

// base returns the address by which the reader reached the server.
func base(r *http.Request) string {
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	return scheme + "://" + r.Host
}

// plain reports whether OCI clients need a flag because this server has no TLS. They need none for a loopback address.
func plain(r *http.Request) bool {
	if strings.HasPrefix(base(r), "https:") {
		return false
	}
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	return host != "localhost" && !net.ParseIP(strings.Trim(host, "[]")).IsLoopback()
}

// reference returns an artifact's reference for OCI clients. A repository of this server gets the given host.
func reference(host, repository, digest string) string {
	if strings.HasPrefix(repository, "/") {
		repository = host + repository
	}
	return repository + "@" + digest
}

type failPage struct {
	head
	Status           int
	Kind, Text, Hint string
}

func (p *pages) fail(w http.ResponseWriter, r *http.Request, err error) {
	kind := fault.Of(err)
	page := failPage{Status: kind.HTTPStatus(), Kind: kind.What(), Text: err.Error(), Hint: fault.Hint(err)}
	page.Title = page.Kind
	if page.Status >= http.StatusInternalServerError {
		page.Text, page.Hint = "The server cannot answer right now; its log has the cause.", ""
		p.Log.ErrorContext(r.Context(), "page failed", "path", r.URL.Path, "err", err)
	}
	p.render(w, r, page.Status, "fail.html", page)
}

// render responds with a page. It makes the whole page first, because half a page would look complete.
func (p *pages) render(w http.ResponseWriter, r *http.Request, status int, name string, data any) {
	var out bytes.Buffer
	if err := p.tmpl.ExecuteTemplate(&out, name, data); err != nil {
		p.Log.ErrorContext(r.Context(), "page not rendered", "path", r.URL.Path, "err", err)
		http.Error(w, "internal error; the server's log has the cause", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = out.WriteTo(w) // an error means that the client is gone
}
