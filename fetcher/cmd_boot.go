package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/pkg/cli"
)

func bootCommand() *ucli.Command {
	flags := func() []ucli.Flag { return slices.Concat(hostFlags(), cli.Group(groupOutput, cli.OutputFlag())) }
	action := func(undo bool) ucli.ActionFunc {
		return func(_ context.Context, cmd *ucli.Command) (err error) {
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			r, err := a.Boot(undo)
			if r == nil {
				return err
			}
			return errors.Join(err, cli.Print(cmd, r, func(w io.Writer) error { return printBoot(w, r) }))
		}
	}
	return &ucli.Command{
		Name:  "boot",
		Usage: "show which modules the kernel accepts, and undo what --edit-boot did",
		Commands: []*ucli.Command{
			{Name: "status", Usage: "show which modules the kernel accepts, and why", Flags: flags(), Action: action(false)},
			{
				Name: "undo", Usage: "restore the boot configuration that --edit-boot changed",
				Description: `The restored configuration takes effect at the next boot. If something else has
changed the configuration since, such as an update of the operating system, undo
leaves the configuration as it is.`,
				Flags: flags(), Action: action(true),
			},
		},
	}
}

func printBoot(w io.Writer, r *agent.BootReport) error {
	say := func(what string, on bool, more string) {
		text := map[bool]string{true: "yes", false: "no"}[on]
		if more != "" {
			text += ", " + more
		}
		fmt.Fprintf(w, "%-28s %s\n", what, text)
	}
	p := r.Policy
	say("module signatures enforced", p.SignaturesEnforced, "")
	more := ""
	if len(p.LoadPinExcludes) > 0 {
		more = "but for " + strings.Join(p.LoadPinExcludes, ", ")
	}
	say("LoadPin", p.LoadPin, more)
	say("lockdown", p.Lockdown != "", p.Lockdown)
	say("Secure Boot", r.SecureBoot, "")
	fmt.Fprintf(w, "%-28s %d\n", "boot configuration changed", r.Edits)
	if r.Undone {
		fmt.Fprintln(w, "the boot configuration is restored; reboot the node")
	}
	return nil
}
