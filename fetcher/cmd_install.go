package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/traces"
)

func installCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "install",
		Usage: "install and load the node's driver once, and report the result",
		Description: `Example:
  fetcher install --server https://prebake.example --driver R535`,
		Flags: append(installFlags(), cli.Group(groupTo,
			cli.Bool("retry", "retry even an artifact that failed twice, crashed the node, or was rolled back"))...),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := newAgent(cmd, false)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			return runTraced(ctx, cmd, a.Run)
		},
	}
}

// runTraced calls [runOnce] with a tracer, and closes the tracer.
func runTraced(ctx context.Context, cmd *ucli.Command, run func(context.Context) (*agent.Report, error)) error {
	log, err := logger(cmd, false)
	if err != nil {
		return err
	}
	tracer := startTraces(ctx, cmd, log)
	defer tracer.Close()
	return runOnce(ctx, cmd, tracer, run)
}

// startTraces starts the tracer that the OTEL_* environment variables configure. If these variables are wrong,
// startTraces prints the error and returns nil: the node must get its driver anyway.
func startTraces(ctx context.Context, cmd *ucli.Command, log *slog.Logger) *traces.Tracer {
	tracer, err := traces.Start(ctx, "prebake-fetcher", version, log)
	if err != nil {
		fmt.Fprintf(cmd.Root().ErrWriter, "no traces are sent: %v (%s)\n", err, fault.Hint(err))
		return nil
	}
	return tracer
}

// runOnce traces a run and prints its report, even after an error.
func runOnce(ctx context.Context, cmd *ucli.Command, tracer *traces.Tracer,
	run func(context.Context) (*agent.Report, error)) error {
	ctx, span := tracer.Begin(ctx, cmd.Name, nil)
	r, err := run(ctx)
	for _, p := range r.Phases {
		span.Phase(p)
	}
	span.End(err, map[string]any{
		"prebake.kernel": r.Kernel.String(), "prebake.driver": r.Answer.Driver.String(), "prebake.digest": r.Answer.Digest,
		"prebake.source": string(r.Answer.Source), "prebake.verdict": string(r.Verdict.State),
		"prebake.fetched_bytes": r.FetchedBytes,
	})
	return errors.Join(err, cli.Print(cmd, r, func(w io.Writer) error { return printReport(w, r) }))
}

func printReport(w io.Writer, r *agent.Report) error {
	if r.Kernel.BuildID != "" {
		fmt.Fprintf(w, "%-8s COS %s, %s\n", "node", r.Kernel, r.Kernel.Release)
	}
	if r.Answer.Digest != "" {
		fmt.Fprintf(w, "%-8s %s, from %s\n%-8s %s\n", "driver", r.Answer.Driver, r.Answer.Source, "artifact",
			r.Answer.Repository)
		if r.Verdict.State == "" {
			fmt.Fprintf(w, "%-8s %s\n", "digest", r.Answer.Digest)
		}
	}
	step := "did"
	if r.DryRun {
		step = "would"
	}
	for _, p := range r.Plan {
		fmt.Fprintf(w, "%-8s %s\n", step, p)
	}
	if r.DryRun && len(r.Plan) == 0 {
		fmt.Fprintf(w, "%-8s nothing\n", step)
	}
	for _, what := range r.Waiting {
		fmt.Fprintf(w, "%-8s %s\n", "waiting", what)
	}
	for _, m := range r.Modules {
		if m.Reason != "" {
			fmt.Fprintf(w, "%-8s %s: %s\n", m.Was, m.Name, m.Reason)
		}
	}
	if r.Verdict.State != "" {
		if err := r.Verdict.Print(w); err != nil {
			return err
		}
	}
	return timeline.Print(w, "timeline", r.Phases)
}
