package discover

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// maxGKE bounds how many kernels of a list are followed, newest first.
const maxGKE = 4000

// GKE is the list of which versions of GKE run which COS images: the kernels that nodes
// of clusters boot. It finds builds that are older than those followed of a milestone,
// and builds in a mirror that cannot list what it has.
type GKE struct {
	// Map is the URL of a list in the form of gke-to-cos.json.
	Map string
	// URL of the bucket that has the builds.
	URL string
}

// Name is "gke".
func (GKE) Name() string { return "gke" }

// Look reads the list, looks up its kernels that the catalogue lacks where the bucket
// has them, and labels those that are known then. It returns how many are.
func (s GKE) Look(ctx context.Context, to catalogue) (n int, err error) {
	images, err := plan.LoadImageMap(ctx, s.Map)
	if err != nil {
		return 0, fmt.Errorf("discover GKE versions: %w", err)
	}
	kernels, versions := images.GKE()
	if len(kernels) == 0 {
		return 0, fault.New(fault.Unsupported, "discover GKE versions: "+s.Map+" names none",
			"give --gke-map a list in the form of https://www.gstatic.com/gke-image-maps/gke-to-cos.json")
	}
	kernels = kernels[:min(len(kernels), maxGKE)]
	trouble := s.lookUp(ctx, to, kernels)
	labels := map[string][]string{} // what changed
	old, err := known(ctx, to)
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

// lookUp reads those kernels that nobody read yet, as far as the bucket has them.
func (s GKE) lookUp(ctx context.Context, to catalogue, kernels []target.Kernel) (err error) {
	old, err := known(ctx, to)
	if err != nil {
		return fmt.Errorf("discover kernels of GKE: %w", err)
	}
	kernels = slices.DeleteFunc(kernels, func(k target.Kernel) bool {
		for _, have := range old[k.BuildID] {
			if have.Board == k.Board {
				return !incomplete(have)
			}
		}
		return false
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
	case !fault.Is(err, fault.Unsupported): // else it cannot list, and is asked for each
		return fmt.Errorf("discover kernels of GKE: %w", err)
	}
	_, err = record(ctx, b, to, kernels)
	return err
}
