package catalogue

import (
	"context"
	"fmt"
	"slices"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Auto is the flavour wish that leaves the choice to the server: a published
// artifact of either flavour if there is one; else what NVIDIA recommends,
// which is open from branch R560 on and proprietary before.
const Auto = "auto"

// NVIDIA's own turning points: R560 made the open modules the recommended
// ones, and R620 is the first branch without proprietary ones.
const (
	firstOpenPreferred = 560
	firstOpenOnly      = 620
)

// wish is a request whose form has been checked.
type wish struct {
	kernel   target.Kernel
	driver   target.Wish
	flavours []target.Flavour // nil is auto
}

func parseWish(buildID, board, driver, flavour string) (wish, error) {
	k, err := target.ParseKernel(buildID, board)
	if err != nil {
		return wish{}, fault.Wrap(fault.Usage, err, "BUILD_ID is in /etc/os-release, the board in /etc/lsb-release")
	}
	if driver == "" {
		driver = string(target.Default)
	}
	d, err := target.ParseWish(driver)
	if err != nil {
		return wish{}, fault.Wrap(fault.Usage, err, "list what is known: server drivers")
	}
	w := wish{kernel: k, driver: d}
	if flavour == "" || flavour == Auto {
		return w, nil
	}
	f, err := target.ParseFlavour(flavour)
	if err != nil {
		return wish{}, fault.Wrap(fault.Usage, fmt.Errorf("flavour %q: want auto, proprietary or open", flavour), "auto lets the server choose")
	}
	w.flavours = []target.Flavour{f}
	return w, nil
}

// candidates returns the flavours to look at, the preferred one first.
func (w wish) candidates(version string) []target.Flavour {
	switch {
	case w.flavours != nil:
		return w.flavours
	case major(version) >= firstOpenPreferred:
		return []target.Flavour{target.Open, target.Proprietary}
	}
	return []target.Flavour{target.Proprietary, target.Open}
}

// version turns a wish into a version by the kernel's own lists. The reason
// says why there is none.
func (w wish) version(k api.Kernel, known bool) (version, reason, hint string) {
	if v, ok := w.driver.Exact(); ok {
		return v, "", ""
	}
	if !known {
		return "", "this server does not know COS build " + w.kernel.String(),
			"ask for an exact driver version, or start the server with a --kernel-mirror that has this build"
	}
	switch w.driver {
	case target.Default:
		version = k.Default
	case target.Latest:
		version = k.Latest
	default:
		version = k.Branches[string(w.driver)]
	}
	if version == "" {
		return "", fmt.Sprintf("COS build %s names no driver for %q", w.kernel, w.driver), "ask for an exact driver version"
	}
	return version, "", ""
}

// Resolve answers what a node should run. Only a question whose form is wrong
// is an error; everything else is a state with a reason.
func (c *Catalogue) Resolve(ctx context.Context, buildID, board, driver, flavour, release string) (api.Resolution, error) {
	w, err := parseWish(buildID, board, driver, flavour)
	if err != nil {
		return api.Resolution{}, fmt.Errorf("resolve: %w", err)
	}
	k, known, err := c.Store.Kernel(ctx, buildID, board)
	if err != nil {
		return api.Resolution{}, err
	}
	if !known {
		k.Kernel = w.kernel
	}
	if release != "" && k.Release != "" && release != k.Release {
		return api.Resolution{Kernel: k.Kernel, State: api.Unsupported,
			Reason: fmt.Sprintf("the node runs kernel %s, but COS build %s has %s", release, w.kernel, k.Release),
			Hint:   "boot the kernel that the COS build came with"}, nil
	}
	version, reason, hint := w.version(k, known)
	if version == "" {
		return api.Resolution{Kernel: k.Kernel, State: api.Unknown, Reason: reason, Hint: hint}, nil
	}
	rel, err := c.release(ctx, version)
	if err != nil {
		return api.Resolution{}, err
	}
	var best api.Resolution
	for _, f := range w.candidates(version) {
		r, err := c.cell(ctx, k, rel, target.Driver{Version: version, Flavour: f})
		if err != nil {
			return api.Resolution{}, err
		}
		if best.State == "" || rank(r.State) < rank(best.State) {
			best = r
		}
	}
	return best, nil
}

// rank orders the states of two flavours of one wish: the nearer to a usable
// artifact, the better.
func rank(s api.State) int {
	return slices.Index([]api.State{api.Published, api.Building, api.Queued, api.Yanked, api.Failed, api.Cancelled, api.Unknown, api.Unsupported}, s)
}

// release finds what is known of a driver version.
func (c *Catalogue) release(ctx context.Context, version string) (api.DriverRelease, error) {
	all, err := c.Store.Drivers(ctx)
	if err != nil {
		return api.DriverRelease{}, err
	}
	for _, d := range all {
		if d.Version == version {
			return d, nil
		}
	}
	return api.DriverRelease{Version: version, Branch: target.Branch(version)}, nil
}

func (c *Catalogue) cell(ctx context.Context, k api.Kernel, rel api.DriverRelease, d target.Driver) (api.Resolution, error) {
	artifacts, err := c.Store.Artifacts(ctx, d)
	if err != nil {
		return api.Resolution{}, err
	}
	newest, err := c.Store.NewestBuild(ctx, k.BuildID, k.Board, d)
	if err != nil {
		return api.Resolution{}, err
	}
	return judge(k, rel, d, artifacts, newest), nil
}

// never says why a cell can never be built; "" when nothing speaks against it.
func never(rel api.DriverRelease, d target.Driver) string {
	switch {
	case d.Flavour == target.Proprietary && major(d.Version) >= firstOpenOnly:
		return fmt.Sprintf("branch %s has open modules only", d.Branch())
	case len(rel.Flavours) > 0 && !slices.Contains(rel.Flavours, d.Flavour):
		return fmt.Sprintf("release %s has no %s modules", d.Version, d.Flavour)
	}
	return ""
}

// judge says where a cell stands, given every artifact of the driver and the
// newest build of the cell. An artifact counts for a kernel only when it is
// attested for that very COS build, and, where the kernel's fingerprint is
// known, made for that fingerprint.
func judge(k api.Kernel, rel api.DriverRelease, d target.Driver, artifacts []api.Artifact, newest *api.Build) api.Resolution {
	r := api.Resolution{Kernel: k.Kernel, Driver: d, Build: newest}
	var yanked, sibling *api.Artifact
	for i := range artifacts {
		a := &artifacts[i]
		if a.Driver != d || (k.Fingerprint != "" && a.Fingerprint != k.Fingerprint) {
			continue
		}
		attested := slices.ContainsFunc(a.Kernels, func(x target.Kernel) bool { return x.BuildID == k.BuildID && x.Board == k.Board })
		switch {
		case attested && a.State == api.Published:
			r.State, r.Repository, r.Digest = api.Published, a.Repository, a.Digest
			return r
		case attested && yanked == nil:
			yanked = a
		case !attested && a.State == api.Published && k.Fingerprint != "" && sibling == nil:
			sibling = a
		}
	}
	request := fmt.Sprintf("ask for it: server request --build-id %s --board %s --driver %s --flavour %s", k.BuildID, k.Board, d.Version, d.Flavour)
	open := newest != nil && (newest.State == api.Queued || newest.State == api.Building)
	switch {
	case open && newest.State == api.Building:
		r.State, r.Reason, r.Hint = api.Building, fmt.Sprintf("build %d is in phase %s", newest.ID, orText(newest.Phase, "start")), "ask again in a minute"
	case open:
		r.State, r.Reason, r.Hint = api.Queued, fmt.Sprintf("build %d waits for a builder", newest.ID), "start one: builder work"
		if newest.Class != "" {
			r.Reason = fmt.Sprintf("build %d waits for its next try after %s: %s", newest.ID, newest.Class, newest.Error)
		}
	case yanked != nil:
		r.State, r.Reason, r.Hint = api.Yanked, yanked.Reason, "choose another driver version"
	case never(rel, d) != "":
		r.State, r.Reason, r.Hint = api.Unsupported, never(rel, d), "choose the other flavour, or another version"
	case newest != nil && newest.State == api.Failed && newest.Class == fault.Unsupported.String():
		r.State, r.Reason, r.Hint = api.Unsupported, newest.Error, orText(newest.Hint, "choose the other flavour, or another version")
	case newest != nil && newest.State == api.Failed:
		r.State, r.Reason, r.Hint = api.Failed, newest.Class+": "+newest.Error,
			orText(newest.Hint, fmt.Sprintf("read its log: server build %d --log", newest.ID))
	case newest != nil && newest.State == api.Cancelled:
		r.State, r.Reason, r.Hint = api.Cancelled, fmt.Sprintf("build %d was called off", newest.ID), request
	case sibling != nil:
		r.State, r.Reason, r.Hint = api.Unknown, fmt.Sprintf("%s has the same fingerprint and was made for %s, but nobody attested it for this build; a builder does that without compiling",
			sibling.Digest, sibling.Kernels[0]), request
	default:
		r.State, r.Reason, r.Hint = api.Unknown, "nobody asked for this build yet", request
	}
	return r
}

func orText(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// Cell is one field of the matrix.
type Cell struct {
	api.Resolution
	// Label is the flavour's name.
	Flavour target.Flavour
}

// Matrix is kernels by driver versions; Cells[i][j] has both flavours.
type Matrix struct {
	Kernels []api.Kernel
	Drivers []api.DriverRelease
	Cells   [][][]Cell
}

// Matrix computes where every cell stands, over a bounded number of reads.
func (c *Catalogue) Matrix(ctx context.Context) (*Matrix, error) {
	kernels, err := c.Kernels(ctx)
	if err != nil {
		return nil, err
	}
	drivers, err := c.Drivers(ctx)
	if err != nil {
		return nil, err
	}
	artifacts, err := c.Artifacts(ctx)
	if err != nil {
		return nil, err
	}
	builds, err := c.Store.NewestBuilds(ctx)
	if err != nil {
		return nil, err
	}
	type cellKey struct {
		buildID, board string
		driver         target.Driver
	}
	newest := map[cellKey]*api.Build{}
	for i, b := range builds {
		newest[cellKey{b.Kernel.BuildID, b.Kernel.Board, b.Driver}] = &builds[i]
		if !slices.ContainsFunc(drivers, func(d api.DriverRelease) bool { return d.Version == b.Driver.Version }) {
			drivers = append(drivers, api.DriverRelease{Version: b.Driver.Version, Branch: b.Driver.Branch()})
		}
		if !slices.ContainsFunc(kernels, func(k api.Kernel) bool { return k.String() == b.Kernel.String() }) {
			kernels = append(kernels, api.Kernel{Kernel: b.Kernel})
		}
	}
	byDriver := map[target.Driver][]api.Artifact{}
	for _, a := range artifacts {
		byDriver[a.Driver] = append(byDriver[a.Driver], a)
	}
	slices.SortFunc(drivers, func(a, b api.DriverRelease) int { return target.CompareVersions(b.Version, a.Version) })
	m := &Matrix{Kernels: kernels, Drivers: drivers, Cells: make([][][]Cell, len(kernels))}
	for i, k := range kernels {
		m.Cells[i] = make([][]Cell, len(drivers))
		for j, rel := range drivers {
			for _, f := range []target.Flavour{target.Proprietary, target.Open} {
				d := target.Driver{Version: rel.Version, Flavour: f}
				r := judge(k, rel, d, byDriver[d], newest[cellKey{k.BuildID, k.Board, d}])
				m.Cells[i][j] = append(m.Cells[i][j], Cell{r, f})
			}
		}
	}
	return m, nil
}
