package main

import (
	"context"
	"slices"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

// labelsOf returns the labels that a build of one cell sets on its driver. It refuses labels that have no effect.
func labelsOf(cmd *ucli.Command, flavour target.Flavour) ([]string, error) {
	labels := cmd.StringSlice("label")
	for _, label := range labels {
		if _, err := target.ParseLabel(label); err != nil {
			return nil, fault.Wrap(fault.Usage, err, "see builder build --help")
		}
	}
	switch {
	case len(labels) == 0:
	case flavour != target.Open:
		return nil, fault.New(fault.Usage, "--label has no effect with --flavour "+string(flavour),
			"add --flavour open: COS's own installer takes only the open flavour from a bucket")
	case !slices.ContainsFunc(cmd.StringSlice("to"), tarball.Is):
		return nil, fault.New(fault.Usage, "--label has no effect without a bucket",
			"add --to gs://BUCKET/PREFIX or --to file:///FOLDER")
	}
	return labels, nil
}

// setLabels sets the labels of a wish list after its cells are published.
func (m *matrix) setLabels(ctx context.Context, p *plan.Plan, note func(string)) error {
	// After a stop signal, set no labels. The report says that the run was stopped.
	if ctx.Err() != nil {
		return nil
	}
	return m.destinations.Label(ctx, p, m.cfg.BuilderID, m.kernels, note)
}
