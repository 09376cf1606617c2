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

// requestsAtOnce is the maximum number of simultaneous requests to one bucket.
const requestsAtOnce = 8

// Google adds drivers mostly to the lists of a milestone's newest builds, so these are read each time. Other known
// kernels are read again after readAgain. The boards of a build may appear one by one. So boards are listed again for
// the newest builds, and for every build until listAgain after it was first seen.
const (
	newest     = 3
	readAgain  = 24 * time.Hour
	listAgain  = 24 * time.Hour
	pageLength = 1000
)

// Kernels is a source of the newest COS builds of each milestone: a bucket of COS releases.
type Kernels struct {
	// URL is the address of the bucket.
	URL string
	// PerMilestone is the maximum number of COS builds of each milestone, newest first; 0 means 40. Google's bucket
	// keeps thousands. An LTS milestone gets new builds for two years, also after newer milestones exist.
	PerMilestone int
}

// Name is "kernels".
func (Kernels) Name() string { return "kernels" }

// Look reads the COS builds that the catalogue lacks, and known kernels whose driver lists may have changed.
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
	old, err := knownKernels(ctx, to)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	unseen, listed, again := s.choose(ids, old, time.Now())
	found, err := b.BuildsOf(ctx, unseen)
	if err != nil {
		return 0, fmt.Errorf("discover kernels: %w", err)
	}
	more, late := b.BuildsOf(ctx, listed) // an error must not keep new builds out
	found = append(found, more...)
	found = slices.DeleteFunc(found, func(k target.Kernel) bool {
		return slices.ContainsFunc(old[k.BuildID], func(have api.Kernel) bool {
			return have.Board == k.Board && !incomplete(have)
		})
	})
	n, _, err = readAndRecord(ctx, b, to, append(found, again...))
	if late != nil {
		err = errors.Join(err, fmt.Errorf("discover boards of known COS builds: %w", late))
	}
	return n, err
}

// readAndRecord reads kernels from a bucket and records them. It returns the number of recorded kernels, and the
// kernels that the bucket lacks.
func readAndRecord(
	ctx context.Context,
	b *cosbucket.Bucket,
	to catalogue,
	found []target.Kernel,
) (n int, lacks []target.Kernel, err error) {
	troubles := make([]error, len(found))
	var group errgroup.Group
	group.SetLimit(requestsAtOnce)
	for i, k := range found {
		group.Go(func() error {
			entry, err := readKernel(ctx, b, k)
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

// knownKernels returns the kernels of the catalogue, by BUILD_ID.
func knownKernels(ctx context.Context, c catalogue) (map[string][]api.Kernel, error) {
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

// choose returns the COS builds that are new or incomplete, the other builds whose boards to list again, and the known
// kernels to read again. ids must be sorted, newest first. The BUILD_IDs of one milestone have the same first number.
func (s Kernels) choose(
	ids []string,
	old map[string][]api.Kernel,
	now time.Time,
) (unseen, listed []string, again []target.Kernel) {
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
		lacks, young := len(old[id]) == 0, false
		for _, k := range old[id] {
			lacks, young = lacks || incomplete(k), young || now.Sub(k.FirstSeenAt) < listAgain
			if !incomplete(k) && (seen[branch] <= newest || now.Sub(k.SeenAt) > readAgain) {
				again = append(again, k.Kernel)
			}
		}
		switch {
		case lacks:
			unseen = append(unseen, id)
		case young || seen[branch] <= newest:
			listed = append(listed, id)
		}
	}
	return unseen, listed, again
}

// incomplete reports whether a kernel was never read from a bucket. The catalogue has such a kernel because of a build
// or an artifact.
func incomplete(k api.Kernel) bool { return k.Commit == "" }

// readKernel reads a kernel's driver lists from a bucket. It reads the commit only if k has none, because the commit
// does not change.
func readKernel(ctx context.Context, b *cosbucket.Bucket, k target.Kernel) (api.Kernel, error) {
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
