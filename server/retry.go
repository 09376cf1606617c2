package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
)

// maxRetries is the maximum number of builds that one run of the command retry requests.
const maxRetries = 1000

func retryCommand() *ucli.Command {
	return &ucli.Command{
		Name: "retry", Usage: "request the builds of failed cells again",
		Description: `retry lists the cells whose last build failed, newest kernel first. With
--apply, it requests a build of each, and lists the new builds. A request begins
the automatic tries of a wanted cell again.

Examples:
  server retry --class transient
  server retry --class publish-refused --apply --token-file token`,
		Flags: writeFlags(append(kernelFilters(), milestoneFilter(), gkeFilter(), driverFilter(), flavourFilter(),
			&ucli.StringFlag{Name: "class",
				Usage: "choose only cells whose last build failed with this `CLASS`, such as transient"},
			&ucli.IntFlag{Name: "limit", Value: 100, Usage: "choose at most `COUNT` cells", Validator: func(n int) error {
				if n < 1 || n > maxRetries {
					return fmt.Errorf("limit %d: want 1 to %d", n, maxRetries)
				}
				return nil
			}},
			&ucli.BoolFlag{Name: "apply", Usage: "request the builds; without it, retry changes nothing"},
		)...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			class := cmd.String("class")
			if class != "" && catalogue.CheckClass(class) != nil {
				return unknownClass(class)
			}
			if flavour := cmd.String("flavour"); flavour != "" {
				if _, err := target.ParseFlavour(flavour); err != nil {
					return fault.Wrap(fault.Usage, fmt.Errorf("choose failed cells: %w", err), "see "+cmd.FullName()+" --help")
				}
			}
			builds, more, err := failedBuilds(ctx, c, filter(cmd), class, cmd.Int("limit"))
			if err != nil {
				return err
			}
			// A newer builder may have reported a class that this program does not know.
			if _, err := fault.Parse(class); class != "" && err != nil && len(builds) == 0 {
				return unknownClass(class)
			}
			note := fmt.Sprintf("%d failed cells; to request their builds, run this command with --apply", len(builds))
			var failed error
			if cmd.Bool("apply") {
				builds, failed = requestAgain(ctx, c, builds)
				note = fmt.Sprintf("%d builds requested", len(builds))
			}
			if more {
				note += "; there are more failed cells, choose more with --limit COUNT"
			}
			err = cli.Print(cmd, builds, func(w io.Writer) error {
				if len(builds) == 0 && failed == nil {
					_, err := fmt.Fprintln(w, "no failed cell was found")
					return err
				}
				return printBuilds(w, builds)
			})
			if err == nil && len(builds) > 0 {
				_, err = fmt.Fprintln(cmd.Root().ErrWriter, note)
			}
			return errors.Join(failed, err)
		},
	}
}

// unknownClass returns the error for a class that neither this program knows nor a failed cell has.
func unknownClass(class string) error {
	hint := "take the class from the list of failed builds: server builds --state failed"
	if meant := meantClass(class); meant != "" {
		hint = "to choose class " + meant + ", write --class " + meant
	}
	return fault.New(fault.Usage, fmt.Sprintf("choose failed cells: class %q is unknown", class), hint)
}

// meantClass returns the known class of which a text seems to be a misspelling, or "".
func meantClass(text string) string {
	meant, least := "", 3
	for _, kind := range fault.Kinds() {
		if n := editDistance(strings.ToLower(text), kind.String()); n < least {
			meant, least = kind.String(), n
		}
	}
	return meant
}

// editDistance returns how many bytes have to be changed, added or removed to turn one text into the other.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1) // the distances of the beginning of a from each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

// failedBuilds returns the newest build of each failed cell, at most as many as most. An empty class matches any class.
// It also reports whether there are more builds.
func failedBuilds(
	ctx context.Context, c *api.Client, f api.Filter, class string, most int,
) (builds []api.Build, more bool, err error) {
	builds = []api.Build{}
	flavour := f.Flavour
	f.State, f.Flavour = api.Failed, "" // the list of cells has no filter for flavours
	for cell, err := range c.EachCell(ctx, f) {
		switch {
		case err != nil:
			return nil, false, err
		case cell.Build == nil || class != "" && cell.Build.Class != class:
		case flavour != "" && string(cell.Driver.Flavour) != flavour:
		case len(builds) == most:
			return builds, true, nil
		default:
			builds = append(builds, *cell.Build)
		}
	}
	return builds, false, nil
}

// requestAgain requests a build of the cell of each build, and returns the new builds. After an error with one cell it
// goes on, unless the other cells would fail, too.
func requestAgain(ctx context.Context, c *api.Client, failed []api.Build) ([]api.Build, error) {
	builds, errs := []api.Build{}, []error(nil)
	for _, f := range failed {
		b, err := c.RequestBuild(ctx, api.BuildRequest{BuildID: f.Kernel.BuildID, Board: f.Kernel.Board,
			Driver: f.Driver.Version, Flavour: string(f.Driver.Flavour)})
		if err == nil {
			builds = append(builds, b)
			continue
		}
		errs = append(errs, fmt.Errorf("request a build of %s for %s: %w", f.Driver, f.Kernel, err))
		switch fault.Of(err) {
		case fault.Unauthorized, fault.Forbidden, fault.TooMany, fault.Transient, fault.TimedOut, fault.Cancelled:
			return builds, errors.Join(errs...)
		}
	}
	return builds, errors.Join(errs...)
}
