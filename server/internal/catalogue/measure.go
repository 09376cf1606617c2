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

// Figures that need the whole catalogue are measured at intervals and kept in memory.

// measurer reads the data for a measurement.
type measurer interface {
	Changes() uint64
	SetWanted(ctx context.Context, list string, version int64, cells []store.WantedCell) error
	Coverage(ctx context.Context) (map[int]map[api.State]int, error)
	WaitingBuilds(ctx context.Context) ([]store.Waiting, error)
	RunningBuilds(ctx context.Context) ([]store.Working, error)
	PublishedBuilds(ctx context.Context, f target.Flavour, n int) ([]store.Working, error)
}

const (
	measureEvery = 10 * time.Second
	// measureIdle is the minimum pause after a measurement, as a multiple of its duration.
	measureIdle = 25
	// measureAnyway is the maximum age of a measurement. It is limited because a builder can stop without a report.
	measureAnyway = time.Minute
	// recentBuilds is the number of published builds of each flavour, newest first, for the median duration.
	recentBuilds = 51
	// A builder at work is counted until aliveFor after its last report. A builder without work reports nothing, and is
	// counted until idleFor after its last build.
	aliveFor, idleFor = 45 * time.Second, 10 * time.Minute
)

// figures is the result of a measurement. Readers share it, so it must not be changed.
type figures struct {
	coverage api.Coverage
	waiting  []store.Waiting
	// before[i] is the expected duration of the first i waiting builds together. running is the expected remaining time
	// of all running builds.
	before  []time.Duration
	running time.Duration
	// takes is the median duration of a build for each flavour that was ever built.
	takes map[target.Flavour]time.Duration
	// builders is the number of builds that run at the same time. heard are the builders that reported lately, sorted
	// by name.
	builders int
	heard    []Builder
	groups   []store.KernelGroup
	// ready has percentiles of the time from a kernel's discovery to the publication of a cell, over the last readyDays
	// days.
	ready api.ReadyDuration
}

// Measurer measures at intervals until ctx is done. Once an hour, it also removes old reports of nodes.
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
				c.Log.WarnContext(ctx, "measurement of the matrix incomplete", "err", err)
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

// Measure measures the whole catalogue once and keeps the result.
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
		f.running += max(0, f.buildTime(b.Flavour)-now.Sub(b.StartedAt))
	}
	f.builders, f.heard = max(f.builders, len(workers)), listBuilders(workers)
	f.before = make([]time.Duration, len(f.waiting)+1)
	for i, w := range f.waiting {
		f.before[i+1] = f.before[i] + f.buildTime(w.Flavour)
	}
	c.figures.Store(f)
	return nil
}

// buildTime returns the duration of a build of a flavour. If it is unknown, buildTime returns the other flavour's
// duration, or 0.
func (f *figures) buildTime(flavour target.Flavour) time.Duration {
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

// addForecast adds the expected time of readiness to a queued or building cell. A queued cell also gets its place in
// the queue. The forecast uses the last measurement, which is some seconds old.
func (c *Catalogue) addForecast(r *api.Resolution) {
	f := c.figures.Load()
	if f == nil || !isOpen(r.Build) || r.State != r.Build.State {
		return
	}
	now := c.Now()
	var ready time.Time
	takes := f.buildTime(r.Driver.Flavour)
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
	if takes > 0 && ready.After(now) { // a build that is late may end at any time, or never
		r.ETA = &ready
	}
}

// Coverage returns how much of the desired matrix is published, by the last measurement.
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
