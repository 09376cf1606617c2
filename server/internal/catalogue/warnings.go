package catalogue

import (
	"cmp"
	"context"
	"slices"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// warner reads the failures of cells that only early-warning entries of wish lists want.
type warner interface {
	Warnings(ctx context.Context) ([]api.Warning, error)
}

// Warnings lists the cells that only early-warning entries want and whose last build failed, newest kernels first.
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
