package catalogue

import (
	"cmp"
	"context"
	"slices"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// warner reads the findings of early-warning entries of wish lists.
type warner interface {
	Warnings(ctx context.Context) ([]api.Warning, error)
}

// Warnings lists the breaks that early-warning entries of wish lists found and that still exist, newest kernels
// first. Such breaks raise no alarm.
func (c *Catalogue) Warnings(ctx context.Context) ([]api.Warning, error) {
	all, err := c.Store.Warnings(ctx)
	slices.SortStableFunc(all, func(a, b api.Warning) int {
		return cmp.Or(
			target.CompareVersions(b.Kernel.BuildID, a.Kernel.BuildID),
			cmp.Compare(a.Kernel.Board, b.Kernel.Board),
			target.CompareVersions(b.Driver.Version, a.Driver.Version),
			cmp.Compare(a.Driver.Flavour, b.Driver.Flavour),
		)
	})
	return all, err
}
