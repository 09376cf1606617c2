package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	ucli "github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/pkg/cli"
)

func runCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "run",
		Usage: "bring the node to its driver, then watch it",
		Description: `Ends with the verdict's exit status when no driver is ready; whoever started
it (kubelet, systemd) then tries again. While one serves the node and another
is wanted, it says why and tries by itself. On SIGTERM the modules stay loaded.`,
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

// retryLooks is after how many looks a run is tried again that left the node with
// another driver than the one that it wants.
const retryLooks = 10

// hold brings the node to its driver and, while one is ready, watches it until ctx ends.
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
		every := max(cmd.Duration("interval"), time.Second)
		for {
			ready := false
			err := runOnce(gctx, cmd, func(ctx context.Context) (*agent.Report, error) {
				r, err := a.Run(ctx)
				outside.Tell(r.Verdict)
				outside.TellPhases(r.Phases)
				ready = r.Verdict.State == gpucheck.Ready
				return r, err
			})
			if gctx.Err() != nil || cmd.Bool("dry-run") || err != nil && !ready {
				return err
			}
			watch, stop := gctx, context.CancelFunc(func() {})
			if err != nil {
				// Another driver is wanted than the one that serves this node: that is no reason
				// to end, and to be started again, and again.
				fmt.Fprintf(cmd.Root().ErrWriter, "pending: %v\n", err)
				watch, stop = context.WithTimeout(gctx, retryLooks*every)
			}
			outside.Watch(3*every + lookTime)
			held := a.Hold(watch, every, outside)
			stop()
			if held != nil || gctx.Err() != nil || err == nil {
				return held
			}
		}
	})
	return g.Wait()
}
