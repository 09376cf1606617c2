package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/cli"
)

func uninstallCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "uninstall",
		Usage: "remove the driver, and restore what the node had before",
		Description: `The driver is unloaded, if it is ours and nobody uses it, what another
installer had comes back, and nothing of ours stays in the install folder. A
run that was killed is finished by the next. Stop fetcher run first. The state
folder (--state-dir) of a node that compiled for itself is left to you.`,
		Flags: slices.Concat(hostFlags(), cli.Group(groupTo, cli.Bool("no-load", "leave the modules that are loaded")),
			cli.Group(groupOutput, cli.Bool("dry-run", "print what would be done, change nothing"), cli.OutputFlag())),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			return traced(ctx, cmd, a.Uninstall)
		},
	}
}

func historyCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "history",
		Usage: "list what happened to drivers on this node",
		Flags: append(hostFlags(), cli.Group(groupOutput, cli.OutputFlag())...),
		Action: func(_ context.Context, cmd *ucli.Command) (err error) {
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			events, err := a.History()
			if err != nil {
				return err
			}
			return cli.Print(cmd, events, func(w io.Writer) error {
				for _, e := range events {
					fmt.Fprintf(w, "%s  %-19s %s\n", e.At.UTC().Format(time.DateTime), e.What, e.Driver)
					if e.Reason != "" {
						fmt.Fprintf(w, "%21s%s\n", "", gpucheck.Clip(e.Reason, 59))
					}
				}
				return nil
			})
		},
	}
}
