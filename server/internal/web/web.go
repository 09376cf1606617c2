// Package web is the server's pages for people: the matrix of kernels and
// drivers, and one page for each build. They are made of templates and one
// style sheet, all embedded. It refuses scripts, anything from other hosts, and
// to change anything.
package web

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

//go:embed pages/*.html assets/*
var files embed.FS

// reader is what the pages read; package catalogue has it.
type reader interface {
	Matrix(ctx context.Context, f store.KernelFilter, p store.Page) (*catalogue.Matrix, error)
	Artifact(ctx context.Context, digest string) (api.Artifact, error)
	Builds(ctx context.Context, f store.BuildFilter, p store.Page) ([]api.Build, string, error)
	Build(ctx context.Context, id int64) (api.Build, error)
}

type pages struct {
	reader reader
	log    *slog.Logger
	tmpl   *template.Template
}

// New returns the pages /, /builds/{id} and /assets/.
func New(r reader, log *slog.Logger) (http.Handler, error) {
	tmpl, err := template.New("").Funcs(template.FuncMap{
		"mark":  mark,
		"label": label,
		"short": short,
		"when":  when,
		"date":  date,
		"secs":  func(s float64) string { return strconv.FormatFloat(s, 'f', 2, 64) },
	}).ParseFS(files, "pages/*.html")
	if err != nil {
		return nil, fmt.Errorf("parse pages: %w", err)
	}
	p := &pages{reader: r, log: log, tmpl: tmpl}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.matrix)
	mux.HandleFunc("GET /builds/{id}", p.build)
	mux.Handle("GET /assets/{name}", cached(http.FileServerFS(files))) // files only: no list of the folder
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		p.fail(w, r, fault.New(fault.NotFound, "there is no such page", "begin at the matrix"))
	})
	return mux, nil
}

func cached(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "public, max-age=300")
		next.ServeHTTP(w, r)
	})
}

// mark is a sign for a state, for readers who do not see the colours.
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

// label is a state in the words of the page.
func label(s api.State) string {
	if s == api.Unknown {
		return "not built"
	}
	return string(s)
}

func when(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// short cuts a digest or fingerprint to what people compare at a glance.
func short(v any) string {
	text := strings.TrimPrefix(fmt.Sprint(v), "sha256:")
	return text[:min(12, len(text))]
}

// legend explains the states in the order of a build's life.
type legend struct {
	State api.State
	Text  string
}

type matrixPage struct {
	*catalogue.Matrix
	Rows      []row
	Legend    []legend
	Artifacts template.HTML // see cards
	Recent    []api.Build
	// Older leads to the next page, Newest to the first; "" when this is it.
	Older, Newest string
}

type row struct {
	Kernel api.Kernel
	Cells  template.HTML // see cells
}

// Bounds of the first page.
const (
	maxRecent = 12 // builds
	maxRows   = 20 // kernels
)

func (p *pages) matrix(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	filter := store.KernelFilter{Board: query.Get("board")}
	if m := query.Get("milestone"); m != "" {
		n, err := strconv.Atoi(m)
		if err != nil {
			p.fail(w, r, fault.New(fault.Usage, fmt.Sprintf("milestone %.20q is not a number", m), "write one such as 109"))
			return
		}
		filter.Milestone = n
	}
	m, err := p.reader.Matrix(r.Context(), filter, store.Page{After: query.Get("after"), Limit: maxRows})
	if err != nil {
		p.fail(w, r, err)
		return
	}
	recent, _, err := p.reader.Builds(r.Context(), store.BuildFilter{}, store.Page{Limit: maxRecent})
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := matrixPage{Matrix: m, Recent: recent, Legend: []legend{
		{api.Published, "signed and ready to install"},
		{api.Building, "a builder works on it"},
		{api.Queued, "waits for a builder"},
		{api.Failed, "the last build failed; its page says how"},
		{api.Yanked, "withdrawn, do not use"},
		{api.Quarantined, "did not load on several nodes"},
		{api.Cancelled, "called off"},
		{api.Unsupported, "cannot be built"},
		{api.Unknown, "nobody asked for it yet"},
	}}
	if query.Has("after") {
		query.Del("after")
		page.Newest = "/?" + query.Encode()
	}
	if m.Next != "" {
		query.Set("after", m.Next)
		page.Older = "/?" + query.Encode()
	}
	for i, k := range m.Kernels {
		page.Rows = append(page.Rows, row{k, cells(k, m.Cells[i])})
	}
	page.Artifacts = cards(r.Host, m.Artifacts)
	p.render(w, r, http.StatusOK, "matrix.html", page)
}

func link(c api.Resolution) string {
	switch {
	case c.State == api.Published || c.State == api.Yanked && c.Digest != "":
		return "#" + anchor(c.Digest)
	case c.Build != nil:
		return "/builds/" + strconv.FormatInt(c.Build.ID, 10)
	}
	return ""
}

func anchor(digest string) string { return strings.ReplaceAll(digest, ":", "-") }

func why(k api.Kernel, c api.Resolution) string {
	text := k.String() + ", driver " + c.Driver.String() + ": " + label(c.State)
	if c.Reason != "" {
		text += ". " + c.Reason
	}
	return text
}

// reference is what a stock client pulls. A repository without a host is on
// this server, under the name that the reader reached it by.
func reference(host string, a api.Artifact) string {
	repo := a.Repository
	if strings.HasPrefix(repo, "/") {
		repo = host + repo
	}
	return repo + "@" + a.Digest
}

type buildPage struct {
	api.Build
	Ref, Total string
	HasLog     bool
}

func (p *pages) build(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		p.fail(w, r, fault.New(fault.NotFound, "there is no such build", ""))
		return
	}
	b, err := p.reader.Build(r.Context(), id)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := buildPage{Build: b, HasLog: b.State == api.Failed || b.State == api.Published}
	page.Total = strconv.FormatFloat(timeline.Total(b.Phases), 'f', 2, 64)
	if b.Digest != "" {
		a, err := p.reader.Artifact(r.Context(), b.Digest)
		if err != nil && !fault.Is(err, fault.NotFound) {
			p.fail(w, r, err)
			return
		}
		if err == nil {
			page.Ref = reference(r.Host, a)
		}
	}
	p.render(w, r, http.StatusOK, "build.html", page)
}

type failPage struct{ Title, Text, Hint string }

func (p *pages) fail(w http.ResponseWriter, r *http.Request, err error) {
	kind := fault.Of(err)
	page := failPage{Title: kind.What(), Text: err.Error(), Hint: fault.Hint(err)}
	if kind.HTTPStatus() >= http.StatusInternalServerError {
		page.Text, page.Hint = "The server cannot answer right now; its log has the cause.", ""
		p.log.ErrorContext(r.Context(), "page failed", "path", r.URL.Path, "err", err)
	}
	p.render(w, r, kind.HTTPStatus(), "fail.html", page)
}

// render makes the whole page first: half a page would look like an answer.
func (p *pages) render(w http.ResponseWriter, r *http.Request, status int, name string, data any) {
	var out bytes.Buffer
	if err := p.tmpl.ExecuteTemplate(&out, name, data); err != nil {
		p.log.ErrorContext(r.Context(), "page not rendered", "path", r.URL.Path, "err", err)
		http.Error(w, "internal error; the server's log has the cause", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = out.WriteTo(w) // the client is gone; there is nobody to tell
}
