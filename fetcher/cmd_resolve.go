package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/cli"
)

func resolveCommand() *ucli.Command {
	return &ucli.Command{
		Name:   "resolve",
		Usage:  "ask which artifact this node should run, and change nothing",
		Flags:  slices.Concat(wishFlags(), hostFlags(), cli.Group(groupOutput, cli.OutputFlag())),
		Action: resolveOnce,
	}
}

func resolveOnce(ctx context.Context, cmd *ucli.Command) (err error) {
	cfg, err := readConfig(cmd)
	if err != nil {
		return err
	}
	finder, err := newFinder(cmd, nil, false) // no verifier, because this command has no trusted keys
	if err != nil {
		return err
	}
	parts, done, err := hostParts(cmd, cfg, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	facts, err := host.Observe(parts.Node.FS())
	if err != nil {
		return err
	}
	say := func(text string) { fmt.Fprintln(cmd.Root().ErrWriter, "waiting: "+text) }
	answer, err := resolve.WaitLimits{Wait: cfg.Wait, Progress: say}.Find(ctx, finder,
		resolve.Question{Kernel: facts.Kernel, Wish: cfg.Wish, Pin: cfg.Pin, Flavour: cfg.Flavour, GPUs: facts.Listed()})
	if err != nil {
		return err
	}
	err = cli.Print(cmd, answer, func(w io.Writer) error {
		if answer.Digest != "" {
			_, err := fmt.Fprintf(w, "%s@%s\n", answer.Repository, answer.Digest)
			return err
		}
		_, err := fmt.Fprintf(w, "%s\n", answer.State)
		return err
	})
	return errors.Join(answer.Err(), err)
}
