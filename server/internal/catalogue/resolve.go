package catalogue

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// Auto is the flavour of a request that lets the server choose. The server chooses the flavour whose state is nearest
// to a usable artifact. Between equal states, NVIDIA's recommendation decides: open from branch R560 on, proprietary
// before.
const Auto = "auto"

// NVIDIA recommends the open modules from R560 on, and releases no proprietary modules from R620 on.
const (
	firstOpenPreferred = 560
	firstOpenOnly      = 620
)

// checkedRequest is a request whose texts were checked and parsed.
type checkedRequest struct {
	kernel   target.Kernel
	driver   target.Wish
	flavours []target.Flavour // nil means auto
}

func parseWish(buildID, board, driver, flavour string) (checkedRequest, error) {
	k, err := target.ParseKernel(buildID, board)
	if err != nil {
		return checkedRequest{}, fault.Wrap(fault.Usage, err,
			"take BUILD_ID from the node's /etc/os-release, and the board from its /etc/lsb-release")
	}
	if driver == "" {
		driver = string(target.Default)
	}
	d, err := target.ParseGPUWish(driver)
	if err != nil {
		return checkedRequest{}, fault.Wrap(fault.Usage, err, "take a version from the list of known drivers: server drivers")
	}
	w := checkedRequest{kernel: k, driver: d}
	if flavour == "" || flavour == Auto {
		return w, nil
	}
	f, err := target.ParseFlavour(flavour)
	if err != nil {
		return checkedRequest{}, fault.Wrap(
			fault.Usage,
			fmt.Errorf("flavour %q: want auto, proprietary or open", flavour),
			"use auto to let the server choose",
		)
	}
	w.flavours = []target.Flavour{f}
	return w, nil
}

// candidates returns the allowed flavours, preferred first.
func (w checkedRequest) candidates(version string) []target.Flavour {
	switch {
	case w.flavours != nil:
		return w.flavours
	case major(version) >= firstOpenPreferred:
		return []target.Flavour{target.Open, target.Proprietary}
	}
	return []target.Flavour{target.Proprietary, target.Open}
}

// version returns the driver version that the request asks for. A wish such as default, latest or R535 is looked up in
// the kernel's driver lists. If there is no version, version returns a reason and a hint.
func (w checkedRequest) version(k api.Kernel, known bool) (version, reason, hint string) {
	if v, ok := w.driver.Exact(); ok {
		return v, "", ""
	}
	if !known {
		return "", "this server does not know kernel " + w.kernel.String() + " yet",
			"if the server has --kernel-mirror, ask again in a minute, when it has looked up the kernel; " +
				"otherwise ask for an exact driver version"
	}
	version, err := lists(k).Choose(w.driver)
	if err != nil {
		return "", fmt.Sprintf("the driver lists of kernel %s have no driver for %q", w.kernel, w.driver), fault.Hint(err)
	}
	return version, "", ""
}

// Resolve returns the state of the cell that a node asks for, and the artifact to run if there is one. It returns an
// error only for a malformed question or a failure of the store.
func (c *Catalogue) Resolve(
	ctx context.Context,
	buildID, board, driver, flavour, release string,
) (api.Resolution, error) {
	w, err := parseWish(buildID, board, driver, flavour)
	if err != nil {
		return api.Resolution{}, fmt.Errorf("resolve: %w", err)
	}
	cells, err := c.Store.KernelCells(ctx, buildID, board)
	if err != nil {
		return api.Resolution{}, err
	}
	known := cells != nil
	if !known {
		cells = &store.KernelCells{Kernel: api.Kernel{Kernel: w.kernel}}
		c.lookUpLater(w.kernel)
	}
	k := cells.Kernel
	if release != "" && k.Release != "" && release != k.Release {
		return api.Resolution{Kernel: k.Kernel, State: api.Unsupported,
			Reason: fmt.Sprintf("the node runs kernel release %s, but kernel %s has release %s", release, w.kernel, k.Release),
			Hint:   "boot the node with the kernel of this COS build"}, nil
	}
	version, reason, hint := w.version(k, known)
	if version == "" {
		return api.Resolution{Kernel: k.Kernel, State: api.Unknown, Reason: reason, Hint: hint}, nil
	}
	rel, err := c.Store.Driver(ctx, version)
	if err != nil {
		return api.Resolution{}, err
	}
	var best api.Resolution
	for _, f := range w.candidates(version) {
		d := target.Driver{Version: version, Flavour: f}
		r := resolution(k, rel, d, cells.Facts(d))
		if best.State == "" || rank(r.State) < rank(best.State) {
			best = r
		}
	}
	c.addForecast(&best)
	return best, nil
}

// rank orders the states of two flavours. A lower number is nearer to a usable artifact.
func rank(s api.State) int {
	return slices.Index(
		[]api.State{
			api.Published,
			api.Building,
			api.Queued,
			api.Yanked,
			api.Quarantined,
			api.Failed,
			api.Cancelled,
			api.Unknown,
			api.Unsupported,
		},
		s,
	)
}

// whyUnsupported returns why a cell can never be built, or "" if it can be built.
func whyUnsupported(rel api.DriverRelease, d target.Driver) string {
	switch {
	case d.Flavour == target.Proprietary && major(d.Version) >= firstOpenOnly:
		return fmt.Sprintf("branch %s has open modules only", d.Branch())
	case len(rel.Flavours) > 0 && !slices.Contains(rel.Flavours, d.Flavour):
		return fmt.Sprintf("NVIDIA's release %s has no %s modules", d.Version, d.Flavour)
	}
	return ""
}

// resolution computes the state of a cell. An artifact fits only if it is attested for the kernel's COS build. It must
// also have the kernel's fingerprint, if that is known.
func resolution(k api.Kernel, rel api.DriverRelease, d target.Driver, facts store.Facts) api.Resolution {
	newest := facts.Newest
	r := api.Resolution{Kernel: k.Kernel, Driver: d, Build: newest}
	var yanked, sibling *store.Candidate
	for i := range facts.Artifacts {
		a := &facts.Artifacts[i]
		switch {
		case a.Driver != d || k.Fingerprint != "" && a.Fingerprint != k.Fingerprint:
		case a.Attested && a.State == api.Published:
			r.State, r.Repository, r.Digest = api.Published, a.Repository, a.Digest
			if !a.AttestedAt.IsZero() {
				r.ReadyAt = &a.AttestedAt
			}
			return r
		case a.Attested:
			if yanked == nil || a.State == api.Yanked && yanked.State != api.Yanked {
				yanked = a
			}
		case !a.Attested && a.State == api.Published && k.Fingerprint != "" && sibling == nil:
			sibling = a
		}
	}
	switch {
	case isOpen(newest) && newest.State == api.Building:
		r.State, r.Reason, r.Hint = api.Building, fmt.Sprintf(
			"build %d runs and is in phase %s",
			newest.ID,
			orText(newest.Phase, "start"),
		), "ask again in a minute"
	case isOpen(newest):
		r.State, r.Reason, r.Hint = api.Queued, fmt.Sprintf(
			"build %d waits for a builder",
			newest.ID,
		), "start a builder: builder work"
		if newest.Class != "" {
			r.Reason = fmt.Sprintf("build %d waits for its next attempt; the last attempt ended with %s: %s",
				newest.ID, newest.Class, newest.Error)
		}
	case yanked != nil:
		setWithdrawn(&r, yanked)
	case whyUnsupported(rel, d) != "":
		r.State, r.Reason = api.Unsupported, whyUnsupported(rel, d)
		r.Hint = "choose another flavour or another driver version"
	case newest != nil && newest.State == api.Failed && newest.Class == fault.Unsupported.String():
		r.State, r.Reason, r.Hint = api.Unsupported, newest.Error, orText(
			newest.Hint,
			"choose another flavour or another driver version",
		)
	case newest != nil && newest.State == api.Failed:
		r.State, r.Reason, r.Hint = api.Failed, newest.Class+": "+newest.Error,
			orText(newest.Hint, fmt.Sprintf("read the log of the build: server build %d --log", newest.ID))
		addNoTry(&r, k)
	case newest != nil && newest.State == api.Cancelled:
		r.State, r.Reason, r.Hint = api.Cancelled, fmt.Sprintf("build %d was cancelled", newest.ID), requestHint(k, d)
	case sibling != nil:
		r.State, r.Reason, r.Hint = api.Unknown, fmt.Sprintf(
			"artifact %s has this kernel's ABI fingerprint, but no kernel match for this COS build; "+
				"a builder can add the kernel match without compiling",
			sibling.Digest,
		), requestHint(k, d)
	default:
		r.State, r.Reason, r.Hint = api.Unknown, "this cell was not requested yet", requestHint(k, d)
	}
	return r
}

// requestHint returns the hint how to request a build of the cell.
func requestHint(k api.Kernel, d target.Driver) string {
	return fmt.Sprintf("request a build: server request --build-id %s --board %s --driver %s --flavour %s",
		k.BuildID, k.Board, d.Version, d.Flavour)
}

// Matrix is a page of kernels with a column for each driver version. Cells[i][j] are the cells of kernel i and version
// j, one for each flavour.
type Matrix struct {
	Kernels []api.Kernel
	Drivers []api.DriverRelease
	Cells   [][][]api.Resolution
	// Folded are the drivers without a column: nobody requested them for these kernels, or the matrix is full.
	Folded []api.DriverRelease
	// Next is the cursor of the next page of kernels; "" means that there is none.
	Next string
}

// maxColumns is the maximum number of driver versions in a matrix. A reader cannot compare more.
const maxColumns = 16

// DriverFilter chooses the drivers of a matrix. The zero value chooses the drivers that were requested for a kernel of
// the page.
type DriverFilter struct {
	// Text is a branch (R535, 535), or the beginning of a version; "" means any driver.
	Text string
	// All is true if drivers that nobody asked for are included, too.
	All bool
}

func (f DriverFilter) matches(d api.DriverRelease) bool {
	text := strings.TrimPrefix(f.Text, "R")
	return strings.HasPrefix(d.Version, text)
}

// Matrix computes the state of every cell for a page of kernels.
func (c *Catalogue) Matrix(ctx context.Context, f store.KernelFilter, d DriverFilter, p store.Page) (*Matrix, error) {
	cells, next, err := c.readPage(ctx, f, p)
	if err != nil {
		return nil, err
	}
	drivers, folded, err := c.columns(ctx, cells, d)
	if err != nil {
		return nil, err
	}
	m := &Matrix{Kernels: make([]api.Kernel, len(cells)), Drivers: drivers, Folded: folded,
		Cells: make([][][]api.Resolution, len(cells)), Next: next}
	for i, kc := range cells {
		k := kc.Kernel
		m.Kernels[i] = k
		m.Cells[i] = make([][]api.Resolution, len(drivers))
		for j, rel := range drivers {
			for _, f := range []target.Flavour{target.Proprietary, target.Open} {
				d := target.Driver{Version: rel.Version, Flavour: f}
				r := resolution(k, rel, d, kc.Facts(d))
				m.Cells[i][j] = append(m.Cells[i][j], r)
			}
		}
	}
	return m, nil
}

// columns returns the drivers of a matrix, newest first, and the other drivers that match the filter.
func (c *Catalogue) columns(
	ctx context.Context,
	cells []*store.KernelCells,
	f DriverFilter,
) (shown, folded []api.DriverRelease, err error) {
	asked := map[string]bool{} // versions with a build or an artifact on one of these kernels
	for _, kc := range cells {
		for d := range kc.Drivers() {
			asked[d.Version] = true
		}
	}
	all := map[string]api.DriverRelease{}
	add := func(v string) {
		if v != "" {
			all[v] = api.DriverRelease{Version: v, Branch: target.Branch(v)}
		}
	}
	for v := range asked {
		add(v)
	}
	for _, kc := range cells {
		for _, v := range kc.Kernel.Branches {
			add(v)
		}
		add(kc.Kernel.Default)
		add(kc.Kernel.Latest)
	}
	newest, _, err := c.Store.Drivers(ctx, store.Page{Limit: MaxLimit})
	if err != nil {
		return nil, nil, err
	}
	for _, d := range newest {
		all[d.Version] = d
	}
	for _, d := range all {
		switch {
		case !f.matches(d):
		case asked[d.Version] || f.All || f.Text != "":
			shown = append(shown, d)
		default:
			folded = append(folded, d)
		}
	}
	byAge := func(a, b api.DriverRelease) int { return target.CompareVersions(b.Version, a.Version) }
	slices.SortFunc(shown, byAge)
	slices.SortFunc(folded, byAge)
	if n := len(shown); n > maxColumns {
		folded, shown = append(shown[maxColumns:n:n], folded...), shown[:maxColumns]
	}
	return shown, folded, nil
}

// MaxLimitCells is the maximum number of kernels on a page of cells. Each kernel has some dozen cells.
const MaxLimitCells = 100

// readPage checks the requested page, and reads its kernels with the facts about their cells. Limit 0 means
// MaxLimitCells / 5.
func (c *Catalogue) readPage(ctx context.Context, f store.KernelFilter, p store.Page) ([]*store.KernelCells, string,
	error) {
	if p.Limit == 0 {
		p.Limit = MaxLimitCells / 5
	}
	if p.Limit < 1 || p.Limit > MaxLimitCells {
		return nil, "", fault.New(
			fault.Usage,
			fmt.Sprintf("limit %d: want 1 to %d kernels", p.Limit, MaxLimitCells),
			"ask for fewer kernels, and follow the Link header to the next page",
		)
	}
	if err := checkFilter(f); err != nil {
		return nil, "", err
	}
	return c.Store.RememberedCells(ctx, f, p)
}

// Cells lists the cells with a build or an artifact, on a page of kernels. If version is not "", it lists only the
// cells with this version. If the filter has a state, it lists only the cells in this state.
func (c *Catalogue) Cells(
	ctx context.Context,
	f store.KernelFilter,
	version string,
	p store.Page,
) ([]api.Resolution, string, error) {
	cells, next, err := c.readPage(ctx, f, p)
	if err != nil {
		return nil, "", err
	}
	all := []api.Resolution{}
	for _, kc := range cells { // cells are sorted already
		for d, facts := range kc.All() {
			if version != "" && version != d.Version {
				continue
			}
			r := resolution(kc.Kernel, api.DriverRelease{Version: d.Version}, d, facts)
			if f.State != "" && r.State != f.State {
				continue
			}
			c.addForecast(&r)
			all = append(all, r)
		}
	}
	return all, next, nil
}

func orText(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
