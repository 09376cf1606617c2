package catalogue

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unique"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

// maxProblems is the maximum number of stored problems of one wish list.
const maxProblems = 50

// WishLists lists all wish lists.
func (c *Catalogue) WishLists(ctx context.Context) ([]api.WishList, error) {
	return c.Store.WishLists(ctx)
}

// WishList reads one wish list.
func (c *Catalogue) WishList(ctx context.Context, name string) (api.WishList, error) {
	return c.Store.WishList(ctx, name)
}

// PutWishList checks and stores the text of a wish list, and asks [Catalogue.Planner] for a plan. version is the stored
// version to replace; 0 means any.
func (c *Catalogue) PutWishList(ctx context.Context, name, text string, version int64) (api.WishList, error) {
	if !namePattern.MatchString(name) {
		return api.WishList{}, fault.New(
			fault.Usage,
			fmt.Sprintf("wish list name %.80q: want lower-case letters, digits, - and _", name),
			"choose a name such as production",
		)
	}
	w, err := plan.Parse(name, []byte(text))
	if err != nil {
		return api.WishList{}, err
	}
	if strings.HasPrefix(w.ImageMap, "file:") && !strings.HasPrefix(c.KernelMirror, "file:") {
		return api.WishList{}, fault.New(
			fault.Usage,
			"store the wish list: its imageMap is a file on the server's machine, which this server does not read",
			"put the image map on a web server or into a bucket, and write its URL into the wish list",
		)
	}
	err = c.Store.Write(ctx, func(tx *store.Tx) error { return tx.PutWishList(ctx, name, text, version, c.Now()) })
	if err != nil {
		return api.WishList{}, err
	}
	c.Log.InfoContext(ctx, "wish list stored", "name", name)
	c.PlanSoon()
	return c.Store.WishList(ctx, name)
}

// DropWishList removes a wish list. Its artifacts stay.
func (c *Catalogue) DropWishList(ctx context.Context, name string) error {
	err := c.Store.Write(ctx, func(tx *store.Tx) error { return tx.DropWishList(ctx, name) })
	if err == nil {
		c.Log.InfoContext(ctx, "wish list removed", "name", name)
	}
	return err
}

// PlanSoon asks [Catalogue.Planner] to plan the wish lists.
func (c *Catalogue) PlanSoon() {
	select {
	case c.planning <- struct{}{}:
	default: // the planner will start anyway
	}
}

// planEvery is the maximum pause between two plans. Without discovery, nothing else finds the failed cells that may be
// queued again.
const planEvery = time.Hour

// Planner plans the wish lists after each call of [Catalogue.PlanSoon], and at intervals, until ctx is done.
func (c *Catalogue) Planner(ctx context.Context) error {
	tick := time.NewTicker(planEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			c.PlanSoon()
		case <-c.planning:
			if n, err := c.Plan(ctx); err != nil && ctx.Err() == nil {
				c.Log.WarnContext(ctx, "plan of the wish lists incomplete", "builds", n, "err", err)
			} else if n > 0 {
				c.Log.InfoContext(ctx, "builds planned", "builds", n)
			}
		}
	}
}

// Plan queues each wanted cell that has no build, newest kernels first, and returns the number of new builds. A failed
// cell is queued again at [retryTime] if the cause of the failure may pass, up to [maxTries] builds. Cancelled cells
// stay as they are.
func (c *Catalogue) Plan(ctx context.Context) (n int, err error) {
	lists, err := c.Store.WishLists(ctx)
	if err != nil || len(lists) == 0 {
		return 0, err
	}
	known, err := c.planView(ctx, "")
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, l := range lists {
		if ctx.Err() != nil {
			return n, context.Cause(ctx)
		}
		added, err := c.planList(ctx, &l, known)
		n += added
		if err != nil {
			errs = append(errs, fmt.Errorf("plan the wish list %s: %w", l.Name, err))
			l.Problems = append(l.Problems, firstLine(err.Error()))
		}
		now := c.Now()
		l.PlannedAt = &now
		err = c.Store.Write(ctx, func(tx *store.Tx) error { return tx.PlannedWishList(ctx, l) })
		errs = append(errs, err)
	}
	return n, errors.Join(errs...)
}

// planList plans one wish list and returns the number of queued builds. It writes the number of cells and the problems
// into l.
func (c *Catalogue) planList(ctx context.Context, l *api.WishList, known *planView) (n int, err error) {
	l.Cells, l.Problems = 0, nil
	p, err := known.expand(ctx, l)
	if err != nil {
		return 0, err
	}
	l.Problems = p.Notes
	slices.SortStableFunc(
		p.Cells,
		func(a, b plan.Cell) int { return target.CompareVersions(b.Kernel.BuildID, a.Kernel.BuildID) },
	)
	var wanted []store.WantedCell
	for _, cell := range p.Cells {
		if cell.Problem != nil {
			if !cell.Problem.Unavailable && len(l.Problems) < maxProblems {
				l.Problems = append(l.Problems, firstLine(cell.Problem.Err.Error()))
			}
			continue
		}
		l.Cells++
		if whyUnsupported(known.drivers[cell.Driver.Version], cell.Driver) == "" {
			key := store.CellKey{BuildID: cell.Kernel.BuildID, Board: cell.Kernel.Board, Driver: cell.Driver}
			wanted = append(wanted, store.WantedCell{CellKey: key, Early: cell.EarlyWarning})
		}
		added, err := c.queueCell(ctx, cell, known)
		if err != nil && len(l.Problems) < maxProblems {
			l.Problems = append(l.Problems, firstLine(fmt.Sprintf("%s: %v", cell, err)))
		}
		if fault.Is(err, fault.Transient) { // the other cells would fail, too
			return n, err
		}
		if added {
			n++
		}
	}
	return n, c.Store.SetWanted(ctx, l.Name, l.Version, wanted)
}

// queueCell queues a build of one cell, and reports whether it did. It queues nothing if the cell has a build or an
// artifact, or can never be built.
func (c *Catalogue) queueCell(ctx context.Context, cell plan.Cell, known *planView) (bool, error) {
	k, ok := known.kernels[cell.Kernel.String()]
	if !ok { // the wish list has a COS build that the catalogue lacks
		cells, exists, err := c.find(ctx, cell.Kernel)
		if err != nil {
			return false, err
		}
		if k = cells.Kernel; exists {
			known.add(k)
		}
	}
	key := store.CellKey{BuildID: k.BuildID, Board: k.Board, Driver: cell.Driver}
	state, ok := known.states[key]
	tries := known.again[key]
	again := state == api.Failed && tries > 0
	if ok && state != api.Unknown && !again {
		return false, nil
	}
	now := resolution(k, known.drivers[cell.Driver.Version], cell.Driver, store.Facts{})
	if now.State != api.Unknown { // the cell can never be built
		return false, nil
	}
	if id, ok := known.forgotten[key]; ok {
		now.Build = &api.Build{ID: id, State: api.Published}
	}
	priority := queue.PriorityWanted
	switch {
	case cell.EarlyWarning:
		priority = queue.PriorityWarning
	case again:
		priority = queue.PriorityAgain
	}
	b, queued, err := c.openCell(ctx, k, now, priority, tries+1)
	if err != nil {
		return false, err
	}
	known.states[key] = b.State
	return queued, nil
}

// planView gives [plan.Expand] the content of the catalogue instead of a bucket.
type planView struct {
	ids     []string // newest first
	kernels map[string]api.Kernel
	boards  map[string][]target.Kernel
	drivers map[string]api.DriverRelease
	states  map[store.CellKey]api.State // only cells with a build or an artifact
	again   map[store.CellKey]int       // the tries of failed cells that may be queued again now
	// forgotten has the newest build of each cell whose build was published, and whose artifact was deleted since.
	forgotten map[store.CellKey]int64
}

func (s *planView) add(k api.Kernel) {
	if len(s.boards[k.BuildID]) == 0 {
		s.ids = append(s.ids, k.BuildID)
	}
	s.kernels[k.String()] = k
	s.boards[k.BuildID] = append(s.boards[k.BuildID], k.Kernel)
}

// planView reads the catalogue, page by page: the facts about all cells, or with a BUILD_ID only those about its cells.
func (c *Catalogue) planView(ctx context.Context, buildID string) (*planView, error) {
	s := &planView{
		kernels: map[string]api.Kernel{},
		boards:  map[string][]target.Kernel{},
		drivers: map[string]api.DriverRelease{},
		states:  map[store.CellKey]api.State{},
		again:   map[store.CellKey]int{},

		forgotten: map[store.CellKey]int64{},
	}
	now := c.Now()
	if buildID != "" {
		err := eachPage(MaxLimit, func(p store.Page) (next string, err error) {
			all, next, err := c.Store.Kernels(ctx, store.KernelFilter{}, p)
			for _, k := range all {
				s.add(k)
			}
			return next, err
		})
		if err != nil {
			return nil, err
		}
	}
	err := eachPage(MaxLimitCells, func(p store.Page) (next string, err error) {
		all, next, err := c.Store.Cells(ctx, store.KernelFilter{BuildID: buildID}, p)
		for _, cells := range all {
			if buildID == "" {
				s.add(cells.Kernel)
			}
			s.addFacts(cells, now)
		}
		return next, err
	})
	if err != nil {
		return nil, err
	}
	err = eachPage(MaxLimit, func(p store.Page) (next string, err error) {
		all, next, err := c.Store.Drivers(ctx, p)
		for _, d := range all {
			s.drivers[d.Version] = d
		}
		return next, err
	})
	return s, err
}

// eachPage calls read for each page of a list, until there is no next page.
func eachPage(limit int, read func(store.Page) (next string, err error)) error {
	for after := ""; ; {
		next, err := read(store.Page{After: after, Limit: limit})
		if err != nil || next == "" {
			return err
		}
		after = next
	}
}

// addFacts adds what a plan needs of the facts about a kernel's cells.
func (s *planView) addFacts(cells *store.KernelCells, now time.Time) {
	k := cells.Kernel
	for d, f := range cells.All() {
		// Without the copies, these short texts would keep all facts about the kernel in memory.
		own := target.Driver{Version: unique.Make(d.Version).Value(), Flavour: unique.Make(d.Flavour).Value()}
		key := store.CellKey{BuildID: k.BuildID, Board: k.Board, Driver: own}
		state := unique.Make(resolution(k, api.DriverRelease{}, d, f).State).Value()
		s.states[key] = state
		if state == api.Failed && mayRetry(key, f.Newest, now) {
			s.again[key] = f.Newest.Tries
		}
		if state == api.Unknown && f.Newest != nil && f.Newest.State == api.Published {
			s.forgotten[key] = f.Newest.ID
		}
	}
}

// expand returns the cells of a wish list.
func (s *planView) expand(ctx context.Context, l *api.WishList) (*plan.Plan, error) {
	w, err := plan.Parse(l.Name, []byte(l.Text))
	if err != nil {
		return nil, err
	}
	images, err := plan.LoadImageMap(ctx, w.ImageMap)
	if err != nil {
		return nil, err
	}
	return plan.Expand(ctx, w, s, images)
}

// BuildIDs returns the known BUILD_IDs, newest first.
func (s *planView) BuildIDs(context.Context) ([]string, error) { return s.ids, nil }

// BuildsOf returns the kernels of the COS builds with these BUILD_IDs.
func (s *planView) BuildsOf(_ context.Context, ids []string) ([]target.Kernel, error) {
	var all []target.Kernel
	for _, id := range ids {
		all = append(all, s.boards[id]...)
	}
	return all, nil
}

// Drivers returns the driver lists of a kernel.
func (s *planView) Drivers(_ context.Context, k target.Kernel) (cosbucket.DriverList, error) {
	entry := s.kernels[k.String()]
	list := lists(entry)
	if list.Default == "" && list.Latest == "" && len(list.Branches) == 0 && len(list.GPUs) == 0 {
		return list, fault.New(
			fault.InputMissing,
			fmt.Sprintf("COS build %s has no driver list", k),
			"write exact driver versions into the wish list",
		)
	}
	return list, nil
}

// ReadyTimes returns percentiles of the time from a kernel's discovery to the publication of a cell, over the given
// days.
func (c *Catalogue) ReadyTimes(ctx context.Context, days int) (api.ReadyDuration, error) {
	took, err := c.Store.ReadyTimes(ctx, c.Now().AddDate(0, 0, -days))
	return durations(took), err
}

// durations computes percentiles of sorted durations.
func durations(took []time.Duration) api.ReadyDuration {
	n := len(took)
	if n == 0 {
		return api.ReadyDuration{}
	}
	at := func(percent int) float64 { return took[min(n-1, n*percent/100)].Seconds() }
	return api.ReadyDuration{Count: n, P50: at(50), P90: at(90), P99: at(99), Max: took[n-1].Seconds()}
}

// maxPools is the maximum number of pools of one preflight.
const maxPools = 100

// Preflight says for each node pool whether its nodes would find their driver after an upgrade to a COS build.
func (c *Catalogue) Preflight(ctx context.Context, q api.PreflightRequest) (api.Preflight, error) {
	if n := len(q.Pools); n == 0 || n > maxPools {
		return api.Preflight{}, fault.New(fault.Usage,
			fmt.Sprintf("the request has %d pools; want 1 to %d pools", n, maxPools), "")
	}
	out := api.Preflight{May: true}
	for _, pool := range q.Pools {
		if err := checkLine("name of a pool", pool.Name); err != nil {
			return out, fault.Wrap(fault.Usage, err, "")
		}
		asked := pool
		none, err := c.fillBuildID(ctx, &pool)
		if err != nil {
			return out, err
		}
		var r api.Resolution
		if none != nil {
			r = *none
		} else if r, err = c.Resolve(ctx, pool.BuildID, pool.Board, pool.Driver, pool.Flavour, ""); err != nil {
			return out, err
		}
		v := api.PoolVerdict{Pool: asked, May: r.State == api.Published, Resolution: r}
		out.May = out.May && v.May
		out.Pools = append(out.Pools, v)
	}
	return out, nil
}
