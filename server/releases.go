package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
)

// releases is a summary of the newest COS builds.
type releases struct {
	// Times are percentiles of the cells that became ready within the last Days days.
	Days     int                  `json:"days"`
	Times    api.ReadyDuration    `json:"times"`
	Releases []api.ReleaseSummary `json:"releases"`
}

func releasesCommand() *ucli.Command {
	return &ucli.Command{
		Name: "releases", Usage: "list COS builds, newest first, with the time until their drivers were published",
		Description: `The time is measured for each cell of a COS build: from the discovery of the COS
build until the cell was ready. P50 is the time within which half of the cells
were ready.`,
		Flags: clientFlags(
			&ucli.IntFlag{Name: "milestone", Usage: "show only COS builds of the milestone `NUMBER`, such as 109"},
			&ucli.IntFlag{Name: "limit", Value: 20, Usage: "list at most `COUNT` COS builds", Validator: between(1, 1000)},
			&ucli.IntFlag{
				Name:      "days",
				Value:     30,
				Usage:     "compute percentiles over the cells that became ready in the last `COUNT` days",
				Validator: between(1, 3660),
			},
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			all, err := readReleases(ctx, c, cmd.Int("milestone"), cmd.Int("limit"), cmd.Int("days"))
			if err != nil {
				return err
			}
			return cli.Print(cmd, all, func(w io.Writer) error { return printReleases(w, all) })
		},
	}
}

func between(least, most int) func(int) error {
	return func(n int) error {
		if n < least || n > most {
			return fmt.Errorf("number %d: want %d to %d", n, least, most)
		}
		return nil
	}
}

func readReleases(ctx context.Context, c *api.Client, milestone, limit, days int) (out releases, err error) {
	out.Days = days
	// Page is a number of kernels. A COS build usually has two, one for each board.
	out.Releases, _, err = readFirst(c.EachRelease(ctx, api.Filter{Milestone: milestone, Page: 2 * limit}), limit,
		func(r api.ReleaseSummary) string { return r.BuildID })
	if err == nil {
		out.Times, err = c.ReadyTimes(ctx, days)
	}
	return out, err
}

func printReleases(w io.Writer, all releases) error {
	rows := [][]string{}
	for _, r := range all.Releases {
		milestone := "-"
		if r.Milestone > 0 {
			milestone = strconv.Itoa(r.Milestone)
		}
		cells := 0
		for _, n := range r.Cells {
			cells += n
		}
		rows = append(
			rows,
			append([]string{r.BuildID, milestone, r.SeenAt.UTC().Format("2006-01-02 15:04"), strconv.Itoa(cells),
				strconv.Itoa(
					r.Cells[api.Published],
				), strconv.Itoa(r.Cells[api.Queued] + r.Cells[api.Building])}, percentiles(r.Times)...),
		)
	}
	head := []string{"BUILD_ID", "M", "SEEN", "CELLS", "READY", "OPEN", "P50", "P90", "MAX"}
	if err := printTable(w, head, rows, "no COS build is known yet; announce one: server announce BUILD_ID"); err != nil ||
		all.Times.Count == 0 {
		return err
	}
	p := percentiles(all.Times)
	_, err := fmt.Fprintf(
		w,
		"\nOf %d cells that became ready within %d days, half took %s at most, 90%% %s,\n99%% %s, and all %s.\n",
		all.Times.Count,
		all.Days,
		p[0],
		p[1],
		seconds(all.Times.P99),
		p[2],
	)
	return err
}

func percentiles(t api.ReadyDuration) []string {
	if t.Count == 0 {
		return []string{"-", "-", "-"}
	}
	return []string{seconds(t.P50), seconds(t.P90), seconds(t.Max)}
}
