package discover

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// parallel bounds the open requests at one bucket.
const parallel = 8

// What is read again of a kernel that is known: Google adds to the driver lists of
// the newest builds of a milestone after a release, and seldom to others.
const (
	newest     = 3
	readAgain  = 24 * time.Hour
	pageLength = 1000
)

// Kernels is a bucket of COS releases, listed milestone by milestone: the builds in it
// and what their own lists say of drivers.
type Kernels struct {
	// URL of the bucket.
	URL string
	// PerMilestone is how many builds of each COS milestone are followed, newest
	// first; 0 means 40. Google's bucket keeps thousands, and an LTS milestone has
	// releases for two years beside the development of the newest.
	PerMilestone int
}

// Name is "kernels".
func (Kernels) Name() string { return "kernels" }

// Look reads the builds that the catalogue lacks, and again those that change.
func (s Kernels) Look(ctx context.Context, to catalogue) (n int, err error) {
	b, err := cosbucket.Open(ctx, s.URL)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	ids, err := b.BuildIDs(ctx)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	old, err := known(ctx, to)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	unseen, again := s.choose(ids, old, time.Now())
	found, err := b.BuildsOf(ctx, unseen)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	n, _, err = record(ctx, b, to, append(found, again...))
	return n, err
}

// record reads kernels in a bucket and tells the catalogue of each. What the bucket
// lacks is passed over, and returned: lists name more than is there.
func record(
	ctx context.Context,
	b *cosbucket.Bucket,
	to catalogue,
	found []target.Kernel,
) (n int, lacks []target.Kernel, err error) {
	troubles := make([]error, len(found))
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, k := range found {
		group.Go(func() error {
			entry, err := read(ctx, b, k)
			if err == nil {
				err = to.RecordKernel(ctx, entry)
			}
			troubles[i] = err
			return nil
		})
	}
	_ = group.Wait() // the functions above return nil
	for i, trouble := range troubles {
		switch {
		case trouble == nil:
			n++
		case fault.Is(trouble, fault.InputMissing):
			lacks, troubles[i] = append(lacks, found[i]), nil
		}
	}
	return n, lacks, errors.Join(troubles...)
}

// known returns the kernels of the catalogue by BUILD_ID.
func known(ctx context.Context, c catalogue) (map[string][]api.Kernel, error) {
	all := map[string][]api.Kernel{}
	for after := ""; ; {
		some, next, err := c.Kernels(ctx, store.KernelFilter{}, store.Page{After: after, Limit: pageLength})
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
func (s Kernels) choose(
	ids []string,
	old map[string][]api.Kernel,
	now time.Time,
) (unseen []string, again []target.Kernel) {
	most := s.PerMilestone
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
		if len(kernels) == 0 || slices.ContainsFunc(kernels, incomplete) {
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

// incomplete reports whether nobody read a kernel yet: somebody only asked for it.
func incomplete(k api.Kernel) bool { return k.Commit == "" }

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
		for gpu, own := range list.GPUs {
			if entry.GPUs == nil {
				entry.GPUs = map[string]api.GPUDrivers{}
			}
			entry.GPUs[gpu] = api.GPUDrivers{Default: own.Default, Latest: own.Latest, Branches: own.Newest()}
		}
	case !fault.Is(err, fault.InputMissing): // builds without a driver list are normal
		return entry, fmt.Errorf("discover drivers of %s: %w", k, err)
	}
	return entry, nil
}
