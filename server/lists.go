package main

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

// largestPage is the maximum number of entries of a page. For lists whose pages are counted in kernels, [api.Client]
// asks for fewer.
const largestPage = 1000

// pagedList describes a command that prints the first entries of a list.
type pagedList[T any] struct {
	name, usage, description string
	flags                    []ucli.Flag
	// token is true if only administrators may read the list.
	token bool
	// what is the plural noun for the things that --limit counts. most is the default of --limit.
	what string
	most int
	// of stands before "at most" in the help of --limit; it is set if key is set.
	of string
	// key returns the group of an entry. It is set if --limit counts groups.
	key func(T) string
	get func(*api.Client, context.Context, api.Filter) iter.Seq2[T, error]
	// table prints the entries.
	table func(io.Writer, []T) error
	// tableGKE prints the entries if --gke is given; nil means table.
	tableGKE func(io.Writer, []T) error
}

func (p pagedList[T]) command() *ucli.Command {
	own := append(slices.Clone(p.flags),
		&ucli.IntFlag{Name: "limit", Value: p.most, Usage: "list " + p.of + "at most `COUNT` " + p.what,
			Validator: func(n int) error {
				if n < 1 {
					return fmt.Errorf("limit %d: want 1 or more, or --all", n)
				}
				return nil
			}},
		&ucli.BoolFlag{Name: "all", Usage: "list all entries, without a limit"},
	)
	flags := clientFlags(own...)
	if p.token {
		flags = writeFlags(own...)
	}
	return &ucli.Command{
		Name: p.name, Usage: p.usage, Description: p.description, Flags: flags,
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			most := cmd.Int("limit")
			f := filter(cmd)
			f.Page = min(most, largestPage-1) + 1 // one more than wanted, to know whether there are more
			if cmd.Bool("all") {
				most, f.Page = 0, 0
			}
			all, more, err := readFirst(p.get(c, ctx, f), most, p.key)
			if err != nil {
				return err
			}
			table := p.table
			if f.GKE != "" && p.tableGKE != nil {
				table = p.tableGKE
			}
			if err := cli.Print(cmd, all, func(w io.Writer) error { return table(w, all) }); err != nil || !more {
				return err
			}
			_, err = fmt.Fprintf(
				cmd.Root().ErrWriter,
				"the server has more %s than the %d listed; list more with --limit COUNT, or all with --all\n",
				p.what,
				most,
			)
			return err
		},
	}
}

// readFirst reads at most as many entries as most, or all if most is 0. If key is not nil, most is a number of groups.
// It also reports whether there are further entries.
func readFirst[T any](entries iter.Seq2[T, error], most int, key func(T) string) (all []T, more bool, err error) {
	all = []T{}
	count, last := 0, ""
	for entry, err := range entries {
		if err != nil {
			return nil, false, err
		}
		if key == nil || count == 0 || key(entry) != last {
			if count++; most > 0 && count > most {
				return all, true, nil
			}
		}
		if key != nil {
			last = key(entry)
		}
		all = append(all, entry)
	}
	return all, false, nil
}

// filter returns the values of the flags that restrict a list. Flags that the command lacks are empty.
func filter(cmd *ucli.Command) api.Filter {
	return api.Filter{
		BuildID: cmd.String(
			"build-id",
		), Board: cmd.String("board"), Milestone: cmd.Int("milestone"), Driver: cmd.String("driver"),
		Flavour: cmd.String("flavour"), State: api.State(cmd.String("state")), Actor: cmd.String("actor"),
		GKE: strings.TrimPrefix(cmd.String("gke"), "v"),
	}
}

// kernelFilters returns the flags that select kernels in a list. They have no environment variables: a node's variables
// must not restrict a list.
func kernelFilters() []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{Name: "build-id", Usage: "show only entries for the COS build `BUILD_ID`"},
		&ucli.StringFlag{Name: "board", Usage: "show only entries for this `BOARD`"},
	}
}

func milestoneFilter() ucli.Flag {
	return &ucli.IntFlag{Name: "milestone", Usage: "show only entries for the COS milestone `NUMBER`, such as 109"}
}

func gkeFilter() ucli.Flag {
	return &ucli.StringFlag{Name: "gke", Usage: "show only entries for the COS builds of a GKE `VERSION` such as 1.33"}
}

func driverFilter() ucli.Flag {
	return &ucli.StringFlag{Name: "driver", Usage: "show only entries for this driver `VERSION`"}
}

func flavourFilter() ucli.Flag {
	return &ucli.StringFlag{Name: "flavour", Usage: "show only entries for this `FLAVOUR`: proprietary or open"}
}

func kernelsCommand() *ucli.Command {
	return pagedList[api.Kernel]{
		name: "kernels", usage: "list the known COS kernels, newest first", what: "kernels", most: 100,
		flags: append(kernelFilters(), milestoneFilter(), gkeFilter()), get: (*api.Client).EachKernel, table: printKernels,
		tableGKE: printGKE,
	}.command()
}

func driversCommand() *ucli.Command {
	return pagedList[api.DriverRelease]{
		name: "drivers", usage: "list the known driver versions, newest first", what: "drivers", most: 100,
		get: (*api.Client).EachDriver, table: printDrivers,
	}.command()
}

func artifactsCommand() *ucli.Command {
	return pagedList[api.Artifact]{
		name: "artifacts", usage: "list published and yanked artifacts, newest first", what: "artifacts", most: 100,
		flags: append(kernelFilters(), driverFilter(), flavourFilter(),
			&ucli.StringFlag{Name: "state", Usage: "show only artifacts in this `STATE`: published, yanked or quarantined"}),
		get: (*api.Client).EachArtifact, table: printArtifacts,
	}.command()
}

func buildsCommand() *ucli.Command {
	return pagedList[api.Build]{
		name: "builds", usage: "list builds, newest first", what: "builds", most: 100,
		flags: append(kernelFilters(), milestoneFilter(), driverFilter(), flavourFilter(),
			&ucli.StringFlag{Name: "state",
				Usage: "show only builds in this `STATE`: queued, building, published, failed or cancelled"}),
		get: (*api.Client).EachBuild, table: printBuilds,
	}.command()
}

func cellsCommand() *ucli.Command {
	return pagedList[api.Resolution]{
		name: "cells", usage: "list kernels with their drivers (cells) and states, newest kernel first",
		description: `A cell is a kernel with a driver. The list has the cells that were built or
requested.`,
		what: "kernels", of: "the cells of ", most: 20, key: func(r api.Resolution) string { return r.Kernel.String() },
		flags: append(kernelFilters(), milestoneFilter(), gkeFilter(), driverFilter(),
			&ucli.StringFlag{Name: "state",
				Usage: "show only cells in this `STATE`: building, queued, failed, yanked, quarantined or cancelled"}),
		get: (*api.Client).EachCell, table: printCells,
	}.command()
}

func quarantineCommand() *ucli.Command {
	return pagedList[api.Quarantine]{
		name: "quarantine", usage: "list quarantined artifacts, which failed on several nodes",
		what: "artifacts", most: 100,
		get: (*api.Client).EachQuarantine, table: printQuarantine,
	}.command()
}

func auditCommand() *ucli.Command {
	return pagedList[api.AuditEntry]{
		name: "audit", usage: "list who changed what, newest first", what: "changes", most: 100, token: true,
		flags: []ucli.Flag{
			&ucli.StringFlag{Name: "actor", Usage: "show only changes by this `CALLER`, such as token:node-pool-a"},
		},
		get: (*api.Client).EachAudit, table: printAudit,
	}.command()
}

func artifactCommand() *ucli.Command {
	return answerCommand("artifact", "show one artifact", "DIGEST",
		"take the digest from the list of artifacts: server artifacts", clientFlags(),
		func(ctx context.Context, c *api.Client, digest string) (api.Artifact, error) {
			return c.Artifact(ctx, digest)
		},
		func(w io.Writer, a api.Artifact) error { return printArtifacts(w, []api.Artifact{a}) })
}

func reportsCommand() *ucli.Command {
	flags := append(kernelFilters(),
		&ucli.StringFlag{Name: "digest", Usage: "show only reports about the artifact with this `DIGEST`"})
	return &ucli.Command{
		Name: "reports", Usage: "count what nodes reported about an artifact, or about all artifacts of a COS build",
		Flags: clientFlags(flags...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			if cmd.String("digest") == "" && cmd.String("build-id") == "" {
				return fault.New(fault.Usage, "count the reports: no artifact and no COS build is given",
					"add --digest for one artifact, or --build-id for all artifacts of a COS build")
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			all, err := c.ReportsOf(ctx, cmd.String("digest"), cmd.String("build-id"), cmd.String("board"))
			if err != nil {
				return err
			}
			return cli.Print(cmd, all, func(w io.Writer) error { return printReports(w, all) })
		},
	}
}
