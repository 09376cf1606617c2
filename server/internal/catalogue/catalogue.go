// Package catalogue is what the server knows and decides: which kernels and
// drivers exist, what a node of some kernel should run, which cell is built,
// and what may become of a build. It refuses HTTP and SQL, and it never matches
// anything by kernel release.
package catalogue

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Store is the database that the catalogue needs; package store has it over
// SQLite and over PostgreSQL.
type Store interface {
	Kernels(ctx context.Context) ([]api.Kernel, error)
	Kernel(ctx context.Context, buildID, board string) (api.Kernel, bool, error)
	PutKernel(ctx context.Context, k api.Kernel) error
	Drivers(ctx context.Context) ([]api.DriverRelease, error)
	PutDriver(ctx context.Context, d api.DriverRelease) error
	Artifacts(ctx context.Context, d target.Driver) ([]api.Artifact, error)
	Artifact(ctx context.Context, digest string) (api.Artifact, error)
	PutArtifact(ctx context.Context, a api.Artifact) error
	SetArtifactState(ctx context.Context, digest string, state api.State, reason string) error
	Builds(ctx context.Context, state api.State, limit int) ([]api.Build, error)
	OpenBuilds(ctx context.Context) ([]api.Build, error)
	NewestBuilds(ctx context.Context) ([]api.Build, error)
	NewestBuild(ctx context.Context, buildID, board string, d target.Driver) (*api.Build, error)
	Build(ctx context.Context, id int64) (api.Build, error)
	AddBuild(ctx context.Context, b api.Build) (api.Build, bool, error)
	ChangeBuild(ctx context.Context, id int64, change func(*api.Build) error) (api.Build, error)
}

// Logs is where build logs are kept.
type Logs interface {
	Put(build int64, r io.Reader) error
	Get(build int64) (log io.ReadSeekCloser, size int64, err error)
}

// enqueuer puts a build into the queue; putting one in twice must be harmless.
type enqueuer interface {
	Insert(ctx context.Context, job api.BuildJob) error
}

// Config is what the catalogue is made of.
type Config struct {
	Store Store
	Logs  Logs
	Queue enqueuer
	// Repository is where builders publish when they do not say where: a path on
	// this server ("/prebake/driver"), or a repository of another registry.
	Repository string
	// KernelMirror and DriverMirror go into the jobs; "" leaves it to the builder.
	KernelMirror, DriverMirror string
	Log                        *slog.Logger
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Catalogue is the set of use-cases.
type Catalogue struct{ Config }

// New returns the use-cases over a store and a queue.
func New(c Config) *Catalogue {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	clock := c.Now
	// What is answered at once must equal what is read later: databases keep
	// microseconds.
	c.Now = func() time.Time { return clock().UTC().Truncate(time.Microsecond) }
	return &Catalogue{c}
}

// MaxBuilds bounds one list of builds.
const MaxBuilds = 1000

// Kernels lists the known kernels, newest first.
func (c *Catalogue) Kernels(ctx context.Context) ([]api.Kernel, error) {
	all, err := c.Store.Kernels(ctx)
	slices.SortFunc(all, func(a, b api.Kernel) int {
		return cmp.Or(target.CompareVersions(b.BuildID, a.BuildID), cmp.Compare(a.Board, b.Board))
	})
	return all, err
}

// Drivers lists the known driver versions, newest first.
func (c *Catalogue) Drivers(ctx context.Context) ([]api.DriverRelease, error) {
	all, err := c.Store.Drivers(ctx)
	slices.SortFunc(all, func(a, b api.DriverRelease) int { return target.CompareVersions(b.Version, a.Version) })
	return all, err
}

// Artifacts lists all artifacts, yanked ones included, newest first.
func (c *Catalogue) Artifacts(ctx context.Context) ([]api.Artifact, error) {
	return c.Store.Artifacts(ctx, target.Driver{})
}

// Builds lists the newest builds, in this state or (for "") in any.
func (c *Catalogue) Builds(ctx context.Context, state api.State) ([]api.Build, error) {
	switch state {
	case "", api.Queued, api.Building, api.Published, api.Failed, api.Cancelled:
		return c.Store.Builds(ctx, state, MaxBuilds)
	}
	return nil, fault.New(fault.Usage, fmt.Sprintf("state %q is not one of a build", state), "use queued, building, published, failed or cancelled")
}

// Build reads one build.
func (c *Catalogue) Build(ctx context.Context, id int64) (api.Build, error) {
	return c.Store.Build(ctx, id)
}

// OpenLog opens the log of a build that exists.
func (c *Catalogue) OpenLog(ctx context.Context, id int64) (io.ReadSeekCloser, int64, error) {
	if _, err := c.Store.Build(ctx, id); err != nil {
		return nil, 0, err
	}
	return c.Logs.Get(id)
}

// PutLog stores the log of a build that exists.
func (c *Catalogue) PutLog(ctx context.Context, id int64, r io.Reader) error {
	if _, err := c.Store.Build(ctx, id); err != nil {
		return err
	}
	return c.Logs.Put(id, r)
}

// SawKernel records a kernel that was discovered.
func (c *Catalogue) SawKernel(ctx context.Context, k api.Kernel) error {
	k.SeenAt = c.Now()
	return c.Store.PutKernel(ctx, k)
}

// SawDriver records a driver version that was discovered.
func (c *Catalogue) SawDriver(ctx context.Context, d api.DriverRelease) error {
	d.SeenAt = c.Now()
	return c.Store.PutDriver(ctx, d)
}

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// AddArtifact records an artifact that somebody published, or more kernels
// that a known one is attested for.
func (c *Catalogue) AddArtifact(ctx context.Context, a api.Artifact) (api.Artifact, error) {
	if err := c.checkArtifact(ctx, &a); err != nil {
		return a, fmt.Errorf("add artifact: %w", err)
	}
	a.State, a.Reason, a.PublishedAt = api.Published, "", c.Now()
	if err := c.Store.PutArtifact(ctx, a); err != nil {
		return a, err
	}
	return c.Store.Artifact(ctx, a.Digest)
}

func (c *Catalogue) checkArtifact(ctx context.Context, a *api.Artifact) error {
	usage := func(err error) error { return fault.Wrap(fault.Usage, err, "") }
	if !digestPattern.MatchString(a.Digest) {
		return usage(fmt.Errorf("digest %q: want sha256: and 64 lower-case hex digits", a.Digest))
	}
	if _, err := target.ParseFingerprint(string(a.Fingerprint)); err != nil {
		return usage(err)
	}
	if _, err := target.ParseDriver(a.Driver.Version, string(a.Driver.Flavour)); err != nil {
		return usage(err)
	}
	if len(a.Kernels) == 0 {
		return usage(fmt.Errorf("no kernel that the artifact is attested for"))
	}
	for i, k := range a.Kernels {
		parsed, err := target.ParseKernel(k.BuildID, k.Board)
		if err != nil {
			return usage(err)
		}
		a.Kernels[i].Arch = parsed.Arch
		known, ok, err := c.Store.Kernel(ctx, k.BuildID, k.Board)
		if err != nil {
			return err
		}
		if ok && known.Fingerprint != "" && known.Fingerprint != a.Fingerprint {
			return fault.New(fault.Mismatch, fmt.Sprintf("kernel %s has fingerprint %s, the artifact %s", k, known.Fingerprint.Short(), a.Fingerprint.Short()), "")
		}
	}
	if a.Arch == "" {
		a.Arch = a.Kernels[0].Arch
	}
	if a.Repository == "" {
		a.Repository = c.Repository
	}
	old, err := c.Store.Artifact(ctx, a.Digest)
	if fault.Is(err, fault.NoArtifact) {
		return nil
	}
	if err == nil && (old.Driver != a.Driver || old.Fingerprint != a.Fingerprint) {
		return fault.New(fault.Mismatch, fmt.Sprintf("artifact %s is known as driver %s for fingerprint %s", a.Digest, old.Driver, old.Fingerprint.Short()), "")
	}
	return err
}

// Yank marks an artifact as one that must not be used any more; Unyank takes
// that back.
func (c *Catalogue) Yank(ctx context.Context, digest, reason string) (api.Artifact, error) {
	if reason = strings.TrimSpace(reason); reason == "" || len(reason) > 1000 {
		return api.Artifact{}, fault.New(fault.Usage, "yank "+digest+": want a reason of 1 to 1000 letters", "say why, nodes show it")
	}
	return c.mark(ctx, digest, api.Yanked, reason)
}

// Unyank makes a yanked artifact usable again.
func (c *Catalogue) Unyank(ctx context.Context, digest string) (api.Artifact, error) {
	return c.mark(ctx, digest, api.Published, "")
}

func (c *Catalogue) mark(ctx context.Context, digest string, state api.State, reason string) (api.Artifact, error) {
	if _, err := c.Store.Artifact(ctx, digest); err != nil {
		return api.Artifact{}, err
	}
	if err := c.Store.SetArtifactState(ctx, digest, state, reason); err != nil {
		return api.Artifact{}, err
	}
	c.Log.InfoContext(ctx, "artifact marked", "digest", digest, "state", state, "reason", reason)
	return c.Store.Artifact(ctx, digest)
}

// major returns the number of a driver's branch; 0 for none.
func major(version string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(target.Branch(version), "R"))
	return n
}
