package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// cell has the values of the flags that select a cell.
type cell struct {
	BuildID, Board, Driver, Flavour string
}

// cellFlags returns the flags that select a cell. If required is false, the command also has another way to select a
// cell.
func cellFlags(required bool) []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{
			Name:     "build-id",
			Required: required,
			Usage:    "`BUILD_ID` of the COS build, as in /etc/os-release",
			Sources:  cli.Env("build-id"),
		},
		cli.String("board", "lakitu", "`BOARD` of the COS build"),
		cli.String("driver", string(target.Default),
			"`VERSION`; or branch (R535), latest or default, each also per GPU: R535@NVIDIA_L4"),
		cli.String("flavour", "auto", "driver `FLAVOUR`: auto, proprietary or open"),
	}
}

func cellOf(cmd *ucli.Command) cell {
	return cell{BuildID: cmd.String("build-id"), Board: cmd.String("board"),
		Driver: cmd.String("driver"), Flavour: cmd.String("flavour")}
}

// command returns the text of a command, such as watch, with flags that select this cell.
func (c cell) command(name string) string {
	return fmt.Sprintf("server %s --build-id %s --board %s --driver %s --flavour %s",
		name, c.BuildID, c.Board, c.Driver, c.Flavour)
}

// cellError returns nil for a published cell. If the cell's build is queued or running, the error has kind Pending.
// Otherwise it has kind NoArtifact.
func cellError(asked cell, r api.Resolution) error {
	of := "COS build"
	if _, gke := api.BuildOrGKE(asked.BuildID); gke != "" {
		of = "GKE"
	}
	what := fmt.Sprintf("driver %s for %s %s/%s is %s", asked.Driver, of, asked.BuildID, asked.Board, r.State)
	switch r.State {
	case api.Published:
		return nil
	case api.Queued, api.Building:
		hint := "wait for the build: " + asked.command("watch")
		if r.Build != nil {
			hint = fmt.Sprintf("wait for the build: server watch %d", r.Build.ID)
		}
		return fault.New(fault.Pending, what, hint)
	}
	if r.Reason != "" {
		what += ": " + r.Reason
	}
	hint := r.Hint
	if hint == "" && (r.State == api.Unknown || r.State == api.Cancelled || r.State == api.Failed) {
		hint = "request a build: " + asked.command("request")
	}
	return fault.New(fault.NoArtifact, what, hint)
}

// exitsOfCells is the part of the help that explains the exit status, for authors of pipelines.
const exitsOfCells = `The exit status is
  0   published: nodes find their driver
  16  pending: the driver is queued, or being built
  3   not covered: the driver is not published, and nobody builds it`

func resolveCommand() *ucli.Command {
	return &ucli.Command{
		Name: "resolve", Usage: "ask which artifact a node with a given kernel should run",
		Flags: clientFlags(cellFlags(true)...),
		Description: exitsOfCells + `

Example:
  server resolve --build-id 17800.66.78 --driver R535 --output json`,
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			asked := cellOf(cmd)
			r, err := c.Resolve(ctx, asked.question())
			if err != nil {
				return err
			}
			if err := cli.Print(cmd, r, func(w io.Writer) error { return printResolution(w, c.Base(), r) }); err != nil {
				return err
			}
			return cellError(asked, r)
		},
	}
}

func (c cell) question() api.Question {
	return api.Question{BuildID: c.BuildID, Board: c.Board, Driver: c.Driver, Flavour: c.Flavour}
}

func preflightCommand() *ucli.Command {
	return &ucli.Command{
		Name:      "preflight",
		Usage:     "check that the driver of nodes is published for a COS build, before the nodes boot that COS build",
		ArgsUsage: "[POOL...]",
		Description: `POOL describes a node pool: BUILD_ID[:BOARD[:DRIVER[:FLAVOUR]]]. The flags give
the parts that POOL leaves out, or all parts if there is no POOL. If the server
has a --gke-map, BUILD_ID may be a version of GKE: it stands for the COS build
that nodes of this version boot.

` + exitsOfCells + `
With several pools, the status is the one of the worst pool: 3 if one pool is
not covered.

Example:
  server preflight 17800.66.78:lakitu:R535 17800.66.78:lakitu-arm64:R570:open
  server preflight 1.33.5-gke.1080000:lakitu:default@NVIDIA_L4`,
		Flags: clientFlags(cellFlags(false)...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			asked, err := pools(cellOf(cmd), cmd.Args().Slice())
			if err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			var q api.PreflightRequest
			for _, a := range asked {
				pool := api.Pool{Board: a.Board, Driver: a.Driver, Flavour: a.Flavour}
				pool.BuildID, pool.GKE = api.BuildOrGKE(a.BuildID)
				q.Pools = append(q.Pools, pool)
			}
			answer, err := c.Preflight(ctx, q)
			if err != nil {
				return err
			}
			if n := len(answer.Pools); n != len(asked) {
				return fault.Errorf(fault.Internal, "%s: the server answers for %d pools; want %d", cmd.FullName(), n, len(asked))
			}
			if err := cli.Print(cmd, answer,
				func(w io.Writer) error { return printPreflight(w, c.Base(), answer) }); err != nil {
				return err
			}
			return verdict(asked, answer)
		},
	}
}

// pools returns the cells that the arguments of the command preflight select. Missing parts come from base.
func pools(base cell, args []string) ([]cell, error) {
	if len(args) == 0 {
		if base.BuildID == "" {
			return nil, fault.New(fault.Usage, "server preflight needs a COS build",
				"for one pool, add --build-id 17800.66.78; for several, add an argument for each: 17800.66.78:lakitu:R535")
		}
		return []cell{base}, nil
	}
	var all []cell
	for _, arg := range args {
		parts := strings.Split(arg, ":")
		if len(parts) > 4 || parts[0] == "" {
			return nil, fault.New(fault.Usage, fmt.Sprintf("pool %q: want BUILD_ID[:BOARD[:DRIVER[:FLAVOUR]]]", arg),
				"write a pool such as 17800.66.78:lakitu:R535")
		}
		c := base
		for i, to := range []*string{&c.BuildID, &c.Board, &c.Driver, &c.Flavour} {
			if i < len(parts) && parts[i] != "" {
				*to = parts[i]
			}
		}
		all = append(all, c)
	}
	return all, nil
}

// verdict returns the error of the worst pool, or nil if all pools may be upgraded.
func verdict(asked []cell, answer api.Preflight) error {
	var worst error
	waiting, missing := 0, 0
	for i, v := range answer.Pools {
		cell := asked[i]
		if v.Resolution.Kernel.BuildID != "" { // if the request has a GKE version, only the response has the BUILD_ID
			cell.BuildID = v.Resolution.Kernel.BuildID
		}
		err := cellError(cell, v.Resolution)
		switch {
		case err == nil:
			continue
		case fault.Is(err, fault.Pending):
			waiting++
		default:
			missing++
		}
		if worst == nil || fault.Is(worst, fault.Pending) && !fault.Is(err, fault.Pending) {
			worst = err
		}
	}
	if worst == nil || len(asked) == 1 {
		return worst
	}
	err := fmt.Errorf("%d of %d pools cannot be upgraded yet (%d pending, %d not covered): %w",
		waiting+missing, len(asked), waiting, missing, worst)
	return fault.Wrap(fault.Of(worst), err, "")
}

func printPreflight(w io.Writer, base string, answer api.Preflight) error {
	if len(answer.Pools) == 1 {
		return printResolution(w, base, answer.Pools[0].Resolution)
	}
	rows := [][]string{}
	for _, v := range answer.Pools {
		may := "no"
		if v.May {
			may = "yes"
		}
		driver := v.Resolution.Driver.String()
		if v.Resolution.Driver.Version == "" {
			driver = v.Pool.Driver
		}
		rows = append(
			rows,
			[]string{may, kernelOf(v), driver, string(v.Resolution.State), note(v.Resolution)},
		)
	}
	return printTable(w, []string{"MAY", "KERNEL", "DRIVER", "STATE", "NOTE"}, rows, "no pool was asked for")
}

// kernelOf returns the name of the kernel in a verdict. Without a kernel, it returns the GKE version and the board.
func kernelOf(v api.PoolVerdict) string {
	if v.Resolution.Kernel.BuildID == "" {
		return v.Pool.GKE + "/" + v.Pool.Board
	}
	return v.Resolution.Kernel.String()
}

// note returns a short text with what a reader needs to know about a cell apart from its state.
func note(r api.Resolution) string {
	var parts []string
	if r.Position > 0 {
		parts = append(parts, "number "+strconv.Itoa(r.Position))
	}
	if r.ETA != nil {
		parts = append(parts, "ready about "+clock(*r.ETA))
	}
	if r.State == api.Published {
		parts = append(parts, r.Digest)
	}
	return strings.Join(slices.DeleteFunc(append(parts, r.Reason), func(s string) bool { return s == "" }), ", ")
}

func printCells(w io.Writer, all []api.Resolution) error {
	rows := [][]string{}
	for _, r := range all {
		rows = append(rows, []string{r.Kernel.String(), r.Driver.String(), string(r.State), note(r)})
	}
	return printTable(
		w,
		[]string{"KERNEL", "DRIVER", "STATE", "NOTE"},
		rows,
		"no cell was requested yet; request a build: server request --build-id BUILD_ID",
	)
}
