package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

func statusCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "status",
		Usage: "print which driver is installed (from disk) and which is loaded (from /proc)",
		Flags: append(hostFlags(), cli.Group(groupOutput, probeFlag(), cli.OutputFlag())...),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			s, err := a.Status(ctx)
			if err != nil {
				return err
			}
			return errors.Join(s.Verdict.Err(), cli.Print(cmd, s, func(w io.Writer) error { return printStatus(w, s) }))
		},
	}
}

func rollbackCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "rollback",
		Usage: "activate the previous driver again",
		Flags: slices.Concat(hostFlags(), trustFlags(), cli.Group(groupResources, stateFlag()), changeFlags()),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := localAgent(cmd)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			return runTraced(ctx, cmd, a.Rollback)
		},
	}
}

// localAgent makes an agent that asks no server and no registry.
func localAgent(cmd *ucli.Command) (*agent.Agent, func() error, error) {
	cfg, err := readHostConfig(cmd)
	if err != nil {
		return nil, nil, err
	}
	log, err := logger(cmd, false)
	if err != nil {
		return nil, nil, err
	}
	if cmd.Name == "rollback" {
		if err := needProbe(cmd, cfg); err != nil {
			return nil, nil, err
		}
	}
	parts, done, err := hostParts(cmd, cfg, log)
	if err != nil {
		return nil, nil, err
	}
	if cmd.Name != "status" {
		if v, refresh, err := localVerifier(cmd, parts.Node); err == nil {
			parts.Verifier, parts.Refresh = v, refresh
		} else if cmd.Name == "verify" {
			return nil, nil, errors.Join(err, done())
		} else {
			parts.Verifier = refuseAll{err} // the error matters only if the command loads something
		}
	}
	return agent.New(cfg, parts), done, nil
}

func localVerifier(cmd *ucli.Command, node *noderoot.Root) (*trust.Verifier, func(context.Context) error, error) {
	p, err := trustPolicy(cmd)
	if err != nil {
		return nil, nil, err
	}
	return newVerifier(cmd, p, node)
}

// refuseAll is a verifier that refuses every artifact. reason is the error because of which there is no real verifier.
type refuseAll struct{ reason error }

func (n refuseAll) Verify([][]byte, trust.Expect) (*trust.Verdict, error) { return nil, n.reason }
func (n refuseAll) Statement([]byte) (*trust.Statement, error)            { return nil, n.reason }
func (n refuseAll) Wanted(target.Kernel) []map[string]string              { return nil }

func printStatus(w io.Writer, s *agent.Status) error {
	fmt.Fprintf(w, "%-8s COS %s, %s\n", "node", s.Host.Kernel, s.Host.Kernel.Release)
	if s.Host.Driver.Version != "" {
		fmt.Fprintf(w, "%-8s %s\n", "loaded", s.Host.Driver)
	}
	if s.Previous != nil {
		fmt.Fprintf(w, "%-8s %s\n", "previous", s.Previous.Driver)
	}
	if err := s.Verdict.Print(w); err != nil {
		return err
	}
	for _, u := range s.Host.Users {
		fmt.Fprintf(w, "%-8s %s\n", "used by", u)
	}
	for _, what := range s.Host.Unread {
		fmt.Fprintf(w, "%-8s %s\n", "unread", what)
	}
	return nil
}
