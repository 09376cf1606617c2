package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/footprint"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kube"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

func runCommand() *ucli.Command {
	return cli.WithConfig(&ucli.Command{
		Name:  "run",
		Usage: "install and load the node's driver, then watch it",
		Description: `If no driver is loaded, run ends with the exit status of the cause, and kubelet
or systemd starts run again. If a loaded driver cannot use a GPU, or another one
is wanted, run reports it and retries. On SIGTERM the modules stay loaded.

Examples:
  fetcher run --server https://prebake.example --listen :8441
  fetcher run --config fetcher.yaml`,
		Flags: slices.Concat(installFlags(), cli.Group(groupWhat,
			cli.Bool("driver-label", "node label "+kube.LabelWanted+" overrides --driver"),
		), cli.Group(groupTo,
			cli.String("listen", "", "serve /healthz, /readyz and /metrics at `ADDRESS`"),
			cli.Duration("interval", time.Minute, "`TIME` between two checks of the driver"),
			cli.String("node-name", "", "write the driver's state to the Kubernetes node `NAME`"),
			cli.String("startup-taint", "", "remove the node's taint `KEY` when the driver is ready"),
		)),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			a, done, err := newAgent(cmd, true)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, done()) }()
			return runAndWatch(ctx, cmd, a)
		},
	}, cli.Config{Check: checkRun})
}

// checkRun reports all settings of the command run that contradict each other.
func checkRun(cmd *ucli.Command) error {
	_, err := readConfig(cmd)
	errs := []error{err, checkTrust(cmd), checkTaint(cmd), checkLabel(cmd), checkReport(cmd)}
	_, err = serverURL(cmd)
	errs = append(errs, err)
	if strings.HasPrefix(cmd.String("driver"), digestPrefix) && len(cmd.StringSlice("registry")) == 0 {
		errs = append(errs, pinnedNowhere())
	}
	return errors.Join(errs...)
}

func checkTaint(cmd *ucli.Command) error {
	if cmd.String("startup-taint") == "" || cmd.String("node-name") != "" {
		return nil
	}
	return cli.About(fault.New(fault.Usage, "--startup-taint needs the name of a node", "name the node: --node-name NAME"),
		"startup-taint")
}

func checkLabel(cmd *ucli.Command) error {
	if !cmd.Bool("driver-label") || cmd.String("node-name") != "" {
		return nil
	}
	return cli.About(fault.New(fault.Usage, "--driver-label needs the name of a node", "name the node: --node-name NAME"),
		"driver-label")
}

// checkTimeout is an upper bound for one check of the driver. The probes of NVML and CUDA time out earlier.
const checkTimeout = 5 * time.Minute

// runTimeout is the longest expected time between two verdicts during a run. While a run waits for the network, it
// checks the active driver each minute. While it replaces the driver, it makes no checks.
const runTimeout = 15 * time.Minute

// retryChecks is the number of checks after which the daemon runs the agent again. The daemon does so only if the last
// run ended with an error, left the node with another driver than the wanted one, or did not learn from the farm which
// driver is wanted.
const retryChecks = 10

// runAndWatch installs the node's driver. While a driver is loaded, it watches the driver until ctx ends.
func runAndWatch(ctx context.Context, cmd *ucli.Command, a *agent.Agent) error {
	outside := &listeners{server: report.New(time.Now)}
	a.Watch(outside)
	log, err := logger(cmd, true)
	if err != nil {
		return err
	}
	tracer := startTraces(ctx, cmd, log)
	defer tracer.Close()
	if name := cmd.String("node-name"); name != "" {
		if outside.cluster, err = kube.New(name, cmd.String("startup-taint"), kube.AccountDir, log); err != nil {
			return err
		}
	}
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(inner)
	if listen := cmd.String("listen"); listen != "" {
		g.Go(func() error { return serve(gctx, outside.server, listen, log) })
	}
	if outside.cluster != nil {
		g.Go(func() error { return outside.cluster.Run(gctx) })
	}
	g.Go(func() error {
		defer cancel() // the HTTP server and the reporter to the cluster end with the daemon
		k := daemon{
			node: a, every: max(cmd.Duration("interval"), time.Second), once: cmd.Bool("dry-run"), outside: outside,
			run: func(run func(context.Context) (*agent.Report, error)) error { return runOnce(gctx, cmd, tracer, run) },
			pending: func(err error) {
				if outside.cluster != nil {
					outside.cluster.Pending(err)
				}
				if err != nil {
					fmt.Fprintf(cmd.Root().ErrWriter, "pending: %v\n", err)
				}
			},
			quickVerdict: a.QuickVerdict,
		}
		if cmd.Bool("driver-label") {
			a.UseLabel(outside.cluster.Wanted)
			k.awaitLabel = outside.cluster.AwaitLabel
		}
		err := k.stay(gctx)
		if outside.cluster != nil && ctx.Err() == nil {
			// Operators look into the cluster for the reason why the program ends.
			last, done := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
			defer done()
			outside.cluster.Flush(last)
		}
		return err
	})
	return g.Wait()
}

// listenPause is the time between two attempts to listen on the address of the HTTP server.
const listenPause = 5 * time.Second

// serve serves the driver's state until ctx ends. If the address cannot be used, serve logs this and tries again: the
// node needs its driver, even if nobody can read its state.
func serve(ctx context.Context, server *report.Server, listen string, log *slog.Logger) error {
	last := ""
	for {
		err := server.Run(ctx, listen)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if text := err.Error(); text != last {
			last = text
			log.WarnContext(ctx, "could not serve the state over HTTP; fetcher tries again", "err", err, "hint", fault.Hint(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(listenPause):
		}
	}
}

// flushTime is the longest time that a failing program waits for the cluster to store the reason.
const flushTime = 10 * time.Second

// listeners pass the driver's state on to the HTTP server and to the cluster. cluster may be nil.
type listeners struct {
	server  *report.Server
	cluster *kube.Node
	watched bool // whether verdicts expire
	last    gpucheck.Verdict
}

// Watch sets the age at which a verdict expires; 0 means never.
func (l *listeners) Watch(age time.Duration) {
	l.watched = age > 0
	l.server.Watch(age)
	if l.cluster != nil {
		l.cluster.Watch(age)
	}
}

// Report implements [agent.Watcher]. From the first ready driver on, verdicts expire.
func (l *listeners) Report(v gpucheck.Verdict) {
	if v.State == gpucheck.Ready && !l.watched {
		l.Watch(runTimeout)
	}
	l.last = v
	l.server.Report(v)
	if l.cluster != nil {
		l.cluster.Report(v)
	}
}

// Alive implements [agent.Watcher].
func (l *listeners) Alive() {
	l.server.Alive()
	if l.cluster != nil {
		l.cluster.Alive()
	}
}

// CheckStarted implements [agent.Watcher].
func (l *listeners) CheckStarted() {
	l.server.CheckStarted()
	if l.cluster != nil {
		l.cluster.CheckStarted()
	}
}

// CheckStopped implements [agent.Watcher].
func (l *listeners) CheckStopped() {
	l.server.CheckStopped()
	if l.cluster != nil {
		l.cluster.CheckStopped()
	}
}

var _ agent.PendingWatcher = (*listeners)(nil)

// Pending implements [agent.PendingWatcher]. The agent logs the reason itself.
func (l *listeners) Pending(why error) {
	if l.cluster != nil {
		l.cluster.Pending(besides(why, l.last))
	}
}

// daemon installs the driver of a node, and then keeps watching it.
type daemon struct {
	node interface {
		Run(ctx context.Context) (*agent.Report, error)
		Monitor(ctx context.Context, every time.Duration, w agent.Watcher) error
	}
	every   time.Duration
	once    bool
	outside *listeners
	// run does one run of the agent, and prints the report.
	run func(func(context.Context) (*agent.Report, error)) error
	// quickVerdict returns a verdict before the first run, and after a run that ended without one; see
	// [agent.Agent.QuickVerdict].
	quickVerdict func(context.Context) (gpucheck.Verdict, bool)
	// pending is called after each run, with the reason why the node lacks the wanted driver, or nil.
	pending func(error)
	// awaitLabel waits until the node's label changes, or the context ends. It reports whether the label changed. nil
	// means that no label counts.
	awaitLabel func(context.Context) bool
}

// untilLabel returns a context that also ends when the node's label changes. Call the function after the work with the
// context: it releases the context, and reports whether the label changed.
func (k daemon) untilLabel(ctx context.Context) (context.Context, func() bool) {
	if k.awaitLabel == nil {
		return ctx, func() bool { return false }
	}
	inner, cancel := context.WithCancel(ctx)
	changed := make(chan bool, 1)
	go func() {
		changed <- k.awaitLabel(inner)
		cancel()
	}()
	return inner, func() bool {
		cancel()
		return <-changed
	}
}

// waitForLabel waits until the node's label changes, but at most as long as the daemon waits between two runs, because
// somebody may load a driver meanwhile. why is what the reported verdict does not say, or nil.
func (k daemon) waitForLabel(ctx context.Context, why error) {
	k.pending(why)
	k.outside.Watch(0) // nothing is checked meanwhile
	inner, stop := context.WithTimeout(ctx, retryChecks*k.every)
	defer stop()
	k.awaitLabel(inner)
}

// reportFailure reports why no driver is ready, after a run that failed before its check of the driver.
func (k daemon) reportFailure(v gpucheck.Verdict, why error) {
	v.Reason = fault.Of(why).String() + ": " + why.Error()
	k.outside.Report(v)
}

func (k daemon) stay(ctx context.Context) error {
	// Report a verdict before the first run: the cluster may still show the driver of an earlier boot, and the metrics
	// must show the GPUs even if the first run ends the program. The state of this verdict is never Ready.
	if v, ok := k.quickVerdict(ctx); ok {
		k.outside.Report(v)
	}
	watched := false // a driver is loaded that this program must keep watching
	for {
		if watched {
			k.outside.Watch(runTimeout)
		} else {
			k.outside.Watch(0) // the run may compile a driver before there is a verdict
		}
		var pending error
		unconfirmed := false
		relabelled := false // Monitor does not see this change of the label, because the run has read it
		var last gpucheck.Verdict
		err := k.run(func(ctx context.Context) (*agent.Report, error) {
			r, err := k.node.Run(ctx)
			unconfirmed, relabelled = r.Unconfirmed, r.Relabelled
			switch {
			case r.Pending != "":
				pending = errors.New(r.Pending) // even if this run had no error, a reason of an earlier run is still true
			case unconfirmed && r.Answer.Reason != "":
				pending = errors.New(r.Answer.Reason)
			}
			if last = r.Verdict; last.State != "" { // without a verdict, the verdict of the last check stays
				k.outside.Report(last)
				watched = mustWatch(last)
			} else if err != nil {
				// If no driver was ready before, report the error with the present state. If a driver was ready before, its verdict
				// stays, unless this run unloaded that driver and could not load it again.
				v, ok := k.quickVerdict(ctx)
				switch {
				case ok && (!watched || v.NotLoaded()):
					k.reportFailure(v, err)
					watched = false
				// An earlier process found the driver ready, and this process could not check it.
				case !ok && !watched && v.State == gpucheck.Ready && !fault.Is(err, fault.Busy):
					v.State = gpucheck.Loaded
					k.reportFailure(v, err)
				}
			}
			k.outside.server.ReportRun(r.Phases, err)
			return r, err
		})
		if ctx.Err() == nil && !k.once && !watched && k.awaitLabel != nil && errors.Is(err, kube.ErrLabel) {
			// Do not end: kubelet or systemd would start the program again, and it would find the same label.
			var why error
			if last.State != "" { // else reportFailure has reported it with the verdict
				why = besides(err, last)
			}
			if k.waitForLabel(ctx, why); ctx.Err() != nil {
				return nil
			}
			continue
		}
		if relabelled && ctx.Err() == nil && !k.once {
			continue
		}
		if ctx.Err() != nil || k.once || err != nil && !watched {
			return err
		}
		// A label that was read already starts no other run, even if the farm did not say which driver it means.
		retry := err != nil || pending != nil || unconfirmed
		if rest := besides(err, last); rest != nil {
			pending = rest
		}
		k.pending(pending)
		watch, stop := ctx, func() {}
		if retry {
			// The driver is loaded, so keep running: kubelet or systemd would only restart this program again and again.
			watch, stop = context.WithTimeout(ctx, retryChecks*k.every)
		}
		footprint.Trim() // give the node the memory that only the run needed
		k.outside.Watch(3*k.every + checkTimeout)
		watch, ended := k.untilLabel(watch)
		held := k.node.Monitor(watch, k.every, k.outside)
		relabelled = ended()
		stop()
		switch {
		case ctx.Err() != nil:
		case errors.Is(held, agent.ErrNotLoaded):
			watched = false
			continue
		case errors.Is(held, agent.ErrRollback), relabelled && held == nil:
			continue
		}
		if held != nil || ctx.Err() != nil || !retry {
			return held
		}
	}
}

// mustWatch reports whether the daemon must watch a driver with this verdict. In state Starting, the driver waits for
// NVLink's fabric manager, which starts only after the driver. In state Unusable, somebody may reset the GPU that the
// loaded driver cannot use, and only a program that watches the GPU notices the reset.
func mustWatch(v gpucheck.Verdict) bool {
	switch v.State {
	case gpucheck.Ready, gpucheck.Starting:
		return true
	case gpucheck.Unusable:
		return !v.NotLoaded()
	}
	return false
}

// besides returns the errors that are joined in err, without the error of the verdict v, which was reported already. If
// nothing else is in err, it returns nil.
func besides(err error, v gpucheck.Verdict) error {
	var p *gpucheck.Problem
	if !errors.As(err, &p) {
		return err
	}
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		var rest []error
		for _, e := range joined.Unwrap() {
			rest = append(rest, besides(e, v))
		}
		return errors.Join(rest...)
	}
	if p.IsOf(v) {
		return nil
	}
	return err
}
