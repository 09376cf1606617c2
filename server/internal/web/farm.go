package web

import (
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

func parseID(text string) (int64, error) {
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil || id < 1 {
		return 0, fault.New(fault.NotFound, "there is no such build",
			"look for the build on the page of the queue, or on the page of its cell")
	}
	return id, nil
}

type queuePage struct {
	head
	*catalogue.Workload
	Takes []medianTime
	// More is the number of waiting builds that are not listed.
	More int
}

// medianTime is the median duration of the builds of one flavour.
type medianTime struct {
	Flavour target.Flavour
	Time    string
}

func (p *pages) queue(w http.ResponseWriter, r *http.Request) {
	load, err := p.Catalogue.Workload(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := queuePage{head: head{Title: "Queue", Here: "/queue", Refresh: true}, Workload: load,
		More: max(0, load.Waiting-len(load.Next))}
	for _, f := range []target.Flavour{target.Proprietary, target.Open} {
		if d, ok := load.Takes[f]; ok {
			page.Takes = append(page.Takes, medianTime{f, formatSeconds(d.Seconds())})
		}
	}
	p.render(w, r, http.StatusOK, "queue.html", page)
}

type releasesPage struct {
	head
	Ready    api.ReadyDuration
	Chart    template.HTML
	Releases []release
	Older    string
	Newest   string
}

// release is what the list of releases shows about a COS build.
type release struct {
	api.ReleaseSummary
	Asked int
	Share string
	Bar   template.HTML
}

// maxReleases is the maximum number of kernels on the page of releases.
const maxReleases = 30

func (p *pages) releases(w http.ResponseWriter, r *http.Request) {
	after := r.URL.Query().Get("after")
	all, next, err := p.Catalogue.Releases(r.Context(), store.KernelFilter{}, store.Page{After: after, Limit: maxReleases})
	if err != nil {
		p.fail(w, r, err)
		return
	}
	ready, err := p.Catalogue.RecentReadyTimes(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := releasesPage{head: head{Title: "Releases", Here: "/releases"}, Ready: ready}
	if after != "" {
		page.Newest = "/releases"
	}
	if next != "" {
		page.Older = "/releases?after=" + next
	}
	var columns []column
	for _, v := range all {
		one := release{ReleaseSummary: v}
		for _, n := range v.Cells {
			one.Asked += n
		}
		if one.Asked > 0 {
			one.Share = share(v.Cells[api.Published], one.Asked)
			var parts []part
			for _, l := range legends {
				parts = append(parts, part{l.State, v.Cells[l.State]})
			}
			one.Bar = stackedBar(parts)
		}
		page.Releases = append(page.Releases, one)
		if v.Times.Count > 0 {
			columns = append(columns, column{Name: v.BuildID, P50: v.Times.P50, Max: v.Times.Max})
		}
	}
	slices.Reverse(columns)
	page.Chart = freshness(columns)
	p.render(w, r, http.StatusOK, "releases.html", page)
}

type warningsPage struct {
	head
	Warnings []api.Warning
	// More is the number of warnings that are not shown.
	More int
}

// maxWarnings is the maximum number of warnings on the page of early warnings.
const maxWarnings = 100

func (p *pages) warnings(w http.ResponseWriter, r *http.Request) {
	all, err := p.Catalogue.Warnings(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := warningsPage{
		head:     head{Title: "Early warnings", Here: "/warnings"},
		Warnings: all[:min(maxWarnings, len(all))],
	}
	page.More = len(all) - len(page.Warnings)
	p.render(w, r, http.StatusOK, "warnings.html", page)
}

type preflightPage struct {
	head
	api.Pool
	// Build is what the reader entered: a BUILD_ID or a GKE version.
	Build   string
	Boards  []string
	Verdict *api.PoolVerdict
	// Cell is the path of the page about the verdict's cell; "" means that there is none.
	Cell string
	// Wrong says what is wrong with the reader's input.
	Wrong, Hint string
}

func (p *pages) preflight(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	page := preflightPage{head: head{Title: "Preflight", Here: "/preflight"}}
	page.Build = strings.TrimSpace(query.Get("build"))
	page.Pool = api.Pool{Board: strings.TrimSpace(query.Get("board")), Driver: strings.TrimSpace(query.Get("driver")),
		Flavour: query.Get("flavour")}
	page.Pool.BuildID, page.Pool.GKE = api.BuildOrGKE(page.Build)
	groups, err := p.Catalogue.Groups(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	for _, g := range groups {
		if !slices.Contains(page.Boards, g.Board) {
			page.Boards = append(page.Boards, g.Board)
		}
	}
	slices.Sort(page.Boards)
	status := http.StatusOK
	if page.Build != "" {
		answer, err := p.Catalogue.Preflight(r.Context(), api.PreflightRequest{Pools: []api.Pool{page.Pool}})
		switch {
		case fault.Is(err, fault.Usage):
			status, page.Wrong, page.Hint = http.StatusBadRequest, err.Error(), fault.Hint(err)
		case err != nil:
			p.fail(w, r, err)
			return
		default:
			page.Verdict = &answer.Pools[0]
			if d := page.Verdict.Resolution.Driver; d.Version != "" {
				page.Cell = cellPath(page.Verdict.Resolution.Kernel, d.Version, d.Flavour)
			}
		}
	}
	p.render(w, r, status, "preflight.html", page)
}

// badge responds with a badge for project pages. It shows how much of the desired matrix, or of a milestone, is
// published. If the query has a BUILD_ID, the badge shows the state of a cell.
func (p *pages) badge(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	text, state := "nothing wanted", api.Unknown
	var err error
	if build := query.Get("build"); build != "" {
		var res api.Resolution
		res, err = p.Catalogue.Resolve(r.Context(), build, query.Get("board"), query.Get("driver"), query.Get("flavour"), "")
		text, state = label(res.State), res.State
	} else {
		var c api.Coverage
		c, err = p.Catalogue.Coverage(r.Context())
		counts := c.Total
		if m := query.Get("milestone"); m != "" {
			counts = api.CoverageCounts{}
			for _, one := range c.Milestones {
				if strconv.Itoa(one.Milestone) == m {
					counts = one.CoverageCounts
				}
			}
		}
		if counts.Wanted > 0 {
			text, state = share(counts.Published, counts.Wanted)+" covered", api.Queued
			if counts.Published == counts.Wanted {
				state = api.Published
			}
		}
	}
	if err != nil {
		p.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "image/svg+xml")
	w.Header().Set("Cache-Control", "public, max-age="+strconv.Itoa(int(badgeLife.Seconds())))
	_, _ = w.Write([]byte(drawBadge("prebake", text, state))) // an error means that the client is gone
}

// badgeLife is how long browsers and proxies may keep a badge.
const badgeLife = time.Minute

// drawBadge draws a label and a value, at about seven units for each character.
func drawBadge(name, value string, s api.State) string {
	colours := map[api.State]string{
		api.Published:   "#14602c",
		api.Building:    "#6b4900",
		api.Queued:      "#6b4900",
		api.Failed:      "#9b1c1c",
		api.Yanked:      "#9b1c1c",
		api.Quarantined: "#9b1c1c",
	}
	colour := colours[s]
	if colour == "" {
		colour = "#5b636d"
	}
	left, right := 7*len([]rune(name))+14, 7*len([]rune(value))+14
	var out markup
	out.put(fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="20" role="img">`, left+right))
	out.put(`<title>`, name+": "+value, `</title>`)
	out.put(
		fmt.Sprintf(
			`<rect width="%d" height="20" fill="#1f2328"/><rect x="%d" width="%d" height="20" fill="%s"/>`,
			left,
			left,
			right,
			colour,
		),
	)
	out.put(
		fmt.Sprintf(
			`<g fill="#fff" font-family="DejaVu Sans,Verdana,sans-serif" font-size="11" text-anchor="middle"><text x="%d" y="14">`,
			left/2,
		),
		name,
		fmt.Sprintf(`</text><text x="%d" y="14">`, left+right/2),
		value,
		`</text></g></svg>`,
	)
	return out.String()
}
