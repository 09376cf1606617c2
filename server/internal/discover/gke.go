package discover

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// maxGKE is the maximum number of kernels that are read from a list, newest first.
const maxGKE = 4000

// missedFor is the pause before a kernel that was missing in the bucket is looked up there again.
const missedFor = 24 * time.Hour

// GKE is a list of GKE versions and their COS images. It also finds COS builds that [Kernels] does not: old ones, and
// those in a mirror that cannot list its content.
type GKE struct {
	// Map is the URL of the list, a file like gke-to-cos.json.
	Map string
	// URL is the address of the bucket with the builds.
	URL string

	// missed is the time when a listed kernel was missing in the bucket, by BUILD_ID/board.
	missed map[string]time.Time
}

// Name is "gke".
func (*GKE) Name() string { return "gke" }

// Look reads the list. It records listed kernels that the catalogue lacks, and then the GKE versions of each known
// kernel. It returns the number of kernels with a GKE version.
func (s *GKE) Look(ctx context.Context, to catalogue) (n int, err error) {
	images, err := plan.LoadImageMap(ctx, s.Map)
	if err != nil {
		return 0, fmt.Errorf("discover GKE versions: %w", err)
	}
	kernels, versions := images.GKE()
	if len(kernels) == 0 {
		return 0, fault.New(fault.Unsupported, "discover GKE versions: there is no GKE version in "+s.Map,
			"give --gke-map a file like this one: https://www.gstatic.com/gke-image-maps/gke-to-cos.json")
	}
	kernels = kernels[:min(len(kernels), maxGKE)]
	trouble := s.lookUp(ctx, to, kernels)
	labels := map[string][]string{} // only changed labels
	old, err := knownKernels(ctx, to)
	if err != nil {
		return 0, errors.Join(trouble, fmt.Errorf("discover GKE versions: %w", err))
	}
	for _, boards := range old {
		for _, k := range boards {
			now := versions[k.String()]
			if len(now) > 0 {
				n++
			}
			if !slices.Equal(k.GKE, now) {
				labels[k.String()] = now
			}
		}
	}
	if err := to.SawGKE(ctx, labels); err != nil {
		return 0, errors.Join(trouble, fmt.Errorf("discover GKE versions: %w", err))
	}
	return n, trouble
}

// lookUp reads from the bucket the kernels that were never read, and records them.
func (s *GKE) lookUp(ctx context.Context, to catalogue, kernels []target.Kernel) (err error) {
	now := time.Now()
	listed := map[string]bool{}
	for _, k := range kernels {
		listed[k.String()] = true
	}
	// Only listed kernels stay in missed, so it has at most maxGKE entries.
	maps.DeleteFunc(s.missed, func(k string, at time.Time) bool { return !listed[k] || now.Sub(at) >= missedFor })
	old, err := knownKernels(ctx, to)
	if err != nil {
		return fmt.Errorf("discover kernels of GKE: %w", err)
	}
	kernels = slices.DeleteFunc(kernels, func(k target.Kernel) bool {
		for _, have := range old[k.BuildID] {
			if have.Board == k.Board && !incomplete(have) {
				return true
			}
		}
		_, missing := s.missed[k.String()]
		return missing
	})
	if len(kernels) == 0 {
		return nil
	}
	b, err := cosbucket.Open(ctx, s.URL)
	if err != nil {
		return fmt.Errorf("discover kernels of GKE: %w", err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	switch ids, err := b.BuildIDs(ctx); {
	case err == nil:
		has := map[string]bool{}
		for _, id := range ids {
			has[id] = true
		}
		kernels = slices.DeleteFunc(kernels, func(k target.Kernel) bool { return !has[k.BuildID] })
	case !fault.Is(err, fault.Unsupported): // if the bucket cannot list its content, it is asked for each kernel
		return fmt.Errorf("discover kernels of GKE: %w", err)
	}
	_, lacks, err := readAndRecord(ctx, b, to, kernels)
	for _, k := range lacks {
		if s.missed == nil {
			s.missed = map[string]time.Time{}
		}
		s.missed[k.String()] = now
	}
	return err
}
