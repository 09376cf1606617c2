// Package discover asks the upstream buckets which COS kernels and which NVIDIA
// releases exist, and tells the catalogue. Trouble upstream is logged and tried
// again: a server without upstreams still serves what it has. It refuses to
// request builds and to remove anything.
package discover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// catalogue takes what was found.
type catalogue interface {
	Kernels(ctx context.Context, f store.KernelFilter, p store.Page) ([]api.Kernel, string, error)
	SawKernel(ctx context.Context, k api.Kernel) error
	SawDrivers(ctx context.Context, all []api.DriverRelease) error
}

// Config says where to look.
type Config struct {
	// KernelMirror and DriverMirror are bucket URLs; "" leaves that one out.
	KernelMirror, DriverMirror string
	// Every is the pause between looks; 0 is 15 minutes.
	Every time.Duration
	// PerMilestone is how many builds of each COS milestone are followed, newest
	// first; 0 is 40. Google's bucket keeps thousands, and an LTS milestone has
	// releases for two years beside the development of the newest.
	PerMilestone int
	Catalogue    catalogue
	// Found is called after each look that came to its end; nil is not.
	Found func(context.Context)
	Log   *slog.Logger
}

// parallel bounds the requests under way at one bucket.
const parallel = 8

// What is read again of a kernel that is known: Google adds to the driver lists of
// the newest builds of a milestone after a release, and seldom to others.
const (
	newest     = 3
	readAgain  = 24 * time.Hour
	pageLength = 1000
)

// Run looks at once and then again and again, until ctx is done.
func Run(ctx context.Context, c Config) error {
	if c.KernelMirror == "" && c.DriverMirror == "" {
		return nil
	}
	every := c.Every
	if every <= 0 {
		every = 15 * time.Minute
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		begin := time.Now()
		kernels, drivers, err := Look(ctx, c)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			c.Log.WarnContext(
				ctx,
				"discovery incomplete",
				"kernels",
				kernels,
				"drivers",
				drivers,
				"err",
				err,
				"hint",
				fault.Hint(err),
			)
		default:
			c.Log.InfoContext(
				ctx,
				"discovery done",
				"kernels",
				kernels,
				"drivers",
				drivers,
				"took",
				time.Since(begin).Round(time.Millisecond).String(),
			)
		}
		if c.Found != nil {
			c.Found(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Look reads both buckets once and returns how much it read. What could be read
// is recorded even when something else could not.
func Look(ctx context.Context, c Config) (kernels, drivers int, err error) {
	var kernelErr, driverErr error
	if c.KernelMirror != "" {
		kernels, kernelErr = c.kernels(ctx)
	}
	if c.DriverMirror != "" {
		drivers, driverErr = c.drivers(ctx)
	}
	return kernels, drivers, errors.Join(kernelErr, driverErr)
}

func (c Config) kernels(ctx context.Context) (n int, err error) {
	b, err := cosbucket.Open(ctx, c.KernelMirror)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	ids, err := b.BuildIDs(ctx)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	old, err := c.known(ctx)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	unseen, again := c.choose(ids, old, time.Now())
	found, err := b.BuildsOf(ctx, unseen)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	found = append(found, again...)
	troubles := make([]error, len(found))
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, k := range found {
		group.Go(func() error {
			troubles[i] = c.kernel(ctx, b, k)
			return nil
		})
	}
	_ = group.Wait() // the functions above return nil
	for _, trouble := range troubles {
		if trouble == nil {
			n++
		}
	}
	return n, errors.Join(troubles...)
}

// known returns the kernels of the catalogue by BUILD_ID.
func (c Config) known(ctx context.Context) (map[string][]api.Kernel, error) {
	all := map[string][]api.Kernel{}
	for after := ""; ; {
		some, next, err := c.Catalogue.Kernels(ctx, store.KernelFilter{}, store.Page{After: after, Limit: pageLength})
		if err != nil {
			return nil, err
		}
		for _, k := range some {
			all[k.BuildID] = append(all[k.BuildID], k)
		}
		if after = next; after == "" {
			return all, nil
		}
	}
}

// choose says which builds to look into that the catalogue lacks, and which known
// kernels to read again. The ids are newest first. A milestone's builds share the
// first number of their BUILD_IDs.
func (c Config) choose(
	ids []string,
	old map[string][]api.Kernel,
	now time.Time,
) (unseen []string, again []target.Kernel) {
	most := c.PerMilestone
	if most <= 0 {
		most = 40
	}
	seen := map[string]int{}
	for _, id := range ids {
		branch, _, _ := strings.Cut(id, ".")
		if seen[branch]++; seen[branch] > most {
			continue
		}
		kernels := old[id]
		complete := len(kernels) > 0
		for _, k := range kernels {
			complete = complete && k.Commit != "" // else somebody only asked for it
		}
		if !complete {
			unseen = append(unseen, id)
			continue
		}
		for _, k := range kernels {
			if seen[branch] <= newest || now.Sub(k.SeenAt) > readAgain {
				again = append(again, k.Kernel)
			}
		}
	}
	return unseen, again
}

// kernel reads one COS build for one board and records it.
func (c Config) kernel(ctx context.Context, b *cosbucket.Bucket, k target.Kernel) error {
	entry, err := read(ctx, b, k)
	if err != nil {
		return err
	}
	return c.Catalogue.SawKernel(ctx, entry)
}

// read reads what a bucket tells of a kernel. Its commit is read once; its driver
// lists each time.
func read(ctx context.Context, b *cosbucket.Bucket, k target.Kernel) (api.Kernel, error) {
	if err := ctx.Err(); err != nil {
		return api.Kernel{}, err
	}
	if k.Commit == "" {
		described, err := b.Describe(ctx, k)
		if err != nil {
			return api.Kernel{}, fmt.Errorf("discover kernel %s: %w", k, err)
		}
		k = described
	}
	entry := api.Kernel{Kernel: k}
	list, err := b.Drivers(ctx, k)
	switch {
	case err == nil:
		entry.Default, entry.Latest, entry.Branches = list.Default, list.Latest, list.Newest()
	case !fault.Is(err, fault.InputMissing): // builds without a driver list are normal
		return entry, fmt.Errorf("discover drivers of %s: %w", k, err)
	}
	return entry, nil
}

func (c Config) drivers(ctx context.Context) (n int, err error) {
	b, err := cosbucket.Open(ctx, c.DriverMirror)
	if err != nil {
		return 0, fmt.Errorf("discover drivers: %w", err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	names, err := b.List(ctx, "")
	if err != nil {
		return 0, fmt.Errorf("discover drivers: %w", err)
	}
	seen := map[string]bool{}
	var all []api.DriverRelease
	for _, name := range names {
		version, _, ok := cosbucket.ParseRunfile(name)
		if ok && !seen[version] {
			seen[version] = true
			all = append(all, api.DriverRelease{Version: version, Branch: target.Branch(version)})
		}
	}
	if err := c.Catalogue.SawDrivers(ctx, all); err != nil {
		return 0, fmt.Errorf("discover drivers: %w", err)
	}
	return len(all), nil
}

// Mirror looks single builds up, for who cannot wait for the next look.
type Mirror struct {
	// URL is the bucket of COS releases.
	URL string
}

// Build reads one COS build with all of its boards; kind InputMissing when the
// mirror has none of that BUILD_ID.
func (m Mirror) Build(ctx context.Context, buildID string) (all []api.Kernel, err error) {
	b, err := cosbucket.Open(ctx, m.URL)
	if err != nil {
		return nil, fmt.Errorf("look up COS build %s: %w", buildID, err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	kernels, err := b.BuildsOf(ctx, []string{buildID})
	if err != nil {
		return nil, fmt.Errorf("look up COS build %s: %w", buildID, err)
	}
	for _, k := range kernels {
		entry, err := read(ctx, b, k)
		if err != nil {
			return nil, err
		}
		all = append(all, entry)
	}
	if len(all) == 0 {
		return nil, fault.New(
			fault.InputMissing,
			"the mirror has no COS build "+buildID,
			"check BUILD_ID, and that the server's --kernel-mirror has that build",
		)
	}
	return all, nil
}
