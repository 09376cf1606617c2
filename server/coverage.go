package main

import (
	"context"
	"io"
	"strconv"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
)

func coverageCommand() *ucli.Command {
	return &ucli.Command{
		Name: "coverage", Usage: "show how much of the desired matrix is published", Flags: clientFlags(),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			v, err := c.Coverage(ctx)
			if err != nil {
				return err
			}
			return cli.Print(cmd, v, func(w io.Writer) error { return printCoverage(w, v) })
		},
	}
}

func printCoverage(w io.Writer, v api.Coverage) error {
	rows := [][]string{}
	add := func(name string, n api.CoverageCounts) {
		row := []string{name}
		for _, n := range []int{n.Wanted, n.Published, n.Building, n.Queued, n.Failed, n.Withdrawn, n.Unsupported,
			n.Missing} {
			row = append(row, strconv.Itoa(n))
		}
		rows = append(rows, row)
	}
	for _, m := range v.Milestones {
		name := "-"
		if m.Milestone > 0 {
			name = strconv.Itoa(m.Milestone)
		}
		add(name, m.CoverageCounts)
	}
	if len(rows) > 0 {
		add("all", v.Total)
	}
	return printTable(w, []string{"M", "WANTED", "READY", "BUILDING", "QUEUED", "FAILED", "WITHDRAWN", "NEVER", "MISSING"},
		rows, "no wish list wants a cell; store a wish list: server wish-lists put NAME FILE")
}
