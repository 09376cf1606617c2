package batch

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// lister lists the drivers of a COS build, as a COS release bucket does.
type lister interface {
	Drivers(ctx context.Context, k target.Kernel) (cosbucket.DriverList, error)
}

// Label sets the labels of every kernel of a plan in every bucket. A label, such as LATEST or R535, is a name under
// which Google's installer finds a driver version. The labels come from the wish list and from COS. Labels that this
// builder set before are removed if neither the wish list nor COS has them now. Kernels outside the plan keep their
// labels.
//
// If Label fails for one kernel, it still sets the labels of the others. If a label's driver version is not published,
// the label stays unchanged, and the callback gets a line about it. The callback also gets a line for each driver list
// without a signature.
func (p *Destinations) Label(ctx context.Context, pl *plan.Plan, builder string, cos lister, note func(string)) error {
	if len(p.Buckets) == 0 {
		return nil
	}
	wanted := pl.Labels()
	kernels := slices.SortedFunc(maps.Keys(wanted), func(a, b target.Kernel) int {
		return cmp.Or(target.CompareVersions(a.BuildID, b.BuildID), strings.Compare(a.Board, b.Board))
	})
	var mu sync.Mutex
	errs := make([]error, len(kernels))
	var group errgroup.Group
	group.SetLimit(maxLookups)
	for i, k := range kernels {
		group.Go(func() error {
			notes, err := p.label(ctx, k, wanted[k], builder, cos)
			mu.Lock()
			defer mu.Unlock()
			for _, text := range notes {
				note(text)
			}
			errs[i] = err
			return nil
		})
	}
	_ = group.Wait() // no error: the functions above return nil
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) > 0 {
		return fmt.Errorf("set the labels of drivers: errors for %d of %d kernels; the first error: %w", len(errs),
			len(kernels), errs[0])
	}
	return nil
}

func (p *Destinations) label(ctx context.Context, k target.Kernel, declared map[string]string, builder string,
	cos lister) (notes []string, err error) {
	fromCOS, err := tarball.COSLabels(ctx, cos, k)
	if err != nil {
		return nil, fmt.Errorf("set the labels of drivers for %s: %w", k, err)
	}
	for _, b := range p.Buckets {
		got, err := tarball.SetLabels(ctx, b, tarball.Labelling{
			Kernel: k, Builder: builder, Declared: declared, FromCOS: fromCOS, Complete: true, Signer: p.Signer,
			Verifier: p.Verifier,
		})
		if err != nil {
			return notes, err
		}
		for _, label := range got.Absent {
			notes = append(notes, fmt.Sprintf("label %s of kernel %s is unchanged: %s is not published in %s", label, k,
				cmp.Or(declared[label], "the version that has this label at COS"), got.URL))
		}
		for _, url := range got.Unsigned {
			notes = append(notes, url+" has no signature, because other writers wrote a part of this object")
		}
	}
	return notes, nil
}
