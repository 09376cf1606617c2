package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

func reportFlag() []ucli.Flag {
	return cli.Group(groupTo, cli.Bool("report", "report to the server whether the driver loads"))
}

// Bounds of telling the server: of one report, and of what is left when the program ends.
const (
	reportTimeout = 10 * time.Second
	leaveTime     = 3 * time.Second
)

// reporter tells the server what happened to artifacts, beside everything else: a server that
// is slow or away blocks nothing, and what it does not take is lost.
type reporter struct {
	send func(ctx context.Context, r api.NodeReport) error
	log  *slog.Logger
	next chan api.NodeReport
	done chan struct{}
}

// checkReport refuses to report to nobody, or without a name.
func checkReport(cmd *ucli.Command) error {
	if !cmd.Bool("report") || cmd.Bool("dry-run") || cmd.String("server") != "" && cmd.String("token-file") != "" {
		return nil
	}
	return cli.About(fault.New(
		fault.Usage,
		"--report needs a server, and a token that names this node",
		"give --server URL and --token-file FILE",
	), "report", "token-file", "server")
}

// newReporter returns nil where nothing is to be told.
func newReporter(cmd *ucli.Command, log *slog.Logger) (*reporter, error) {
	if err := checkReport(cmd); err != nil || !cmd.Bool("report") || cmd.Bool("dry-run") {
		return nil, err
	}
	server, file := cmd.String("server"), cmd.String("token-file")
	return startReporter(log, api.NewClient(server, "", nil).WithTokenFile(file).Report), nil
}

func startReporter(log *slog.Logger, send func(context.Context, api.NodeReport) error) *reporter {
	t := &reporter{send: send, log: log, next: make(chan api.NodeReport, 8), done: make(chan struct{})}
	go func() {
		defer close(t.done)
		for r := range t.next {
			t.one(r)
		}
	}()
	return t
}

func (t *reporter) one(r api.NodeReport) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), reportTimeout, errors.New("the server takes no report"))
	defer cancel()
	if err := t.send(ctx, r); err != nil {
		t.log.WarnContext(ctx, "report not taken", "digest", r.Digest, "outcome", r.Outcome, "err", err)
	}
}

// queue has a report sent soon; what comes faster than the server takes it is lost.
func (t *reporter) queue(r api.NodeReport) {
	select {
	case t.next <- r:
	default:
		t.log.Warn("report dropped", "digest", r.Digest, "outcome", r.Outcome)
	}
}

// close waits a little for what is on its way. Nothing may be told after it.
func (t *reporter) close() {
	close(t.next)
	select {
	case <-t.done:
	case <-time.After(leaveTime):
	}
}
