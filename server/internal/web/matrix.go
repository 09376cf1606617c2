package web

import (
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

// legend explains a state.
type legend struct {
	State api.State
	Text  string
}

var legends = []legend{
	{api.Published, "signed and ready to install"},
	{api.Building, "a builder works on it"},
	{api.Queued, "waits for a builder"},
	{api.Failed, "the last build failed; its page says why"},
	{api.Yanked, "withdrawn: do not use it"},
	{api.Quarantined, "did not load on several nodes"},
	{api.Cancelled, "called off"},
	{api.Unsupported, "cannot be built"},
	{api.Unknown, "not requested yet"},
}

type matrixPage struct {
	head
	Query
	Boards     []string
	Milestones []int
	States     []api.State
	Drivers    []api.DriverRelease
	Folded     int
	Groups     []group
	Coverage   []milestoneShare
	Legend     []legend
	// Unfolded is the address of this page with a column for each driver. Older and Newest are the addresses of the
	// next and the first page. "" means no link.
	Unfolded, Older, Newest string
}

// Query is a search, with the fields of the page's form.
type Query struct {
	Text, Board, Driver string
	State               api.State
	Milestone           int
	All                 bool
}

// group is the part of a page with the kernels of one milestone.
type group struct {
	Milestone int
	Covered   string // how many of the wanted cells are published, in percent; "" if none is wanted
	Rows      []row
}

type row struct{ Head, Cells template.HTML }

// milestoneShare says how much of the desired matrix is published for one milestone.
type milestoneShare struct {
	Milestone int
	Share     string
	Bar       template.HTML
	api.CoverageCounts
}

// maxRows is the maximum number of kernels on a page.
const maxRows = 20

// parse returns what the reader searches for.
func parse(query url.Values) (Query, error) {
	q := Query{
		Text:   strings.TrimSpace(query.Get("q")),
		Board:  query.Get("board"),
		Driver: strings.TrimSpace(query.Get("driver")),
		State:  api.State(query.Get("state")),
		All:    query.Get("all") != "",
	}
	if m := query.Get("milestone"); m != "" {
		n, err := strconv.Atoi(m)
		if err != nil || n < 0 {
			return q, fault.New(fault.Usage, fmt.Sprintf("milestone %.20q is not a number", m), "write a milestone such as 109")
		}
		q.Milestone = n
	}
	return q, nil
}

// filters returns the filters for a search. A text such as 535 or R535.104 is a driver version: a BUILD_ID begins with
// five digits (18244.x), and a kernel release with one (6.x).
func (q Query) filters() (store.KernelFilter, catalogue.DriverFilter) {
	k := store.KernelFilter{Board: q.Board, Milestone: q.Milestone, State: q.State, Text: q.Text}
	d := catalogue.DriverFilter{Text: q.Driver, All: q.All}
	first, _, _ := strings.Cut(strings.TrimPrefix(q.Text, "R"), ".")
	if n, err := strconv.Atoi(first); err == nil && len(first) == 3 && n > 300 && d.Text == "" {
		k.Text, d.Text = "", q.Text
	}
	return k, d
}

func (p *pages) matrix(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	asked, err := parse(query)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	kernels, drivers := asked.filters()
	m, err := p.Catalogue.Matrix(r.Context(), kernels, drivers, store.Page{After: query.Get("after"), Limit: maxRows})
	if err != nil {
		p.fail(w, r, err)
		return
	}
	coverage, err := p.Catalogue.Coverage(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	groups, err := p.Catalogue.Groups(r.Context())
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := matrixPage{
		head:    head{Title: "Matrix", Here: "/"},
		Query:   asked,
		Drivers: m.Drivers,
		Folded:  len(m.Folded),
		Legend:  legends,
		States:  []api.State{api.Building, api.Queued, api.Failed, api.Yanked, api.Quarantined, api.Cancelled},
	}
	for _, g := range groups {
		if !slices.Contains(page.Boards, g.Board) {
			page.Boards = append(page.Boards, g.Board)
		}
		if g.Milestone != 0 && !slices.Contains(page.Milestones, g.Milestone) {
			page.Milestones = append(page.Milestones, g.Milestone)
		}
	}
	slices.Sort(page.Boards)
	page.Coverage = coverages(coverage)
	with := func(key, value string) string {
		changed := url.Values{}
		for k, v := range query {
			if v[0] != "" {
				changed[k] = v
			}
		}
		if changed.Set(key, value); value == "" {
			changed.Del(key)
		}
		return strings.TrimSuffix("/?"+changed.Encode(), "?")
	}
	if query.Get("after") != "" {
		page.Newest = with("after", "")
	}
	if m.Next != "" {
		page.Older = with("after", m.Next)
	}
	if len(m.Folded) > 0 && !asked.All {
		page.Unfolded = with("all", "1")
	}
	for i, k := range m.Kernels {
		if n := len(page.Groups); n == 0 || page.Groups[n-1].Milestone != k.Milestone {
			g := group{Milestone: k.Milestone}
			for _, c := range page.Coverage {
				if c.Milestone == k.Milestone {
					g.Covered = c.Share
				}
			}
			page.Groups = append(page.Groups, g)
		}
		g := &page.Groups[len(page.Groups)-1]
		g.Rows = append(g.Rows, row{kernelHead(k), cells(k, m.Drivers, m.Cells[i])})
	}
	p.render(w, r, http.StatusOK, "matrix.html", page)
}

// coverages returns the share of each milestone that has wanted cells.
func coverages(c api.Coverage) []milestoneShare {
	var all []milestoneShare
	for _, m := range c.Milestones {
		if m.Wanted > 0 {
			all = append(all, milestoneShare{m.Milestone, share(m.Published, m.Wanted), stackedBar([]part{
				{api.Published, m.Published}, {api.Building, m.Building}, {api.Queued, m.Queued}, {api.Failed, m.Failed},
				{api.Yanked, m.Withdrawn}, {api.Unsupported, m.Unsupported}, {api.Unknown, m.Missing},
			}), m.CoverageCounts})
		}
	}
	return all
}
