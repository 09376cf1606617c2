package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// The headings under which --help lists flags of several commands.
const (
	groupWhat   = "What to ask"
	groupServer = "Server"
	groupOutput = "Output and advanced"
)

// clientFlags are a command's own flags, and those that reach a running server.
func clientFlags(own ...ucli.Flag) []ucli.Flag {
	return slices.Concat(
		cli.Group(groupWhat, own...),
		cli.Group(groupServer, cli.String("server", "http://127.0.0.1:8440", "`URL` of the server")),
		cli.Group(groupOutput, cli.OutputFlag()),
	)
}

// writeFlags add the token.
func writeFlags(own ...ucli.Flag) []ucli.Flag {
	return append(clientFlags(own...), cli.Group(groupServer,
		cli.String("token", "", "the server's `TOKEN`; prefer --token-file"),
		cli.String("token-file", "", "`FILE` with the server's token"),
	)...)
}

func client(cmd *ucli.Command) (*api.Client, error) {
	token := cmd.String("token")
	if file := cmd.String("token-file"); token == "" && file != "" {
		var err error
		if token, err = readToken(file); err != nil {
			return nil, err
		}
	}
	return api.NewClient(cmd.String("server"), token, nil), nil
}

// noArgs refuses arguments that a command would ignore.
func noArgs(cmd *ucli.Command) error {
	if first := cmd.Args().First(); first != "" {
		return fault.New(
			fault.Usage,
			fmt.Sprintf("%s takes no argument, got %q", cmd.FullName(), first),
			"see "+cmd.FullName()+" --help",
		)
	}
	return nil
}

// list makes a command that prints a list of the API as a table.
func list[T any](
	name, usage string,
	flags []ucli.Flag,
	get func(context.Context, *api.Client, *ucli.Command) ([]T, error),
	table func(io.Writer, []T) error,
) *ucli.Command {
	return &ucli.Command{
		Name: name, Usage: usage, Flags: flags,
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			all, err := get(ctx, c, cmd)
			if err != nil {
				return err
			}
			return cli.Print(cmd, all, func(w io.Writer) error { return table(w, all) })
		},
	}
}

func kernelsCommand() *ucli.Command {
	return list("kernels", "list the known COS kernels", clientFlags(),
		func(ctx context.Context, c *api.Client, _ *ucli.Command) ([]api.Kernel, error) { return c.Kernels(ctx) }, printKernels)
}

func driversCommand() *ucli.Command {
	return list("drivers", "list the known driver versions", clientFlags(),
		func(ctx context.Context, c *api.Client, _ *ucli.Command) ([]api.DriverRelease, error) {
			return c.Drivers(ctx)
		}, printDrivers)
}

func artifactsCommand() *ucli.Command {
	return list("artifacts", "list published and yanked artifacts", clientFlags(),
		func(ctx context.Context, c *api.Client, _ *ucli.Command) ([]api.Artifact, error) {
			return c.Artifacts(ctx)
		}, printArtifacts)
}

func buildsCommand() *ucli.Command {
	return list(
		"builds",
		"list builds, newest first",
		clientFlags(
			&ucli.StringFlag{
				Name:  "state",
				Usage: "only builds in this `STATE`: queued, building, published, failed or cancelled",
			},
		),
		func(ctx context.Context, c *api.Client, cmd *ucli.Command) ([]api.Build, error) {
			return c.Builds(ctx, api.State(cmd.String("state")))
		},
		printBuilds,
	)
}

func buildCommand() *ucli.Command {
	return &ucli.Command{
		Name: "build", Usage: "show one build, or its log", ArgsUsage: "ID",
		Flags: clientFlags(&ucli.BoolFlag{Name: "log", Usage: "print the full log instead"}),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			id, err := strconv.ParseInt(cmd.Args().First(), 10, 64)
			if err != nil || cmd.Args().Len() != 1 {
				return fault.New(fault.Usage, "build needs one number", "list builds: server builds")
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			if cmd.Bool("log") {
				log, err := c.BuildLog(ctx, id)
				if err != nil {
					return err
				}
				_, err = io.Copy(cmd.Root().Writer, log)
				if cerr := log.Close(); err == nil {
					err = cerr
				}
				return err
			}
			b, err := c.Build(ctx, id)
			if err != nil {
				return err
			}
			return cli.Print(cmd, b, func(w io.Writer) error { return printBuild(w, b) })
		},
	}
}

// cellFlags name a cell.
func cellFlags() []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{
			Name:     "build-id",
			Required: true,
			Usage:    "`BUILD_ID` of the COS build, as in /etc/os-release",
			Sources:  cli.Env("build-id"),
		},
		cli.String("board", "lakitu", "`BOARD` of the COS build"),
		cli.String("driver", string(target.Default), "`DRIVER`: default, latest, a branch or a version"),
		cli.String("flavour", "auto", "`FLAVOUR`: auto, proprietary or open"),
	}
}

func resolveCommand() *ucli.Command {
	return &ucli.Command{
		Name: "resolve", Usage: "ask what a node of a kernel should run", Flags: clientFlags(cellFlags()...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			r, err := c.Resolve(ctx, api.Question{BuildID: cmd.String("build-id"), Board: cmd.String("board"),
				Driver: cmd.String("driver"), Flavour: cmd.String("flavour")})
			if err != nil {
				return err
			}
			return cli.Print(cmd, r, func(w io.Writer) error { return printResolution(w, c.Base(), r) })
		},
	}
}

func requestCommand() *ucli.Command {
	flags := append(
		cellFlags(),
		&ucli.BoolFlag{Name: "wait", Usage: "wait until the build has ended; a failed one sets the exit status"},
	)
	return &ucli.Command{
		Name: "request", Usage: "ask for a build",
		Description: `Example:
  server request --build-id 17800.66.78 --driver R535 --wait --token-file token`,
		Flags: writeFlags(flags...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			b, err := c.RequestBuild(ctx, api.BuildRequest{BuildID: cmd.String("build-id"), Board: cmd.String("board"),
				Driver: cmd.String("driver"), Flavour: cmd.String("flavour")})
			if err != nil {
				return err
			}
			if cmd.Bool("wait") {
				if b, err = wait(ctx, c, b, cmd.Root().ErrWriter); err != nil {
					return err
				}
			}
			if err := cli.Print(cmd, b, func(w io.Writer) error { return printBuild(w, b) }); err != nil {
				return err
			}
			return ended(cmd.Bool("wait"), b)
		},
	}
}

// wait follows a build, with a line for each change. A server that is away for
// a while is waited for as well.
func wait(ctx context.Context, c *api.Client, b api.Build, say io.Writer) (api.Build, error) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last, away := "", false
	for {
		if line := strings.TrimSpace(fmt.Sprintf("build %d: %s %s", b.ID, b.State, b.Phase)); line != last {
			last = line
			fmt.Fprintln(say, line)
		}
		switch b.State {
		case api.Published, api.Failed, api.Cancelled:
			return b, nil
		}
		select {
		case <-ctx.Done():
			return b, fault.Wrap(fault.Cancelled, context.Cause(ctx), "")
		case <-tick.C:
		}
		next, err := c.Build(ctx, b.ID)
		switch {
		case err == nil:
			b = next
		case !fault.Of(err).Retryable():
			return b, err
		case !away && ctx.Err() == nil:
			fmt.Fprintf(say, "waiting for the server: %v\n", err)
		}
		away = err != nil
	}
}

// ended turns a build that was waited for and has not been published into the
// error of its class.
func ended(waited bool, b api.Build) error {
	if !waited || b.State == api.Published {
		return nil
	}
	kind, err := fault.Parse(b.Class)
	if err != nil {
		kind = fault.Cancelled
	}
	return fault.New(kind, fmt.Sprintf("build %d %s: %s", b.ID, b.State, b.Error), b.Hint)
}

func cancelCommand() *ucli.Command {
	return &ucli.Command{
		Name: "cancel", Usage: "call a build off, waiting or under way", ArgsUsage: "ID", Flags: writeFlags(),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			id, err := strconv.ParseInt(cmd.Args().First(), 10, 64)
			if err != nil || cmd.Args().Len() != 1 {
				return fault.New(fault.Usage, "cancel needs one number", "list builds: server builds")
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			b, err := c.Cancel(ctx, id)
			if err != nil {
				return err
			}
			return cli.Print(cmd, b, func(w io.Writer) error { return printBuild(w, b) })
		},
	}
}

func yankCommand() *ucli.Command {
	return &ucli.Command{
		Name: "yank", Usage: "mark an artifact as not to be used", ArgsUsage: "DIGEST",
		Flags: writeFlags(
			&ucli.StringFlag{Name: "reason", Required: true, Usage: "`WHY`; nodes show it"},
			&ucli.StringFlag{Name: "replacement", Usage: "`DIGEST` to use in its place: same kernels, same or newer driver"},
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			return markArtifact(cmd, func(c *api.Client, digest string) (api.Artifact, error) {
				return c.Yank(ctx, digest, api.YankRequest{Reason: cmd.String("reason"), Replacement: cmd.String("replacement")})
			})
		},
	}
}

func unyankCommand() *ucli.Command {
	return &ucli.Command{
		Name: "unyank", Usage: "take a yank back", ArgsUsage: "DIGEST", Flags: writeFlags(),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			return markArtifact(cmd, func(c *api.Client, digest string) (api.Artifact, error) { return c.Unyank(ctx, digest) })
		},
	}
}

func markArtifact(cmd *ucli.Command, call func(*api.Client, string) (api.Artifact, error)) error {
	if cmd.Args().Len() != 1 {
		return fault.New(fault.Usage, cmd.Name+" needs one digest", "list them: server artifacts")
	}
	c, err := client(cmd)
	if err != nil {
		return err
	}
	a, err := call(c, cmd.Args().First())
	if err != nil {
		return err
	}
	return cli.Print(cmd, a, func(w io.Writer) error { return printArtifacts(w, []api.Artifact{a}) })
}

func printBuild(w io.Writer, b api.Build) error {
	lines := [][2]string{
		{"build", strconv.FormatInt(b.ID, 10)}, {"kernel", b.Kernel.String()}, {"driver", b.Driver.String()},
		{"state", string(b.State)}, {"phase", b.Phase}, {"worker", b.Worker}, {"class", b.Class}, {"error", b.Error},
		{"hint", b.Hint}, {"digest", b.Digest},
	}
	if err := printFields(w, lines); err != nil || len(b.Phases) == 0 {
		return err
	}
	return timeline.Print(w, "timeline", b.Phases)
}
