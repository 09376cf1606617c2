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
		Description: `First stop "fetcher run". The command unloads the driver if Prebake loaded it
and no program uses it. It restores the files of another installer, and removes
Prebake's files from --install-dir. If uninstall was interrupted, run it again.
On a node that compiled drivers, remove the folder of --state-dir yourself.`,
		Flags: slices.Concat(hostFlags(), cli.Group(groupTo, cli.Bool("no-load", "do not unload the modules")),
			cli.Group(groupOutput, cli.Bool("dry-run", "print what would be done, and change nothing"), cli.OutputFlag())),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			return runTraced(ctx, cmd, a.Uninstall)
		},
	}
}

func historyCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "history",
		Usage: "list when drivers were installed, activated and removed on this node",
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
