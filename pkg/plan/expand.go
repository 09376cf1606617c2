package plan

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// bucket has the methods of a COS release bucket that Expand needs.
type bucket interface {
	// BuildIDs returns the BUILD_IDs, newest first, from one listing of the bucket. BuildsOf lists once more for each
	// BUILD_ID.
	BuildIDs(ctx context.Context) ([]string, error)
	BuildsOf(ctx context.Context, ids []string) ([]target.Kernel, error)
	Drivers(ctx context.Context, k target.Kernel) (cosbucket.DriverList, error)
}

// Cell is one wanted kernel with one wanted driver.
type Cell struct {
	// Kernel has BUILD_ID, board, architecture and, if it is known, the milestone. If Problem is set, BUILD_ID may be "".
	Kernel target.Kernel `json:"kernel"`
	// Driver has an exact version. If Problem is set, version or flavour may be "".
	Driver target.Driver `json:"driver"`
	// Asked has the wishes that the cell comes from, such as "milestone 109" or R535.
	Asked []string `json:"asked,omitempty"`
	// Labels are the labels that the wish list gives to the driver in buckets.
	Labels []string `json:"labels,omitempty"`
	// If EarlyWarning is true, a failure of the cell is reported, but raises no alarm.
	EarlyWarning bool `json:"earlyWarning,omitempty"`
	// Listed is true if the flavour comes from the wish list's general list of flavours. If Listed is true, a release
	// that lacks the flavour is not a failure.
	Listed bool `json:"-"`
	// Problem says why the cell cannot be built; nil means that it can.
	Problem *Problem `json:"problem,omitempty"`
}

// String returns a short name of the cell, for people and for the names of log files.
func (c Cell) String() string {
	return c.Kernel.BuildID + "-" + c.Kernel.Board + "-" + c.Driver.String()
}

// Problem is the reason why a wish expands to no cell.
type Problem struct {
	Err error `json:"-"`
	// Unavailable is true if the problem is not a failure: for the same wish, COS offers a version to other kernels.
	Unavailable bool `json:"unavailable,omitempty"`
}

// MarshalText returns the text of the error.
func (p *Problem) MarshalText() ([]byte, error) { return []byte(p.Err.Error()), nil }

// Plan is the result of the expansion of a wish list.
type Plan struct {
	// Cells has each cell once, in the order of the wish list. The cells of early warnings come last.
	Cells []Cell `json:"cells"`
	// Notes are messages for the author of the wish list.
	Notes []string `json:"notes,omitempty"`
}

// Labels returns the driver version of each label in the wish list, for each kernel with cells. A version is "" if the
// bucket has none for that driver and kernel.
func (p *Plan) Labels() map[target.Kernel]map[string]string {
	all := map[target.Kernel]map[string]string{}
	for _, c := range p.Cells {
		if c.Kernel.BuildID == "" {
			continue
		}
		if all[c.Kernel] == nil {
			all[c.Kernel] = map[string]string{}
		}
		for _, label := range c.Labels {
			all[c.Kernel][label] = c.Driver.Version
		}
	}
	return all
}

// maxRequests is the largest number of simultaneous requests to the bucket.
const maxRequests = 8

// Expand returns the cells of a wish list. If a kernel or a driver cannot be resolved, only its cell has a Problem.
// images may be nil.
func Expand(ctx context.Context, w *Wish, b bucket, images *ImageMap) (*Plan, error) {
	e := &expander{wish: w, bucket: b, images: images, unused: map[int]bool{}}
	for i := range w.Exclude {
		e.unused[i] = true
	}
	kernels := e.kernels(ctx)
	lists := e.readLists(ctx, kernels)
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("expand wish list: %w", err)
	}
	cells := e.cells(kernels, lists)
	if len(cells) == 0 {
		return nil, fault.New(fault.Usage, "expand wish list: every cell is excluded",
			"remove a rule from exclude in the wish list")
	}
	if len(cells) > maxCells {
		return nil, fault.New(fault.Usage, fmt.Sprintf("expand wish list: the list has %d cells; want at most %d cells",
			len(cells), maxCells),
			"ask for fewer kernels or drivers in one file")
	}
	slices.SortStableFunc(cells, func(a, b Cell) int {
		switch {
		case a.EarlyWarning == b.EarlyWarning:
			return 0
		case b.EarlyWarning:
			return -1
		}
		return 1
	})
	p := &Plan{Cells: cells}
	for i, x := range w.Exclude {
		if e.unused[i] {
			p.Notes = append(p.Notes, fmt.Sprintf("exclude[%d] (line %d) excludes nothing", i, x.line))
		}
	}
	return p, nil
}

type expander struct {
	wish   *Wish
	bucket bucket
	images *ImageMap
	unused map[int]bool // indexes of the exclude rules that have removed no cell so far
}

// wantedKernel is one kernel of the wish list, or the error if no kernel was found for an entry.
type wantedKernel struct {
	kernel target.Kernel
	asked  string
	early  bool
	err    error
}

// kernels resolves the wish list's entries for kernels. A kernel that several entries ask for appears once. Such a
// kernel is an early warning only if all these entries are early warnings.
func (e *expander) kernels(ctx context.Context) []wantedKernel {
	var all []wantedKernel
	var known *listing
	for _, entry := range e.wish.Kernels {
		boards := e.wish.boards()
		if entry.Board != "" {
			boards = []string{entry.Board}
		}
		asked := entry.String()
		if entry.Build == "" && known == nil {
			known = e.listBuilds(ctx)
		}
		for _, board := range boards {
			add := func(k target.Kernel, err error) {
				k.Milestone = e.images.milestone(k.BuildID)
				all = merge(all, wantedKernel{kernel: k, asked: asked, early: entry.EarlyWarning, err: err})
			}
			if entry.Build != "" {
				k, err := target.ParseKernel(entry.Build, board)
				add(k, err)
				continue
			}
			none := target.Kernel{Board: board, Arch: target.BoardArch(board)}
			found, err := e.newestKernels(ctx, known, entry, board)
			if err != nil {
				add(none, err)
				continue
			}
			if len(found) == 0 {
				add(none, fault.New(fault.InputMissing,
					fmt.Sprintf("%s: the bucket has no such COS build for board %s", asked, board),
					"correct the milestone or the board in the wish list; to see its cells, run: builder plan"))
			}
			for _, k := range found {
				add(k, nil)
			}
		}
	}
	return all
}

// String describes the entry for an error or a table.
func (k Kernel) String() string {
	var s string
	switch {
	case k.Build != "":
		return "build " + k.Build
	case k.Milestone != 0:
		s = fmt.Sprintf("milestone %d, latest %d", k.Milestone, k.Latest)
	default:
		s = fmt.Sprintf("latest %d", k.Latest)
	}
	if k.Released {
		s += " released"
	}
	return s
}

func merge(all []wantedKernel, w wantedKernel) []wantedKernel {
	for i, have := range all {
		if have.kernel.String() == w.kernel.String() && have.kernel.BuildID != "" {
			all[i].early = have.early && w.early
			return all
		}
	}
	return append(all, w)
}

// listing caches the bucket's COS builds. It reads boards only for a build that a wish may want, because a bucket has
// thousands of COS builds.
type listing struct {
	ids    []string // newest first
	boards map[string][]target.Kernel
	err    error
}

// listBuilds returns the COS builds of the bucket. A plain web server has no listing; its COS builds come from the
// image map.
func (e *expander) listBuilds(ctx context.Context) *listing {
	l := &listing{boards: map[string][]target.Kernel{}}
	l.ids, l.err = e.bucket.BuildIDs(ctx)
	switch {
	case l.err == nil || !fault.Is(l.err, fault.Unsupported):
	case e.images == nil:
		l.err = fault.Wrap(fault.Unsupported, l.err,
			"in the wish list, either give exact COS builds, or set imageMap to the URL of a list of COS images")
	default:
		l.ids, l.err = nil, nil
		for _, k := range e.images.kernels {
			l.ids = append(l.ids, k.BuildID)
			l.boards[k.BuildID] = append(l.boards[k.BuildID], k)
		}
		slices.SortFunc(l.ids, func(a, b string) int { return target.CompareVersions(b, a) })
		l.ids = slices.Compact(l.ids)
	}
	return l
}

// buildsPerCall is the number of COS builds whose boards one call of BuildsOf asks for.
const buildsPerCall = 8

// newestKernels returns the newest kernels of a board that match an entry, newest first.
func (e *expander) newestKernels(ctx context.Context, l *listing, entry Kernel, board string) (found []target.Kernel,
	err error) {
	if l.err != nil {
		return nil, l.err
	}
	var candidates []string
	for _, id := range l.ids {
		name := target.Kernel{BuildID: id, Board: board}.String()
		if entry.Milestone == 0 || e.images.milestone(id) == entry.Milestone {
			if !entry.Released || e.images != nil && e.images.released[name] {
				candidates = append(candidates, id)
			}
		}
	}
	for some := range slices.Chunk(candidates, buildsPerCall) {
		unknown := slices.DeleteFunc(slices.Clone(some), func(id string) bool { _, ok := l.boards[id]; return ok })
		if len(unknown) > 0 {
			kernels, err := e.bucket.BuildsOf(ctx, unknown)
			if err != nil {
				return nil, err
			}
			for _, id := range unknown {
				l.boards[id] = nil
			}
			for _, k := range kernels {
				l.boards[k.BuildID] = append(l.boards[k.BuildID], k)
			}
		}
		for _, id := range some {
			for _, k := range l.boards[id] {
				if k.Board == board && len(found) < entry.Latest {
					found = append(found, k)
				}
			}
		}
		if len(found) == entry.Latest {
			break
		}
	}
	return found, nil
}

// answer is the bucket's list of drivers for one kernel, or the error of reading it.
type answer struct {
	list cosbucket.DriverList
	err  error
}

// readLists reads the bucket's driver list of each kernel, unless every wish is an exact version.
func (e *expander) readLists(ctx context.Context, kernels []wantedKernel) []answer {
	all := make([]answer, len(kernels))
	if !slices.ContainsFunc(e.wish.Drivers, func(d Driver) bool { _, exact := d.Wish.Exact(); return !exact }) {
		return all
	}
	var group errgroup.Group
	group.SetLimit(maxRequests)
	for i, k := range kernels {
		if k.err != nil {
			continue
		}
		group.Go(func() error {
			all[i].list, all[i].err = e.bucket.Drivers(ctx, k.kernel)
			return nil
		})
	}
	_ = group.Wait() // the functions above return nil
	return all
}

// cells combines every kernel with every driver and flavour.
func (e *expander) cells(kernels []wantedKernel, lists []answer) []Cell {
	var all []Cell
	index := map[string]int{}
	add := func(c Cell, asked string) {
		if e.isExcluded(c, asked) {
			return
		}
		key := c.String()
		if c.Kernel.BuildID == "" || c.Driver.Version == "" {
			key += "\n" + asked // two wishes without a version stay two cells
		}
		i, ok := index[key]
		if !ok {
			i = len(all)
			index[key] = i
			all = append(all, c)
			all[i].Labels = nil
		}
		have := &all[i]
		have.Labels = append(have.Labels, c.Labels...)
		have.Listed = have.Listed && c.Listed
		if !slices.Contains(have.Asked, asked) {
			have.Asked = append(have.Asked, asked)
		}
	}
	met := map[target.Wish]bool{} // wishes that have a version for at least one kernel
	for i, k := range kernels {
		if k.err != nil {
			add(Cell{Kernel: k.kernel, EarlyWarning: k.early, Problem: &Problem{Err: k.err}}, k.asked)
			continue
		}
		for _, d := range e.wish.Drivers {
			flavours, listed := d.Flavours, false
			if len(flavours) == 0 {
				flavours, listed = e.wish.Flavours, true
			}
			version, problem := choose(d.Wish, lists[i])
			if problem != nil {
				add(Cell{Kernel: k.kernel, EarlyWarning: k.early, Labels: d.Labels, Problem: problem}, string(d.Wish))
				continue
			}
			met[d.Wish] = true
			for _, f := range flavours {
				c := Cell{Kernel: k.kernel, Driver: target.Driver{Version: version, Flavour: f}, EarlyWarning: k.early,
					Listed: listed}
				if f == target.Open { // COS's installer takes only the open flavour from a bucket
					c.Labels = d.Labels
				}
				add(c, string(d.Wish))
			}
		}
	}
	// A wish without a version for any kernel is probably a mistake in the file, so it counts as a failure.
	for i := range all {
		if p := all[i].Problem; p != nil && p.Unavailable &&
			!slices.ContainsFunc(all[i].Asked, func(w string) bool { return met[target.Wish(w)] }) {
			p.Unavailable = false
		}
	}
	return all
}

// choose returns the driver version that a wish stands for on one kernel.
func choose(w target.Wish, a answer) (string, *Problem) {
	version, exact := w.Exact()
	if exact {
		return version, nil
	}
	if a.err != nil { // a very new COS build has no driver list yet
		return "", &Problem{Err: fmt.Errorf("driver %s: %w", w, a.err), Unavailable: fault.Is(a.err, fault.InputMissing)}
	}
	version, err := a.list.Choose(w)
	if err != nil {
		return "", &Problem{Err: err, Unavailable: fault.Is(err, fault.Unsupported)}
	}
	return version, nil
}

// isExcluded reports whether an exclude rule removes a cell. A cell without a version is compared by the text of its
// wish.
func (e *expander) isExcluded(c Cell, asked string) bool {
	if c.Problem != nil && c.Kernel.BuildID == "" {
		return false
	}
	out := false
	for i, x := range e.wish.Exclude {
		driver := x.Driver == "" || x.Driver == c.Driver.Version || c.Driver.Version != "" && x.Driver == c.Driver.Branch()
		if c.Problem != nil {
			driver = x.Driver == "" || x.Driver == asked
		}
		if driver && (x.Build == "" || x.Build == c.Kernel.BuildID) &&
			(x.Milestone == 0 || x.Milestone == c.Kernel.Milestone) &&
			(x.Board == "" || x.Board == c.Kernel.Board) && (x.Flavour == "" || x.Flavour == c.Driver.Flavour) {
			out, e.unused[i] = true, false
		}
	}
	return out
}
