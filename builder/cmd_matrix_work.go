package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

// defaultGrace is how long running cells of a wish list may continue after a stop signal. The time is long, because
// without a queue no other builder takes these cells.
const defaultGrace = 10 * time.Minute

// runWorkWish builds what a wish list asks for, and watches for new releases. After a stop signal it
// starts no more builds. A second signal cancels the running builds.
func runWorkWish(ctx context.Context, cmd *ucli.Command) (err error) {
	log, err := cli.Logger(cmd)
	if err != nil {
		return err
	}
	// Here, at the start, a mistake in the wish list ends the program, because the operator is watching. A later round
	// only logs a mistake.
	if _, err := readWish(cmd.String("wish")); err != nil {
		return err
	}
	m, err := openMatrix(ctx, cmd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if m.telemetry, err = startTelemetry(ctx, cmd, m.cfg.Cache, log); err != nil {
		return err
	}
	m.cfg.Cache.Notify = func(text string) { log.WarnContext(ctx, "cache damaged", "err", text) }
	grace := defaultGrace
	if cmd.IsSet("grace") {
		grace = cmd.Duration("grace")
	}
	hard, stop := cli.Grace(ctx, grace)
	defer stop()
	m.batch.Stopping = ctx.Done()
	m.batch.Watch = func(e batch.Event) { logEvent(hard, log, e) }
	log.InfoContext(ctx, "worker started", "wish", cmd.String("wish"), "parallel", m.batch.Parallel, "jobs", m.cfg.Jobs)
	tick := time.NewTicker(max(cmd.Duration("interval"), time.Second))
	defer tick.Stop()
	for {
		if err := m.runOnce(hard, cmd.String("wish"), log); err != nil && ctx.Err() == nil {
			log.ErrorContext(ctx, "wish list not built", "class", fault.Of(err), "err", err, "hint", fault.Hint(err))
		}
		select {
		case <-ctx.Done():
			log.InfoContext(hard, "worker stopped")
			return nil
		case <-tick.C:
		}
	}
}

// runOnce builds the cells that are not published now. If the wish list has a mistake, it builds nothing.
func (m *matrix) runOnce(ctx context.Context, file string, log *slog.Logger) error {
	begin := time.Now()
	w, err := readWish(file)
	if err != nil {
		return err
	}
	p, err := m.plan(ctx, w)
	if err != nil {
		return err
	}
	for _, note := range p.Notes {
		log.WarnContext(ctx, "wish list has a rule without effect", "note", note)
	}
	report, err := m.runPass(ctx, p)
	if report == nil {
		return err
	}
	args := []any{"cells", len(report.Jobs), "took", time.Since(begin).Round(time.Millisecond)}
	for _, s := range batch.States() {
		if n := report.States[s]; n > 0 {
			args = append(args, string(s), n)
		}
	}
	log.InfoContext(ctx, "wish list checked", args...)
	return errors.Join(
		m.setLabels(ctx, p, func(note string) { log.DebugContext(ctx, "label not set", "note", note) }), err)
}

// logEvent logs the events of a batch. The level is debug for the progress of fetches, for a cell that needs no build,
// and for a failure that an earlier round logged.
func logEvent(ctx context.Context, log *slog.Logger, e batch.Event) {
	log = log.With("kernel", e.Job.Cell.Kernel.String(), "driver", e.Job.Cell.Driver.String())
	switch e.Kind {
	case batch.Started:
		log.InfoContext(ctx, "build started", "attempt", e.Job.Attempts)
		return
	case batch.Again:
		log.WarnContext(ctx, "build queued again", "class", e.Failure.Class, "err", e.Failure.Error)
		return
	case batch.Note:
		log.WarnContext(ctx, "note", "err", e.Failure.Error)
		return
	case batch.Fetch:
		log.DebugContext(ctx, "input fetched", "what", e.Text)
		return
	case batch.Phase:
		return
	}
	took := time.Duration(e.Job.Seconds * float64(time.Second)).Round(time.Millisecond)
	switch e.Job.State {
	case batch.Published:
		log.InfoContext(ctx, "build published", "digest", e.Job.Digest, "took", took)
	case batch.Failed:
		level, message := slog.LevelError, "build failed"
		if e.Job.Cell.EarlyWarning {
			level, message = slog.LevelWarn, "early warning"
		}
		if e.Job.Known {
			level = slog.LevelDebug
		}
		log.Log(ctx, level, message, "class", e.Job.Failure.Class, "err", e.Job.Failure.Error, "log", e.Job.Log, "took", took)
	case batch.Cancelled:
		log.InfoContext(ctx, "build cancelled", "took", took)
	default:
		log.DebugContext(ctx, "build not needed", "state", string(e.Job.State))
	}
}
