package web_test

import (
	"context"
	"io"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
	"github.com/prebake/prebake/server/internal/web"
)

// shelf answers from what it holds.
type shelf struct {
	matrix catalogue.Matrix
	next   string
	builds []api.Build
	err    error
}

func (s *shelf) Matrix(_ context.Context, _ store.KernelFilter, p store.Page) (*catalogue.Matrix, error) {
	m := s.matrix
	if p.After == "" {
		m.Next = s.next
	}
	return &m, s.err
}
func (s *shelf) Artifact(_ context.Context, digest string) (api.Artifact, error) {
	for _, a := range s.matrix.Artifacts {
		if a.Digest == digest {
			return a, s.err
		}
	}
	return api.Artifact{}, fault.New(fault.NotFound, "artifact is not there", "")
}
func (s *shelf) Builds(context.Context, store.BuildFilter, store.Page) ([]api.Build, string, error) {
	return s.builds, "", s.err
}
func (s *shelf) Build(_ context.Context, id int64) (api.Build, error) {
	for _, b := range s.builds {
		if b.ID == id {
			return b, s.err
		}
	}
	return api.Build{}, fault.New(fault.NotFound, "build is not there", "list builds")
}

func get(t *testing.T, s *shelf, path string) (int, string) {
	t.Helper()
	h, err := web.New(s, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "http://prebake.example"+path, nil))
	raw, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, string(raw)
}

func TestPages(t *testing.T) {
	t.Parallel()
	k := target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Milestone: 109, Release: "6.1.0-47"}
	d := target.Driver{Version: "535.261.03", Flavour: target.Open}
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	failed := api.Build{ID: 7, Kernel: k, Driver: d, State: api.Failed, Class: "api-break", Error: "a.c:1: error: <b>too few</b>",
		Hint: "newer driver", CreatedAt: noon, Phases: []timeline.Phase{{Name: "compile", Seconds: 1.5, Failed: true}}}
	published := api.Build{ID: 8, Kernel: k, Driver: d, State: api.Published, Digest: "sha256:ab", CreatedAt: noon}
	full := &shelf{
		matrix: catalogue.Matrix{
			Kernels: []api.Kernel{{Kernel: k, Fingerprint: "sha256:0123456789abcdef"}},
			Drivers: []api.DriverRelease{{Version: d.Version, Branch: "R535"}},
			Cells: [][][]api.Resolution{{{
				{Kernel: k, Driver: target.Driver{Version: d.Version, Flavour: target.Proprietary}, State: api.Published, Digest: "sha256:ab"},
				{Kernel: k, Driver: d, State: api.Failed, Build: &failed},
			}}},
			Artifacts: []api.Artifact{
				{Digest: "sha256:ab", Repository: "/prebake/driver", State: api.Published, Driver: d, Kernels: []target.Kernel{k}, PublishedAt: noon},
				{Digest: "sha256:cd", Repository: "ghcr.io/x/y", State: api.Yanked, Reason: "panics", Driver: d, Kernels: []target.Kernel{k}, PublishedAt: noon},
			},
		},
		next:   "cursor",
		builds: []api.Build{published, failed},
	}
	hostile := &shelf{matrix: catalogue.Matrix{
		Kernels: []api.Kernel{{Kernel: k}},
		Drivers: []api.DriverRelease{{Version: d.Version}},
		Cells: [][][]api.Resolution{{{{Kernel: k, State: `<i>"`, Reason: `<i>"`, Build: &failed,
			Driver: target.Driver{Version: `<i>"`, Flavour: `<i>"`}}}}},
		Artifacts: []api.Artifact{{Digest: `<i>"`, Repository: `<i>"`, Reason: `<i>"`, State: `<i>"`, Arch: `<i>"`, Fingerprint: `<i>"`,
			Driver: target.Driver{Version: `<i>"`, Flavour: `<i>"`}, Kernels: []target.Kernel{{BuildID: `<i>"`, Board: `<i>"`}}}},
	}}
	rows := []struct {
		name   string
		s      *shelf
		path   string
		status int
		has    []string
		lacks  []string
	}{
		{"empty matrix says the next move", &shelf{}, "/", 200, []string{"No kernel is known yet", "Nothing is published", "No build was asked for"}, nil},
		{"matrix", full, "/", 200, []string{`<th scope="row">17800.0.47`, `<th scope="col">535.261.03`, `href="#sha256-ab"`, `href="/builds/7"`, "✓", "✗",
			"crane pull prebake.example/prebake/driver@sha256:ab driver.tar", "panics", "abi <code>0123456789ab</code>", `<a href="/?after=cursor" rel="next">Older kernels`},
			[]string{"<b>too few", "crane pull ghcr.io", "<script"}},
		{"what cells and artifacts say is text, not HTML", hostile, "/", 200, []string{"&lt;i&gt;&#34;", `href="/builds/7"`}, []string{`<i>`}},
		{"next page", full, "/?after=cursor&board=lakitu", 200, []string{`<a href="/?board=lakitu">← Newest kernels`}, []string{"Older kernels"}},
		{"filter that is none", full, "/?milestone=x", 400, []string{"is not a number"}, nil},
		{"the folder of assets is not listed", full, "/assets/", 404, []string{"no such page"}, []string{"style.css<"}},
		{"failed build", full, "/builds/7", 200, []string{"api-break", "&lt;b&gt;too few", "newer driver", "1.50", "(failed)", "/v1/builds/7/log"}, []string{"<b>too few"}},
		{"published build", full, "/builds/8", 200, []string{"prebake.example/prebake/driver@sha256:ab"}, []string{"Why it failed"}},
		{"no such build", full, "/builds/9", 404, []string{"build is not there", "list builds"}, nil},
		{"not a number", full, "/builds/x", 404, []string{"no such build"}, nil},
		{"trouble", &shelf{err: fault.New(fault.Transient, "catalogue is away", "")}, "/", 503, []string{"cannot answer right now"}, []string{"catalogue is away"}},
		{"trouble of ours is not shown", &shelf{err: io.ErrUnexpectedEOF}, "/", 500, []string{"its log has the cause"}, []string{"unexpected EOF"}},
		{"no other page", full, "/other", 404, nil, nil},
	}
	for _, row := range rows {
		status, body := get(t, row.s, row.path)
		if status != row.status {
			t.Errorf("%s: GET %s = %d; want %d", row.name, row.path, status, row.status)
		}
		for _, want := range row.has {
			if !strings.Contains(body, want) {
				t.Errorf("%s: the page lacks %q", row.name, want)
			}
		}
		for _, bad := range row.lacks {
			if strings.Contains(body, bad) {
				t.Errorf("%s: the page has %q", row.name, bad)
			}
		}
	}
}
