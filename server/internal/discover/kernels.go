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

// parallel is how many requests to one bucket run at a time.
const parallel = 8

// Google adds drivers to the driver lists of a milestone's newest builds after their release, and seldom to the lists
// of older builds. The newest builds of each milestone are therefore read again each time, and other known kernels
// after readAgain.
const (
	newest     = 3
	readAgain  = 24 * time.Hour
	pageLength = 1000
)

// Kernels is a bucket of COS releases. It finds the newest COS builds of each milestone, and their driver lists.
type Kernels struct {
	// URL is the address of the bucket.
	URL string
	// PerMilestone is how many builds of each COS milestone are followed, newest first; 0 means 40. The number is limited
	// because Google's bucket keeps thousands of builds. It is per milestone because an LTS milestone has releases for two
	// years, while newer milestones are developed.
	PerMilestone int
}

// Name is "kernels".
func (Kernels) Name() string { return "kernels" }

// Look reads the builds that the catalogue lacks. It also reads again those known builds that may change.
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

// record reads kernels in a bucket and records them. n is how many it recorded. lacks has the kernels that the bucket
// lacks, because lists may name kernels that are not there.
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

// known returns the kernels in the catalogue by BUILD_ID.
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

// choose returns the builds to read that the catalogue lacks, and the known kernels to read again. The newest build is
// first in ids. All builds of a milestone have the same first number in their BUILD_IDs.
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

// incomplete reports whether a kernel was never read from a bucket. Such a kernel is in the catalogue only because a
// build or an artifact named it.
func incomplete(k api.Kernel) bool { return k.Commit == "" }

// read reads the facts about a kernel from a bucket. It reads the commit only if k has none, because the commit does
// not change. It reads the driver lists each time.
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
