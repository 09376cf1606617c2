package main

import (
	"context"
	"fmt"
	"slices"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
)

func privateFlag() ucli.Flag {
	return cli.Strings("private", "`REF` or REF prefix that only you can read")
}

func redistributeFlag() ucli.Flag {
	return cli.Choice("redistribute", bundle.RedistributeNone,
		"`PART` of NVIDIA's files that may go to public destinations: none, userspace or all",
		bundle.RedistributeNone, bundle.RedistributeUserspace, bundle.RedistributeAll)
}

func licenceRule(cmd *ucli.Command) licence.Rule {
	return licence.Rule{
		Redistribute: bundle.Redistribution(cmd.String("redistribute")),
		Private:      cmd.StringSlice("private"),
	}
}

// licenceNotes returns a note for each flavour in the plan that the licence rule keeps from a destination. A note has
// the reason and a hint.
func (m *matrix) licenceNotes(ctx context.Context, p *plan.Plan) (notes []string, err error) {
	var flavours []target.Flavour
	for _, c := range p.Cells {
		if c.Problem == nil && !slices.Contains(flavours, c.Driver.Flavour) {
			flavours = append(flavours, c.Driver.Flavour)
		}
	}
	slices.Sort(flavours)
	check := func(name string, place licence.Destination) error {
		for _, f := range flavours {
			switch err := m.cfg.Licence.Check(ctx, name, place, f); {
			case fault.Is(err, fault.PublishRefused):
				notes = append(notes, fmt.Sprintf("%v; hint: %s", err, fault.Hint(err)))
			case err != nil:
				return err
			}
		}
		return nil
	}
	for _, repo := range m.destinations.Repositories {
		if err := check(repo.Name(), repo); err != nil {
			return nil, err
		}
	}
	for _, b := range m.destinations.Buckets {
		if err := check(b.URL(""), b); err != nil {
			return nil, err
		}
	}
	return notes, nil
}
