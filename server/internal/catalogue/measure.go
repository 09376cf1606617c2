package catalogue

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sort"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// What needs the whole catalogue is measured now and then and remembered:
// how much of what is wanted is there, how long builds take, who waits for whom.

// measurer reads what is measured.
type measurer interface {
	Changes() uint64
	SetWanted(ctx context.Context, list string, cells []store.WantedCell) error
	Coverage(ctx context.Context) (map[int]map[api.State]int, error)
	WaitingBuilds(ctx context.Context) ([]store.Waiting, error)
	RunningBuilds(ctx context.Context) ([]store.Working, error)
	PublishedBuilds(ctx context.Context, f target.Flavour, n int) ([]store.Working, error)
}

const (
	measureEvery = 10 * time.Second
	// measureIdle is how many times longer than a measurement the pause after it is at least.
	measureIdle = 25
	// measureAnyway is how old a measurement gets while nothing is written: builders end silently, too.
	measureAnyway = time.Minute
	// recentBuilds are those whose median is what builds take.
	recentBuilds = 51
	// A builder that said nothing for aliveFor is not counted on; one without work says
	// nothing, and is counted on for a while after its last build.
	aliveFor, idleFor = 45 * time.Second, 10 * time.Minute
)

// figures is a measurement. It is shared: nobody may change it.
type figures struct {
	coverage api.Coverage
	waiting  []store.Waiting
	// before[i] is the work of the first i that wait; running is what is left of the
	// running builds.
	before  []time.Duration
	running time.Duration
	// takes is how long a build takes; a flavour that was never built is not in it.
	takes map[target.Flavour]time.Duration
	// builders is how many builds go on side by side; heard are the builders by name.
	builders int
	heard    []Builder
	groups   []store.KernelGroup
	// ready tells how long cells took that became ready lately.
	ready api.ReadyDuration
}

// Measurer measures until ctx is done.
func (c *Catalogue) Measurer(ctx context.Context) error {
	changes, last, forgot := uint64(0), time.Time{}, time.Time{}
	for {
		begin := time.Now()
		if begin.Sub(forgot) >= time.Hour {
			if err := c.Store.ForgetReports(ctx, c.Now().Add(-keepReports)); err != nil && ctx.Err() == nil {
				c.Log.WarnContext(ctx, "old reports not removed", "err", err)
			}
			forgot = begin
		}
		if now := c.Store.Changes(); now != changes || begin.Sub(last) >= measureAnyway {
			if err := c.Measure(ctx); err != nil && ctx.Err() == nil {
				c.Log.WarnContext(ctx, "measurement incomplete", "err", err)
			} else {
				changes, last = now, begin
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(measureEvery, measureIdle*time.Since(begin))):
		}
	}
}

// Measure examines everything and stores it.
func (c *Catalogue) Measure(ctx context.Context) error {
	f, now := &figures{takes: map[target.Flavour]time.Duration{}}, c.Now()
	counts, err := c.Store.Coverage(ctx)
	if err != nil {
		return err
	}
	f.coverage = coverage(counts, now)
	if f.waiting, err = c.Store.WaitingBuilds(ctx); err != nil {
		return err
	}
	running, err := c.Store.RunningBuilds(ctx)
	if err != nil {
		return err
	}
	if f.groups, err = c.Store.KernelGroups(ctx); err != nil {
		return err
	}
	if f.ready, err = c.ReadyTimes(ctx, readyDays); err != nil {
		return err
	}
	workers := map[string]*Builder{}
	heard := func(b store.Working, at time.Time) *Builder {
		if workers[b.Worker] == nil {
			workers[b.Worker] = &Builder{Name: b.Worker}
		}
		workers[b.Worker].SeenAt = later(workers[b.Worker].SeenAt, at)
		return workers[b.Worker]
	}
	for _, flavour := range []target.Flavour{target.Proprietary, target.Open} {
		ended, err := c.Store.PublishedBuilds(ctx, flavour, recentBuilds)
		if err != nil {
			return err
		}
		var took []time.Duration
		for _, b := range ended {
			took = append(took, b.FinishedAt.Sub(b.StartedAt))
			if b.Worker != "" && now.Sub(b.FinishedAt) < idleFor {
				heard(b, b.FinishedAt).Published++
			}
		}
		if n := len(took); n > 0 {
			slices.Sort(took)
			f.takes[flavour] = took[n/2]
		}
	}
	for _, b := range running {
		if at := later(b.HeartbeatAt, b.StartedAt); now.Sub(at) < aliveFor {
			f.builders++
			heard(b, at).Running++
		}
		f.running += max(0, f.take(b.Flavour)-now.Sub(b.StartedAt))
	}
	f.builders, f.heard = max(f.builders, len(workers)), listBuilders(workers)
	f.before = make([]time.Duration, len(f.waiting)+1)
	for i, w := range f.waiting {
		f.before[i+1] = f.before[i] + f.take(w.Flavour)
	}
	c.figures.Store(f)
	return nil
}

// take is how long a build of a flavour takes; where none was built, as long as one of the other.
func (f *figures) take(flavour target.Flavour) time.Duration {
	if d, ok := f.takes[flavour]; ok {
		return d
	}
	for _, d := range f.takes {
		return d
	}
	return 0
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// expect says of an open cell how many wait before it, and when it may be ready.
// It reads nothing: its input is some seconds old.
func (c *Catalogue) expect(r *api.Resolution) {
	f := c.figures.Load()
	if f == nil || !open(r.Build) || r.State != r.Build.State {
		return
	}
	now := c.Now()
	var ready time.Time
	takes := f.take(r.Driver.Flavour)
	if r.State == api.Building {
		if r.Build.StartedAt != nil {
			ready = r.Build.StartedAt.Add(takes)
		}
	} else {
		n := sort.Search(len(f.waiting), func(i int) bool {
			w := f.waiting[i]
			return cmp.Or(cmp.Compare(w.Priority, r.Build.Priority), cmp.Compare(w.ID, r.Build.ID)) >= 0
		})
		r.Position = n + 1
		if f.builders == 0 {
			return
		}
		ready = now.Add((f.running+f.before[n])/time.Duration(f.builders) + takes)
	}
	if takes > 0 && ready.After(now) { // what is late may end at any time, or never
		r.ETA = &ready
	}
}

// Coverage tells how much of what wish lists want is there, as of some seconds ago.
func (c *Catalogue) Coverage(ctx context.Context) (api.Coverage, error) {
	f, err := c.measured(ctx)
	if err != nil {
		return api.Coverage{}, err
	}
	return f.coverage, nil
}

func coverage(counts map[int]map[api.State]int, at time.Time) api.Coverage {
	out := api.Coverage{At: at, Milestones: []api.MilestoneCoverage{}}
	for _, milestone := range slices.Backward(slices.Sorted(maps.Keys(counts))) {
		m := api.MilestoneCoverage{Milestone: milestone}
		for state, n := range counts[milestone] {
			for _, to := range []*api.CoverageCounts{&m.CoverageCounts, &out.Total} {
				to.Wanted += n
				*stateOf(to, state) += n
			}
		}
		out.Milestones = append(out.Milestones, m)
	}
	return out
}

func stateOf(c *api.CoverageCounts, s api.State) *int {
	switch s {
	case api.Published:
		return &c.Published
	case api.Building:
		return &c.Building
	case api.Queued:
		return &c.Queued
	case api.Failed:
		return &c.Failed
	case api.Yanked, api.Quarantined:
		return &c.Withdrawn
	case api.Unsupported:
		return &c.Unsupported
	}
	return &c.Missing
}
