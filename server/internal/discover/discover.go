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
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// catalogue takes what was found.
type catalogue interface {
	Kernels(ctx context.Context) ([]api.Kernel, error)
	SawKernel(ctx context.Context, k api.Kernel) error
	SawDriver(ctx context.Context, d api.DriverRelease) error
}

// Config says where to look.
type Config struct {
	// KernelMirror and DriverMirror are bucket URLs; "" leaves that one out.
	KernelMirror, DriverMirror string
	// Every is the pause between looks; 0 is 15 minutes.
	Every time.Duration
	// Newest bounds how many COS builds of a board are followed, newest first;
	// 0 is 200. Google's bucket keeps thousands.
	Newest    int
	Catalogue catalogue
	Log       *slog.Logger
}

// parallel bounds the requests under way at one bucket.
const parallel = 8

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
			c.Log.WarnContext(ctx, "discovery incomplete", "kernels", kernels, "drivers", drivers, "err", err, "hint", fault.Hint(err))
		default:
			c.Log.InfoContext(ctx, "discovery done", "kernels", kernels, "drivers", drivers, "took", time.Since(begin).Round(time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Look reads both buckets once and returns how much it saw. What could be read
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
	most := c.Newest
	if most <= 0 {
		most = 200
	}
	// Not every build has every board; twice as many are looked into.
	found, err := b.BuildsOf(ctx, ids[:min(len(ids), 2*most)])
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	known, err := c.Catalogue.Kernels(ctx)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	old := map[string]api.Kernel{}
	for _, k := range known {
		old[k.String()] = k
	}
	found = newest(found, most)
	troubles := make([]error, len(found))
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, k := range found {
		group.Go(func() error {
			troubles[i] = c.kernel(ctx, b, k, old[k.String()])
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

// kernel records one COS build. Its commit is read once; its driver lists each
// time, since Google adds to them after a release.
func (c Config) kernel(ctx context.Context, b *cosbucket.Bucket, k target.Kernel, old api.Kernel) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if k.Commit = old.Commit; k.Commit == "" {
		described, err := b.Describe(ctx, k)
		if err != nil {
			return fmt.Errorf("discover kernel %s: %w", k, err)
		}
		k = described
	}
	entry := api.Kernel{Kernel: k}
	list, err := b.Drivers(ctx, k)
	switch {
	case err == nil:
		entry.Default, entry.Latest, entry.Branches = list.Default, list.Latest, list.Branches
	case !fault.Is(err, fault.InputMissing): // builds without a driver list are normal
		return fmt.Errorf("discover drivers of %s: %w", k, err)
	}
	return c.Catalogue.SawKernel(ctx, entry)
}

// newest keeps the n highest BUILD_IDs of each board.
func newest(all []target.Kernel, n int) []target.Kernel {
	slices.SortStableFunc(all, func(a, b target.Kernel) int { return target.CompareVersions(b.BuildID, a.BuildID) })
	seen := map[string]int{}
	return slices.DeleteFunc(all, func(k target.Kernel) bool {
		seen[k.Board]++
		return seen[k.Board] > n
	})
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
	for _, name := range names {
		version, _, ok := cosbucket.ParseRunfile(name)
		if !ok || seen[version] {
			continue
		}
		seen[version] = true
		if err := c.Catalogue.SawDriver(ctx, api.DriverRelease{Version: version, Branch: target.Branch(version)}); err != nil {
			return len(seen), fmt.Errorf("discover drivers: %w", err)
		}
	}
	return len(seen), nil
}
