package web_test

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
	"github.com/prebake/prebake/server/internal/web"
)

// labels stands in for the registry. The attachments of every artifact have these labels.
type labels []map[string]string

func (l labels) Labels(context.Context, string, string, int) ([]map[string]string, error) {
	return l, nil
}

var (
	kernel = target.Kernel{BuildID: "17800.66.78", Board: "lakitu", Milestone: 109, Release: "6.1.58+", Arch: target.AMD64,
		Commit: strings.Repeat("1", 40)}
	finger = target.Fingerprint("sha256:" + strings.Repeat("a", 64))
	digest = "sha256:" + strings.Repeat("c", 64)
	yanked = "sha256:" + strings.Repeat("d", 64)
	noon   = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
)

// farm returns a catalogue with a real database, and the handler of its pages. Each reading of the clock advances it by
// a second.
func farm(t *testing.T) (*catalogue.Catalogue, http.Handler) {
	t.Helper()
	dir := t.TempDir()
	db, err := store.Open(t.Context(), "sqlite://"+filepath.Join(dir, "catalogue.db"))
	check(t, err)
	q, err := queue.Open(t.Context(), "sqlite://"+filepath.Join(dir, "queue.db"))
	check(t, err)
	logs, err := store.OpenLogs(filepath.Join(dir, "logs"))
	check(t, err)
	t.Cleanup(func() { check(t, errors.Join(logs.Close(), q.Close(), db.Close())) })
	now := noon
	clock := func() time.Time { now = now.Add(time.Second); return now }
	cat := catalogue.New(catalogue.Config{Store: db, Logs: logs, Queue: q, Repository: "/prebake/driver", Now: clock})
	pages, err := web.New(web.Config{Catalogue: cat, Log: slog.New(slog.DiscardHandler),
		Now: func() time.Time { return now },
		Registry: labels{
			{trust.LabelPredicate: trust.PredicateProvenance},
			{trust.LabelPredicate: trust.PredicateKernelMatch, trust.LabelKernel: kernel.String()},
			{trust.LabelPredicate: trust.PredicateKernelMatch, trust.LabelKernel: "17800.1.1/lakitu"},
			{trust.LabelPredicate: trust.PredicateTestResult, trust.LabelKernel: kernel.String(),
				trust.LabelVerdict: trust.VerdictLoaded},
		}})
	check(t, err)
	return cat, pages
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fill adds cells in several states.
func fill(t *testing.T, cat *catalogue.Catalogue) {
	t.Helper()
	ctx := t.Context()
	check(t, cat.RecordKernel(ctx, api.Kernel{Kernel: kernel, Fingerprint: finger, Default: "535.261.03"}))
	other := target.Kernel{BuildID: "18244.151.14", Board: "lakitu", Milestone: 113, Release: "6.1.90+",
		Arch: target.AMD64}
	check(t, cat.RecordKernel(ctx, api.Kernel{Kernel: other}))
	check(t, cat.RecordDrivers(ctx,
		[]api.DriverRelease{{Version: "535.261.03"}, {Version: "470.256.02"}, {Version: "550.90.07"}}))
	request := func(version, flavour string) int64 {
		b, err := cat.Request(ctx,
			api.BuildRequest{BuildID: kernel.BuildID, Board: kernel.Board, Driver: version, Flavour: flavour})
		check(t, err)
		return b.ID
	}
	update := func(id int64, u api.BuildUpdate) {
		_, err := cat.Update(ctx, id, u)
		check(t, err)
	}
	done := request("535.261.03", "open") // build 1
	update(done, api.BuildUpdate{State: api.Building, Worker: "builder-1", Attempt: 1})
	update(done, api.BuildUpdate{State: api.Published, Digest: digest, Fingerprint: finger,
		Phases: []timeline.Phase{{Name: "compile", Seconds: 41.5}}})
	failed := request("535.261.03", "proprietary") // build 2
	update(failed, api.BuildUpdate{State: api.Building, Worker: "builder-1", Attempt: 1})
	update(failed, api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "a.c:1: error: <b>too few</b>",
		Hint:   "take a newer driver",
		Phases: []timeline.Phase{{Name: "compile", Seconds: 1.5, Failed: true}}})
	check(t, cat.PutLog(ctx, failed, strings.NewReader("what went wrong\n")))
	running := request("550.90.07", "open") // build 3
	update(running, api.BuildUpdate{State: api.Building, Worker: "builder-2", Attempt: 1, Phase: "compile"})
	check(t, cat.AppendLog(ctx, running, 0, strings.NewReader(strings.Repeat("a line\n", 2000)+"cc <nv.c>\n")))
	request("550.90.07", "proprietary") // build 4
	early := target.Kernel{BuildID: "19999.0.0", Board: "lakitu", Milestone: 133, Arch: target.AMD64}
	check(t, cat.RecordKernel(ctx, api.Kernel{Kernel: early, Default: "570.86.10"}))
	_, err := cat.PutWishList(ctx, "early",
		"version: 1\nkernels:\n  - {milestone: 133, latest: 1, earlyWarning: true}\nflavours: [open]\ndrivers: [default]\n",
		0)
	check(t, err)
	_, err = cat.Plan(ctx)
	check(t, err)
	update(5, api.BuildUpdate{State: api.Building, Worker: "builder-1", Attempt: 1})
	update(5, api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "<u> earlier than out"})
	_, err = cat.AddArtifact(ctx, api.NewArtifact{Digest: yanked, Fingerprint: finger, Kernels: []target.Kernel{kernel},
		Driver: target.Driver{Version: "525.60.13", Flavour: target.Open}})
	check(t, err)
	_, err = cat.Yank(ctx, yanked, api.YankRequest{Reason: "panics <i>"})
	check(t, err)
	check(t, cat.Measure(ctx))
}

func get(t *testing.T, h http.Handler, path string) (*http.Response, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "http://prebake.example"+path, nil))
	raw, err := io.ReadAll(w.Body)
	check(t, err)
	return w.Result(), string(raw)
}

func TestPages(t *testing.T) {
	t.Parallel()
	_, empty := farm(t)
	cat, full := farm(t)
	fill(t, cat)
	cell := "/cells/lakitu/17800.66.78/"
	rows := []struct {
		name   string
		pages  http.Handler
		path   string
		status int
		has    []string
		lacks  []string
	}{
		{"empty matrix says the next move", empty, "/", 200, []string{"No kernel is known yet", "server announce"},
			[]string{"<table"}},
		{"empty queue", empty, "/queue", 200, []string{"No builder works", "Nothing waits", "builder work"}, nil},
		{"empty releases", empty, "/releases", 200, []string{"No release is known yet"}, []string{"<svg"}},
		{"matrix", full, "/", 200, []string{
			`<th scope="row">17800.66.78<small>lakitu · 6.1.58+`, `<th scope="col">535.261.03<small>R535`,
			`href="` + cell + `535.261.03"`,
			`<span class="published"><b>open</b> <em>published</em>`, `<span class="failed"><b>proprietary</b> <em>failed</em>`,
			"Milestone 113", "Milestone 109", "Show 1 more driver<", `aria-current="page">Matrix`,
		}, []string{"470.256.02", "<b>too few", "style="}},
		{"all drivers", full, "/?all=1", 200, []string{"470.256.02"}, []string{"more driver"}},
		{"a driver's branch", full, "/?driver=R550", 200, []string{`<th scope="col">550.90.07`},
			[]string{`<th scope="col">535`}},
		{"search for a driver", full, "/?q=550", 200, []string{`<th scope="col">550.90.07`, "17800.66.78"},
			[]string{`<th scope="col">535`}},
		{"search for a kernel release", full, "/?q=6.1.9", 200, []string{"18244.151.14"}, []string{"17800.66.78<"}},
		{"search for nothing known", full, "/?q=9.9", 200, []string{"No kernel is like that"},
			[]string{"<table class=\"matrix"}},
		{"search that is a pattern", full, "/?q=%25", 400, []string{"letters, digits"}, nil},
		{"kernels with a failed cell", full, "/?state=failed", 200, []string{"17800.66.78<"}, []string{"18244.151.14<"}},
		{"kernels with a yanked cell", full, "/?state=yanked", 200, []string{"17800.66.78<"}, []string{"18244.151.14<"}},
		{"kernels with a cancelled cell", full, "/?state=cancelled", 200, []string{"No kernel is like that"}, nil},
		{"state that is none", full, "/?state=x", 400, []string{"cannot be a filter"}, nil},
		{"milestone that is none", full, "/?milestone=x", 400, []string{"is not a number"}, nil},
		{"cell of both flavours", full, cell + "535.261.03", 200, []string{
			digest, "prebake.example/prebake/driver@" + digest,
			"fetcher install --server http://prebake.example --driver 535.261.03 --flavour open",
			"crane pull --insecure prebake.example", "fits the kernel of this COS build",
			"loaded in a virtual machine that ran this kernel",
			"1 other COS builds", "SLSA", "&lt;b&gt;too few", "take a newer driver", `href="/builds/2"`,
		}, []string{"<b>too few"}},
		{"cell of one flavour", full, cell + "535.261.03/proprietary", 200, []string{"&lt;b&gt;too few"}, []string{digest}},
		{"cell under way", full, cell + "550.90.07/open", 200,
			[]string{`data-live="/v1/builds/3/events"`, "is in phase compile"}, nil},
		{"cell that waits", full, cell + "550.90.07/proprietary", 200, []string{"number 1 in the queue"}, nil},
		{"cell that nobody asked for", full, cell + "470.256.02/proprietary", 200, []string{
			"server request --server http://prebake.example --token-file prebake.token --build-id 17800.66.78 --board lakitu " +
				"--driver 470.256.02 --flavour proprietary",
		}, []string{"crane"}},
		{"cell that is withdrawn", full, cell + "525.60.13/open", 200, []string{"panics &lt;i&gt;", yanked, "Withdrawn"},
			[]string{"crane pull", "<i>;"}},
		{"cell of no flavour", full, cell + "535.261.03/shut", 404, []string{"flavour"}, nil},
		{"cell of no driver", full, cell + "x", 404, []string{"find the cell in the matrix"}, nil},
		{"cell of no kernel", full, "/cells/lakitu/1.2.3/535.261.03", 404,
			[]string{"is not in the catalogue", "server announce 1.2.3"}, nil},
		{"failed build", full, "/builds/2", 200,
			[]string{"api-break", "&lt;b&gt;too few", "newer driver", "1.5 s", "(failed)", "/v1/builds/2/log"},
			[]string{"<b>too few", "data-live", "has no log"}},
		{"published build", full, "/builds/1", 200, []string{"prebake.example/prebake/driver@" + digest, "42 s",
			"This build has no log: its builder sent no log to this server."}, []string{"Next step"}},
		{"build under way", full, "/builds/3", 200,
			[]string{`data-live="/v1/builds/3/events"`, `http-equiv="refresh"`, "builder-2, attempt 1",
				`data-log="/v1/builds/3/log">a line`, "cc &lt;nv.c&gt;"}, nil},
		{"build that waits", full, "/builds/4", 200, nil, []string{"has no log"}},
		{"no such build", full, "/builds/9", 404, []string{"Status 404"}, nil},
		{"not a number", full, "/builds/x", 404, []string{"no such build"}, nil},
		{"queue", full, "/queue", 200,
			[]string{`href="/builds/3"`, `href="/builds/4"`, `<th scope="row">builder-1`, `<th scope="row">builder-2`}, nil},
		{"releases", full, "/releases", 200,
			[]string{"18244.151.14", "20.0 % of 5", "nothing asked for", "<svg class=\"chart\""}, nil},
		{"releases from nowhere", full, "/releases?after=x", 400, []string{"cursor"}, nil},
		{"preflight", full, "/preflight", 200, []string{`name="build"`, `<option>lakitu`}, []string{"Yes", "No, not yet"}},
		{"preflight: yes", full, "/preflight?build=17800.66.78&board=lakitu&driver=default", 200,
			[]string{"Yes, it may move", cell + "535.261.03/open"}, nil},
		{"preflight: no", full, "/preflight?build=17800.66.78&board=lakitu&driver=470.256.02", 200,
			[]string{"No, not yet", "server request"}, nil},
		{"preflight of nonsense", full, "/preflight?build=<x>&board=lakitu", 400, []string{"cannot be asked", "&lt;x&gt;"},
			[]string{"<x>"}},
		{"no early warning", empty, "/warnings", 200, []string{"Nothing is known to break"}, nil},
		{"early warning", full, "/warnings", 200, []string{"earlier than out", `href="/builds/5"`, "milestone 133"},
			[]string{"<u>"}},
		{"the folder of assets is not listed", full, "/assets/", 404, []string{"no such page"}, []string{"style.css<"}},
		{"no other page", full, "/other", 404, []string{"there is no such page", "To the matrix"}, nil},
		{"badge", full, "/badge.svg", 200, []string{"prebake: nothing wanted"}, nil},
		{"badge of a cell", full, "/badge.svg?build=17800.66.78&board=lakitu&driver=535&flavour=proprietary", 400, nil, nil},
		{"badge of a cell that failed", full,
			"/badge.svg?build=17800.66.78&board=lakitu&driver=535.261.03&flavour=proprietary", 200,
			[]string{"prebake: failed", "#9b1c1c"}, nil},
	}
	for _, row := range rows {
		answer, body := get(t, row.pages, row.path)
		if answer.StatusCode != row.status {
			t.Errorf("%s: GET %s = %d; want %d\n%s", row.name, row.path, answer.StatusCode, row.status, body)
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

// TestLinks follows every link between the pages. Each must lead to a page.
func TestLinks(t *testing.T) {
	t.Parallel()
	cat, pages := farm(t)
	fill(t, cat)
	link := regexp.MustCompile(`(?:href|src|action)="(/[^"#]*)`)
	seen, todo := map[string]bool{"/": true}, []string{"/"}
	for len(todo) > 0 {
		path := todo[0]
		todo = todo[1:]
		answer, body := get(t, pages, path)
		if answer.StatusCode != http.StatusOK {
			t.Errorf("GET %s = %d; a page links to it", path, answer.StatusCode)
		}
		for _, m := range link.FindAllStringSubmatch(body, -1) {
			to := strings.ReplaceAll(m[1], "&amp;", "&")
			elsewhere := strings.HasPrefix(to, "/v1/") || strings.HasPrefix(to, "/openapi") || to == "/metrics" ||
				to == "/readyz"
			if !seen[to] && !elsewhere {
				seen[to] = true
				todo = append(todo, to)
			}
		}
	}
	if len(seen) < 20 {
		t.Errorf("the pages link to %d pages; want at least 20", len(seen))
	}
}

// TestCommandsAreQuoted asks for a page by a host name with characters that a shell interprets. The commands on the
// page must quote that name.
func TestCommandsAreQuoted(t *testing.T) {
	t.Parallel()
	cat, pages := farm(t)
	fill(t, cat)
	w := httptest.NewRecorder()
	r := httptest.NewRequestWithContext(t.Context(), "GET", "http://x/cells/lakitu/17800.66.78/535.261.03/open", nil)
	r.Host = "a$(id)'b.example"
	pages.ServeHTTP(w, r)
	body := html.UnescapeString(w.Body.String())
	if want := `--server 'http://a$(id)'\''b.example' --driver`; !strings.Contains(body, want) ||
		strings.Contains(body, " a$(id)") {
		t.Errorf("the page lacks %q, or has the name without quotes:\n%s", want, body)
	}
}

// TestFeed checks that the feed has the elements that RFC 4287, section 4.1, requires of each feed and entry.
func TestFeed(t *testing.T) {
	t.Parallel()
	cat, pages := farm(t)
	fill(t, cat)
	answer, body := get(t, pages, "/feed.atom")
	if got := answer.Header.Get("Content-Type"); got != "application/atom+xml; charset=utf-8" {
		t.Errorf("Content-Type of the feed = %q", got)
	}
	type dated struct {
		ID, Title, Updated string
		Link               []struct {
			Href string `xml:"href,attr"`
		} `xml:"link"`
		Category struct {
			Term string `xml:"term,attr"`
		} `xml:"category"`
	}
	var feed struct {
		XMLName xml.Name `xml:"http://www.w3.org/2005/Atom feed"`
		dated
		Author struct {
			Name string `xml:"name"`
		} `xml:"author"`
		Entry []dated `xml:"entry"`
	}
	check(t, xml.Unmarshal([]byte(strings.NewReplacer("<id>", "<ID>", "</id>", "</ID>", "<title>", "<Title>", "</title>",
		"</Title>",
		"<updated>", "<Updated>", "</updated>", "</Updated>").Replace(body)), &feed))
	var got []string
	ids := map[string]bool{}
	for _, e := range append(feed.Entry, feed.dated) {
		if _, err := time.Parse(time.RFC3339, e.Updated); err != nil || e.ID == "" || e.Title == "" || len(e.Link) == 0 ||
			ids[e.ID] {
			t.Errorf("entry %+v lacks something, or its id is not its own: %v", e, err)
		}
		ids[e.ID] = true
		got = append(got, e.Category.Term)
	}
	if want := "yanked failed failed published "; strings.Join(got, " ") != want || feed.Author.Name == "" {
		t.Errorf("the feed has %q by %q; want %q", strings.Join(got, " "), feed.Author.Name, want)
	}
}

// trouble is a catalogue whose matrix cannot be read.
type trouble struct {
	*catalogue.Catalogue
	err error
}

func (c trouble) Matrix(context.Context, store.KernelFilter, catalogue.DriverFilter, store.Page) (*catalogue.Matrix,
	error) {
	return nil, c.err
}

func TestTrouble(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		err    error
		status int
		has    string
		lacks  string
	}{
		{fault.New(fault.Transient, "database db.internal is away", ""), 503, "cannot answer right now", "db.internal"},
		{io.ErrUnexpectedEOF, 500, "its log has the cause", "unexpected EOF"},
	} {
		pages, err := web.New(web.Config{Catalogue: trouble{err: row.err}, Log: slog.New(slog.DiscardHandler)})
		check(t, err)
		answer, body := get(t, pages, "/")
		if answer.StatusCode != row.status || !strings.Contains(body, row.has) || strings.Contains(body, row.lacks) {
			t.Errorf("GET / with %v = %d, %s; want %d with %q, without %q", row.err, answer.StatusCode, body, row.status,
				row.has, row.lacks)
		}
	}
}

// TestHostile shows a catalogue whose texts contain HTML. The page must show them as text.
func TestHostile(t *testing.T) {
	t.Parallel()
	const bad = `<i>"'&`
	m := &catalogue.Matrix{Kernels: []api.Kernel{{Kernel: target.Kernel{BuildID: bad, Board: bad, Release: bad}}},
		Drivers: []api.DriverRelease{{Version: bad, Branch: bad}},
		Cells:   [][][]api.Resolution{{{{State: bad, Driver: target.Driver{Version: bad, Flavour: bad}}}}}}
	cat, _ := farm(t)
	pages, err := web.New(web.Config{Catalogue: hostile{cat, m}, Log: slog.New(slog.DiscardHandler)})
	check(t, err)
	answer, body := get(t, pages, "/")
	if answer.StatusCode != 200 || strings.Contains(body, "<i>") || strings.Count(body, "&lt;i&gt;") < 5 {
		t.Errorf("GET / = %d, %s; want every text escaped", answer.StatusCode, body)
	}
}

type hostile struct {
	*catalogue.Catalogue
	m *catalogue.Matrix
}

func (h hostile) Matrix(context.Context, store.KernelFilter, catalogue.DriverFilter, store.Page) (*catalogue.Matrix,
	error) {
	return h.m, nil
}

// TestWeight makes the largest page of the matrix: 20 kernels and 16 drivers, in both flavours. The page must stay
// below 100,000 bytes.
func TestWeight(t *testing.T) {
	t.Parallel()
	cat, pages := farm(t)
	var kernels []target.Kernel
	for i := range 20 {
		k := target.Kernel{BuildID: fmt.Sprintf("17800.%d.100", 100+i), Board: "lakitu-arm64", Milestone: 109,
			Release: "6.1.58-20260101+", Arch: target.ARM64}
		kernels = append(kernels, k)
		check(t, cat.RecordKernel(t.Context(), api.Kernel{Kernel: k, Fingerprint: finger}))
	}
	for i := range 16 {
		for j, f := range []target.Flavour{target.Open, target.Proprietary} {
			a := api.NewArtifact{Digest: fmt.Sprintf("sha256:%064d", 2*i+j), Fingerprint: finger, Kernels: kernels,
				Driver: target.Driver{Version: fmt.Sprintf("5%02d.261.03", 30+i), Flavour: f}}
			_, err := cat.AddArtifact(t.Context(), a)
			check(t, err)
			if j == 1 { // two flavours with different states need the most bytes
				_, err := cat.Yank(t.Context(), a.Digest, api.YankRequest{Reason: "x"})
				check(t, err)
			}
		}
	}
	_, body := get(t, pages, "/")
	if n := strings.Count(body, `class="pill"`); n != 320 || len(body) > 100_000 {
		t.Errorf("the page has %d cells and %d bytes; want 320, and at most 100,000", n, len(body))
	}
}
