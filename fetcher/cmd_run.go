package main

import (
	"context"
	"errors"
	"time"

	ucli "github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/pkg/cli"
)

func runCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "run",
		Usage: "bring the node to its driver, then watch it",
		Description: `Ends at once, with the verdict's exit status, when the driver is not ready;
whoever started it (kubelet, systemd) then tries again. On SIGTERM the modules
stay loaded.`,
		Flags: append(installFlags(), cli.Group(groupOutput,
			cli.String("listen", "", "serve /healthz, /readyz and /metrics on `ADDRESS`, as in 127.0.0.1:8441"),
			cli.Duration("interval", time.Minute, "`TIME` between two looks at the driver"),
		)...),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := newAgent(cmd, true)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			return hold(ctx, cmd, a)
		},
	}
}

// lookTime is longer than a look takes where the driver answers, or the probe is given
// up.
const lookTime = 3 * time.Minute

// hold runs once and, if the driver is ready, watches it until ctx ends.
func hold(ctx context.Context, cmd *ucli.Command, a *agent.Agent) error {
	outside := report.New(time.Now)
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(inner)
	if listen := cmd.String("listen"); listen != "" {
		g.Go(func() error { return outside.Run(gctx, listen) })
	}
	g.Go(func() error {
		defer cancel() // the server has nothing to tell after this
		err := runOnce(gctx, cmd, func(ctx context.Context) (*agent.Report, error) {
			r, err := a.Run(ctx)
			outside.Tell(r.Verdict)
			outside.TellPhases(r.Phases)
			return r, err
		})
		if err != nil || cmd.Bool("dry-run") {
			return err
		}
		every := max(cmd.Duration("interval"), time.Second)
		outside.Watch(3*every + lookTime)
		return a.Hold(gctx, every, outside)
	})
	return g.Wait()
}
