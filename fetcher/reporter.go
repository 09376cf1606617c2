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

// These are the time limits for one report, and for the last reports at the end.
const (
	reportTimeout = 10 * time.Second
	leaveTime     = 3 * time.Second
)

// reporter tells the server whether artifacts loaded on this node. It sends from its own goroutine, because a slow
// server must not block the node. Failed reports are lost.
type reporter struct {
	send func(ctx context.Context, r api.NodeReport) error
	log  *slog.Logger
	next chan api.NodeReport
	done chan struct{}
}

// checkReport refuses --report without a server, or without a token of this node.
func checkReport(cmd *ucli.Command) error {
	if !cmd.Bool("report") || cmd.Bool("dry-run") || cmd.String("server") != "" && cmd.String("token-file") != "" {
		return nil
	}
	return cli.About(fault.New(
		fault.Usage,
		"--report needs a server, and a token of this node",
		"give --server URL and --token-file FILE",
	), "report", "token-file", "server")
}

// newReporter starts a reporter. It returns nil if no reports are wanted.
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
	ctx, cancel := context.WithTimeoutCause(context.Background(), reportTimeout,
		errors.New("the server did not answer the report in time"))
	defer cancel()
	if err := t.send(ctx, r); err != nil {
		t.log.WarnContext(ctx, "the server did not accept a report", "digest", r.Digest, "outcome", r.Outcome, "err", err)
	}
}

// queue hands a report to the reporter's goroutine and returns at once. If eight reports already wait, the report is
// lost.
func (t *reporter) queue(r api.NodeReport) {
	select {
	case t.next <- r:
	default:
		t.log.Warn("dropped a report: earlier reports still wait", "digest", r.Digest, "outcome", r.Outcome)
	}
}

// close waits, at most leaveTime, until the queued reports are sent. Do not call queue after close.
func (t *reporter) close() {
	close(t.next)
	select {
	case <-t.done:
	case <-time.After(leaveTime):
	}
}
