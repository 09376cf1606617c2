// Package catalogue has the server's rules: which kernels and drivers exist, what a node should run, and which cells
// are built. It has no HTTP and no SQL. It never finds an artifact by kernel release, because several COS builds share
// one.
package catalogue

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// lister lists the content of the catalogue, page by page.
type lister interface {
	Kernels(ctx context.Context, f store.KernelFilter, p store.Page) ([]api.Kernel, string, error)
	Drivers(ctx context.Context, p store.Page) ([]api.DriverRelease, string, error)
	Artifacts(ctx context.Context, f store.ArtifactFilter, p store.Page) ([]api.Artifact, string, error)
	Builds(ctx context.Context, f store.BuildFilter, p store.Page) ([]api.Build, string, error)
	OpenBuilds(ctx context.Context) ([]api.Build, error)
	NextBuilds(ctx context.Context, n int) ([]api.Build, error)
	Withdrawn(ctx context.Context, n int) ([]api.Artifact, error)
	KernelGroups(ctx context.Context) ([]store.KernelGroup, error)
}

// resolver reads the facts that decide the state of cells.
type resolver interface {
	KernelCells(ctx context.Context, buildID, board string) (*store.KernelCells, error)
	Driver(ctx context.Context, version string) (api.DriverRelease, error)
	Cells(ctx context.Context, f store.KernelFilter, p store.Page) ([]*store.KernelCells, string, error)
	RememberedCells(ctx context.Context, f store.KernelFilter, p store.Page) ([]*store.KernelCells, string, error)
}

// writer reads and changes single records. Each use-case writes in one transaction.
type writer interface {
	Artifact(ctx context.Context, digest string) (api.Artifact, error)
	Build(ctx context.Context, id int64) (api.Build, error)
	Write(ctx context.Context, f func(*store.Tx) error) error
}

// wishListReader reads wish lists, and how long their cells took to become ready.
type wishListReader interface {
	WishLists(ctx context.Context) ([]api.WishList, error)
	WishList(ctx context.Context, name string) (api.WishList, error)
	ReadyTimes(ctx context.Context, since time.Time) ([]time.Duration, error)
}

// mirror looks up COS builds that the catalogue lacks.
type mirror interface {
	// Build reads a COS build with all its boards. If the mirror lacks it, the error has kind InputMissing.
	Build(ctx context.Context, buildID string) ([]api.Kernel, error)
}

// Logs stores build logs.
type Logs interface {
	Put(build int64, r io.Reader) error
	Append(build, offset int64, r io.Reader) error
	Get(build int64, live bool) (log io.ReadSeekCloser, size int64, err error)
}

// Enqueuer adds builds to the queue and removes them. A repeated call must change nothing.
type Enqueuer interface {
	Insert(ctx context.Context, job api.BuildJob, priority int) error
	SetPriority(ctx context.Context, build int64, priority int) error
	Cancel(ctx context.Context, build int64) error
}

// Config has the parts and settings of a catalogue.
type Config struct {
	Store interface {
		lister
		resolver
		writer
		wishListReader
		measurer
		warner
		reporter
	}
	Logs  Logs
	Queue Enqueuer
	// Within returns the queue inside a transaction of the store, if both are in one database. nil means two databases,
	// which the sweep of package jobs keeps in agreement.
	Within func(*store.Tx) Enqueuer
	// Mirror looks up kernels that the catalogue lacks. nil means that there is no mirror.
	Mirror mirror
	// Repository is the default repository of artifacts: a path on this server, such as /prebake/driver, or a
	// repository of another registry.
	Repository string
	// HasManifest reports whether a repository of this server has a manifest. The catalogue calls it before it records
	// an artifact there. nil means no check.
	HasManifest func(ctx context.Context, repository, digest string) (bool, error)
	// FreeDeletedTags allows other content for the tags of a manifest that was deleted from this server, and returns these
	// tags. nil means that there are none.
	FreeDeletedTags func(ctx context.Context, digest string) ([]string, error)
	// Public is true if everybody can read this server's registry (--public). The catalogue then records an artifact
	// there only if Redistribute allows it.
	Public       bool
	Redistribute bundle.Redistribution
	// KernelMirror and DriverMirror are the URLs of the buckets from which builders read. If a URL is "", builders use
	// their own setting.
	KernelMirror, DriverMirror string
	// Quarantine is the number of failed nodes within a day that puts an artifact into quarantine. 0 means that there
	// is no quarantine.
	Quarantine int
	Log        *slog.Logger
	// Now returns the current time. nil means time.Now.
	Now func() time.Time
}

// Catalogue has the use-cases as its methods.
type Catalogue struct {
	Config
	unknown  chan target.Kernel
	lookups  lookups
	planning chan struct{} // has room for one request; see Planner
	figures  atomic.Pointer[figures]
}

// New returns a catalogue with the parts and settings of c.
func New(c Config) *Catalogue {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	clock := c.Now
	// Databases store microseconds. Without the rounding, a time in a response would differ from the stored time.
	c.Now = func() time.Time { return clock().UTC().Truncate(time.Microsecond) }
	return &Catalogue{Config: c, unknown: make(chan target.Kernel, maxUnknown), planning: make(chan struct{}, 1)}
}

// DefaultLimit is the number of entries of a page if the client gives none. MaxLimit is the maximum.
const (
	DefaultLimit = 100
	MaxLimit     = 1000
)

// checkPage checks the limit of a page, and replaces 0 by DefaultLimit.
func checkPage(p store.Page) (store.Page, error) {
	if p.Limit == 0 {
		p.Limit = DefaultLimit
	}
	if p.Limit < 1 || p.Limit > MaxLimit {
		return p, fault.New(
			fault.Usage,
			fmt.Sprintf("limit %d: want 1 to %d", p.Limit, MaxLimit),
			"ask for fewer entries, and follow the Link header to the next page",
		)
	}
	return p, nil
}

// listPage checks the requested page and then reads it.
func listPage[F, T any](
	ctx context.Context,
	list func(context.Context, F, store.Page) ([]T, string, error),
	f F,
	p store.Page,
) ([]T, string, error) {
	p, err := checkPage(p)
	if err != nil {
		return nil, "", err
	}
	return list(ctx, f, p)
}

// Kernels lists a page of the known kernels, newest first. next is the cursor of the following page; "" means that
// there is none.
func (c *Catalogue) Kernels(
	ctx context.Context,
	f store.KernelFilter,
	p store.Page,
) (all []api.Kernel, next string, err error) {
	if err := checkFilter(f); err != nil {
		return nil, "", err
	}
	return listPage(ctx, c.Store.Kernels, f, p)
}

// Drivers lists a page of the known driver versions, newest first.
func (c *Catalogue) Drivers(ctx context.Context, p store.Page) (all []api.DriverRelease, next string, err error) {
	p, err = checkPage(p)
	if err != nil {
		return nil, "", err
	}
	return c.Store.Drivers(ctx, p)
}

// Artifacts lists a page of artifacts, newest first, including withdrawn ones.
func (c *Catalogue) Artifacts(
	ctx context.Context,
	f store.ArtifactFilter,
	p store.Page,
) (all []api.Artifact, next string, err error) {
	if f.State != "" && f.State != api.Published && f.State != api.Yanked && f.State != api.Quarantined {
		return nil, "", fault.New(
			fault.Usage,
			fmt.Sprintf("state %q is not a state of artifacts", f.State),
			"use published, yanked or quarantined",
		)
	}
	return listPage(ctx, c.Store.Artifacts, f, p)
}

// Artifact reads one artifact.
func (c *Catalogue) Artifact(ctx context.Context, digest string) (api.Artifact, error) {
	if !digestPattern.MatchString(digest) {
		return api.Artifact{}, badDigest(digest)
	}
	return c.Store.Artifact(ctx, digest)
}

// Builds lists a page of builds, newest first.
func (c *Catalogue) Builds(
	ctx context.Context,
	f store.BuildFilter,
	p store.Page,
) (all []api.Build, next string, err error) {
	switch f.State {
	case "", api.Queued, api.Building, api.Published, api.Failed, api.Cancelled:
		return listPage(ctx, c.Store.Builds, f, p)
	}
	return nil, "", fault.New(
		fault.Usage,
		fmt.Sprintf("state %q is not a state of builds", f.State),
		"use queued, building, published, failed or cancelled",
	)
}

// Build reads one build.
func (c *Catalogue) Build(ctx context.Context, id int64) (api.Build, error) {
	return c.Store.Build(ctx, id)
}

// RecordKernel records a discovered kernel.
func (c *Catalogue) RecordKernel(ctx context.Context, k api.Kernel) error {
	if err := k.Check(); err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("record the kernel: %w", err), "")
	}
	k.SeenAt = c.Now()
	return c.Store.Write(ctx, func(tx *store.Tx) error { return tx.PutKernel(ctx, k) })
}

// RecordDrivers records discovered driver versions.
func (c *Catalogue) RecordDrivers(ctx context.Context, all []api.DriverRelease) error {
	return c.Store.Write(ctx, func(tx *store.Tx) error {
		for _, d := range all {
			d.SeenAt = c.Now()
			if err := tx.PutDriver(ctx, d); err != nil {
				return err
			}
		}
		return nil
	})
}

// AddArtifact records a published artifact. If the catalogue has the artifact already, AddArtifact only adds the new
// kernels. It also changes the stored repository, if the given repository is [Config.Repository].
func (c *Catalogue) AddArtifact(ctx context.Context, n api.NewArtifact) (stored api.Artifact, err error) {
	a := api.Artifact{Digest: n.Digest, Repository: n.Repository, Fingerprint: n.Fingerprint, Driver: n.Driver,
		Release: n.Release, Kernels: n.Kernels}
	err = c.Store.Write(ctx, func(tx *store.Tx) error {
		if err := c.addArtifact(ctx, tx, a); err != nil {
			return fmt.Errorf("add the artifact: %w", err)
		}
		stored, err = tx.Artifact(ctx, a.Digest)
		return err
	})
	return stored, err
}

func (c *Catalogue) addArtifact(ctx context.Context, tx *store.Tx, a api.Artifact) error {
	if a.Repository == "" {
		a.Repository = c.Repository
	}
	if err := checkArtifact(&a); err != nil {
		return fault.Wrap(fault.Usage, err, "")
	}
	need := bundle.LicenceOf(a.Driver.Flavour).Redistribution
	if c.Public && strings.HasPrefix(a.Repository, "/") && !c.Redistribute.Covers(need) {
		return fault.New(
			fault.PublishRefused,
			fmt.Sprintf("artifact %s has files under NVIDIA's licence, and this server's registry is public", a.Digest),
			fmt.Sprintf(
				"publish it to a private registry, or, if you may redistribute these files, start the server with "+
					"--redistribute %s",
				need,
			),
		)
	}
	switch held, err := c.holdsManifest(ctx, a); {
	case err != nil:
		return err
	case !held:
		return fault.New(
			fault.Mismatch,
			fmt.Sprintf("repository %s has no manifest %s", a.Repository, a.Digest),
			"push the manifest to this repository, and then record the artifact again",
		)
	}
	for _, k := range a.Kernels {
		known, ok, err := tx.Kernel(ctx, k.BuildID, k.Board)
		if err != nil {
			return err
		}
		if !ok {
			if err := tx.PutKernel(ctx, api.Kernel{Kernel: k, Fingerprint: a.Fingerprint, SeenAt: c.Now()}); err != nil {
				return err
			}
		}
		if ok && known.Fingerprint != "" && known.Fingerprint != a.Fingerprint {
			return fault.New(
				fault.Mismatch,
				fmt.Sprintf("kernel %s has fingerprint %s, but the artifact has fingerprint %s", k, known.Fingerprint.Short(),
					a.Fingerprint.Short()),
				"",
			)
		}
	}
	old, err := tx.Artifact(ctx, a.Digest)
	switch {
	case fault.Is(err, fault.NotFound):
	case err != nil:
		return err
	case old.Driver != a.Driver || old.Fingerprint != a.Fingerprint:
		return fault.New(
			fault.Mismatch,
			fmt.Sprintf("the catalogue has artifact %s already, with driver %s and fingerprint %s", a.Digest, old.Driver,
				old.Fingerprint.Short()),
			"",
		)
	case old.Repository != a.Repository && a.Repository == c.Repository: // the operator has changed the repository
		if err := tx.SetRepository(ctx, a.Digest, a.Repository); err != nil {
			return err
		}
	}
	a.State, a.Reason, a.PublishedAt = api.Published, "", c.Now()
	return tx.PutArtifact(ctx, a)
}

// holdsManifest reports whether a repository of this server has the manifest of an artifact. For a repository of
// another registry, it returns true without a check.
func (c *Catalogue) holdsManifest(ctx context.Context, a api.Artifact) (bool, error) {
	name, local := strings.CutPrefix(a.Repository, "/")
	if !local || c.HasManifest == nil {
		return true, nil
	}
	return c.HasManifest(ctx, name, a.Digest)
}

// Forget removes a published artifact whose manifest was deleted from a repository of this server. Its cells can then
// be built again. A withdrawn artifact stays withdrawn.
func (c *Catalogue) Forget(ctx context.Context, repository, digest string) error {
	dropped := false
	err := c.Store.Write(ctx, func(tx *store.Tx) (err error) {
		dropped, err = tx.DropArtifact(ctx, "/"+repository, digest)
		return err
	})
	if dropped {
		c.Log.InfoContext(ctx, "deleted artifact removed from the catalogue", "digest", digest, "repository", repository)
	}
	return err
}

// major returns the number of a driver's branch, such as 535, or 0 if there is none.
func major(version string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(target.Branch(version), "R"))
	return n
}
