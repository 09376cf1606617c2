package catalogue

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// This file is for the web pages only.

// CellView has everything that the catalogue knows about one kernel and one driver version.
type CellView struct {
	Kernel  api.Kernel
	Release api.DriverRelease
	// Flavours has the cells of both flavours: first proprietary, then open.
	Flavours []FlavourView
}

// FlavourView is one cell with its artifact and its builds.
type FlavourView struct {
	api.Resolution
	// Artifact is the artifact of the cell, published or withdrawn; nil means that there is none.
	Artifact *api.Artifact
	// Builds has the cell's last builds, newest first.
	Builds []api.Build
}

// maxHistory is the maximum number of builds of one cell on a page.
const maxHistory = 20

// View returns everything about one kernel and one driver version. For an unknown kernel, the error has kind NotFound.
func (c *Catalogue) View(ctx context.Context, buildID, board, version string) (*CellView, error) {
	k, err := target.ParseKernel(buildID, board)
	if err == nil {
		_, err = target.ParseDriver(version, string(target.Open))
	}
	if err != nil {
		return nil, fault.Wrap(fault.NotFound, err, "find the cell in the matrix, and follow its link")
	}
	cells, err := c.Store.KernelCells(ctx, buildID, board)
	if err != nil {
		return nil, err
	}
	if cells == nil {
		return nil, fault.New(fault.NotFound, fmt.Sprintf("COS build %s is not in the catalogue", k),
			"announce the COS build: server announce "+buildID)
	}
	rel, err := c.Store.Driver(ctx, version)
	if err != nil {
		return nil, err
	}
	v := &CellView{Kernel: cells.Kernel, Release: rel}
	for _, f := range []target.Flavour{target.Proprietary, target.Open} {
		d := target.Driver{Version: version, Flavour: f}
		facts := cells.Facts(d)
		one := FlavourView{Resolution: resolution(cells.Kernel, rel, d, facts)}
		c.addForecast(&one.Resolution)
		for _, a := range facts.Artifacts {
			current := a.Digest == one.Digest || one.Digest == "" && a.Attested && a.State == one.State
			if current && one.Artifact == nil {
				whole, err := c.Store.Artifact(ctx, a.Digest)
				if err != nil && !fault.Is(err, fault.NotFound) {
					return nil, err
				}
				if err == nil {
					one.Artifact = &whole
				}
			}
		}
		if facts.Newest != nil {
			if one.Builds, _, err = c.Store.Builds(ctx, store.BuildFilter{BuildID: buildID, Board: board,
				Driver: version, Flavour: f}, store.Page{Limit: maxHistory}); err != nil {
				return nil, err
			}
		}
		v.Flavours = append(v.Flavours, one)
	}
	return v, nil
}

// Workload has the builders, the running builds and the waiting builds.
type Workload struct {
	// Waiting is the number of waiting builds. Next are the first of them, in the order of their start.
	Waiting int
	Next    []api.Resolution
	Running []api.Build
	// Builders has the builders that reported lately, sorted by name.
	Builders []Builder
	// Takes is the median duration of the newest builds of each flavour.
	Takes map[target.Flavour]time.Duration
}

// Builder is a builder that reported lately.
type Builder struct {
	Name   string
	SeenAt time.Time
	// Running is the number of the builder's running builds. Published is the number it published within idleFor, out
	// of the newest recentBuilds of each flavour.
	Running, Published int
}

// maxShown is the maximum number of builds in each list on the page of the queue.
const maxShown = 50

// Workload reads the builders and the waiting builds.
func (c *Catalogue) Workload(ctx context.Context) (*Workload, error) {
	f, err := c.measured(ctx)
	if err != nil {
		return nil, err
	}
	next, err := c.Store.NextBuilds(ctx, maxShown)
	if err != nil {
		return nil, err
	}
	v := &Workload{Waiting: max(len(f.waiting), len(next)), Builders: f.heard, Takes: f.takes}
	if v.Running, _, err = c.Store.Builds(ctx, store.BuildFilter{State: api.Building},
		store.Page{Limit: maxShown}); err != nil {
		return nil, err
	}
	for _, b := range next {
		r := api.Resolution{Kernel: b.Kernel, Driver: b.Driver, State: b.State, Build: &b}
		c.addForecast(&r)
		v.Next = append(v.Next, r)
	}
	return v, nil
}

// Releases lists a page of COS builds, newest first. The limit is a number of kernels; a COS build has one for each
// board. A COS build is not split between pages, unless it has more boards than the limit.
func (c *Catalogue) Releases(
	ctx context.Context,
	f store.KernelFilter,
	p store.Page,
) ([]api.ReleaseSummary, string, error) {
	cells, next, err := c.readPage(ctx, f, p)
	if err != nil {
		return nil, "", err
	}
	if next != "" { // the next page may have more boards of the last COS build
		last := cells[len(cells)-1].Kernel.BuildID
		for i := len(cells) - 2; i >= 0; i-- {
			if k := cells[i].Kernel; k.BuildID != last {
				cells, next = cells[:i+1], store.AfterKernel(k)
				break
			}
		}
	}
	all, took := []api.ReleaseSummary{}, []time.Duration(nil)
	for i, kc := range cells {
		k := kc.Kernel
		if i == 0 || all[len(all)-1].BuildID != k.BuildID {
			all = append(all, api.ReleaseSummary{BuildID: k.BuildID, SeenAt: k.FirstSeenAt, Cells: map[api.State]int{}})
			took = nil
		}
		r := &all[len(all)-1]
		r.Milestone, r.Boards = max(r.Milestone, k.Milestone), append(r.Boards, k.Board)
		if k.FirstSeenAt.Before(r.SeenAt) {
			r.SeenAt = k.FirstSeenAt
		}
		for d, facts := range kc.All() {
			cell := resolution(k, api.DriverRelease{Version: d.Version}, d, facts)
			r.Cells[cell.State]++
			if cell.ReadyAt != nil && !cell.ReadyAt.Before(k.FirstSeenAt) {
				took = append(took, cell.ReadyAt.Sub(k.FirstSeenAt))
			}
		}
		slices.Sort(took)
		r.Times = durations(took)
	}
	return all, next, nil
}

// readyDays is the period of the percentiles on the page of releases, in days.
const readyDays = 30

// RecentReadyTimes returns percentiles of the time from a kernel's discovery to the publication of a cell. They cover
// the 30 days before the last measurement.
func (c *Catalogue) RecentReadyTimes(ctx context.Context) (api.ReadyDuration, error) {
	f, err := c.measured(ctx)
	if err != nil {
		return api.ReadyDuration{}, err
	}
	return f.ready, nil
}

// Groups returns the numbers of kernels by milestone and board, from the last measurement.
func (c *Catalogue) Groups(ctx context.Context) ([]store.KernelGroup, error) {
	f, err := c.measured(ctx)
	if err != nil {
		return nil, err
	}
	return f.groups, nil
}

// News is an outcome of a cell: a build that was published or failed, or an artifact that was withdrawn.
type News struct {
	At time.Time
	// Build is a build that ended. Artifact is a withdrawn artifact. Only one of them is set.
	Build    *api.Build
	Artifact *api.Artifact
}

// Newest lists the n newest outcomes, newest first.
func (c *Catalogue) Newest(ctx context.Context, n int) ([]News, error) {
	all := []News{}
	for _, state := range []api.State{api.Published, api.Failed} {
		builds, _, err := c.Store.Builds(ctx, store.BuildFilter{State: state}, store.Page{Limit: n})
		if err != nil {
			return nil, err
		}
		for _, b := range builds {
			at := b.CreatedAt
			if b.FinishedAt != nil {
				at = *b.FinishedAt
			}
			all = append(all, News{At: at, Build: &b})
		}
	}
	artifacts, err := c.Store.Withdrawn(ctx, n)
	if err != nil {
		return nil, err
	}
	for _, a := range artifacts {
		at := a.PublishedAt
		if a.WithdrawnAt != nil {
			at = *a.WithdrawnAt
		}
		all = append(all, News{At: at, Artifact: &a})
	}
	slices.SortStableFunc(all, func(a, b News) int { return b.At.Compare(a.At) })
	return all[:min(n, len(all))], nil
}

// measured returns the last measurement, or makes the first one.
func (c *Catalogue) measured(ctx context.Context) (*figures, error) {
	if f := c.figures.Load(); f != nil {
		return f, nil
	}
	if err := c.Measure(ctx); err != nil {
		return nil, err
	}
	return c.figures.Load(), nil
}

// textPattern matches search texts for kernels. Its characters have no meaning in an SQL pattern.
var textPattern = regexp.MustCompile(`^[A-Za-z0-9.+~-]{0,64}$`)

// filterStates are the states for filtering kernels. Nearly all kernels have a published cell, so published is left
// out. Unknown is not stored.
var filterStates = []api.State{api.Building, api.Queued, api.Failed, api.Yanked, api.Quarantined, api.Cancelled}

// checkFilter returns an error if no kernel can match the filter.
func checkFilter(f store.KernelFilter) error {
	switch {
	case !textPattern.MatchString(f.Text):
		return fault.New(fault.Usage, fmt.Sprintf("search text %.70q: want letters, digits and .+~- only", f.Text),
			"search for the beginning of a BUILD_ID, a kernel release or a driver version")
	case f.State != "" && !slices.Contains(filterStates, f.State):
		return fault.New(fault.Usage, fmt.Sprintf("state %.20q cannot be a filter", string(f.State)),
			"use building, queued, failed, yanked, quarantined or cancelled")
	}
	return checkGKE(f.GKE)
}

// listBuilders returns the builders sorted by name.
func listBuilders(all map[string]*Builder) []Builder {
	out := make([]Builder, 0, len(all))
	for _, b := range all {
		out = append(out, *b)
	}
	slices.SortFunc(out, func(a, b Builder) int { return cmp.Compare(a.Name, b.Name) })
	return out
}
