package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// reportEnd sends the log first and then the outcome, so that the server already has the log when the build ends there.
// If the server refuses the log, the outcome is still sent. If the server's disk is full, the worker keeps the log of
// an ended build, and sends it later (see sendKeptLogs). The worker renames the log to a kept log before it sends the
// outcome. Without this order, a worker that is killed after the outcome would lose the log: at its next start, it
// removes the log of each ended build that is not kept.
func (w *worker) reportEnd(ctx context.Context, log *slog.Logger, build int64, update api.BuildUpdate) error {
	path, full := w.logPath(build), false
	err := retryUntilDone(ctx, func() error {
		err := w.sendLog(ctx, build, path)
		if full = fault.Is(err, fault.DiskFull); full { // the outcome needs no space, and must not wait for a person
			log.WarnContext(ctx, "build log not stored, because the server's disk is full", "err", err)
			return nil
		}
		return err
	})
	switch {
	case err != nil && mayPass(err):
		return err // the log file stays, and the next start of the worker sends it
	case err != nil:
		log.WarnContext(ctx, "build log refused by the server", "err", err)
	}
	keep := full && update.State != api.Queued // a queued build gets the log of its next attempt
	if keep {
		if err := w.keepLog(ctx, build, update.Attempt); err != nil && !errors.Is(err, os.ErrNotExist) {
			log.WarnContext(ctx, "build log not kept for a later try", "err", err)
		}
	}
	err = retryUntilDone(ctx, func() error {
		_, err := w.Server.UpdateBuild(ctx, build, update)
		return err
	})
	if err != nil {
		return fmt.Errorf("report the end of build %d: %w", build, err)
	}
	if keep {
		return nil
	}
	if err := dropLog(path); err != nil {
		log.WarnContext(ctx, "build log not removed from the state folder", "err", err)
	}
	return nil
}

// mayPass reports whether a later request may succeed. For an internal error of the server, it returns true, because
// the build did not cause the error.
func mayPass(err error) bool {
	kind := fault.Of(err)
	return kind.Retryable() || kind == fault.Internal
}

// retryUntilDone repeats a call every two seconds until it succeeds, its error is final (see mayPass), or ctx is done.
// It returns the last error.
func retryUntilDone(ctx context.Context, call func() error) error {
	for {
		err := call()
		if err == nil || !mayPass(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(2 * time.Second):
		}
	}
}

// sendLog sends a build's log, or only its last [api.MaxBuildLog] bytes.
func (w *worker) sendLog(ctx context.Context, build int64, path string) (err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the disk was full before the log was created
	}
	if err != nil {
		return fmt.Errorf("send the build's log: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && info.Size() > api.MaxBuildLog {
		_, err = f.Seek(-api.MaxBuildLog, io.SeekEnd)
	}
	if err == nil {
		err = w.Server.PutBuildLog(ctx, build, f)
	}
	if err != nil {
		return fmt.Errorf("send the build's log: %w", err)
	}
	return nil
}

func dropLog(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the build's log: %w", err)
	}
	return nil
}

// sendPendingLogs sends the logs of builds that were running when this worker was killed. If a build killed its worker,
// the end of its log shows why.
func (w *worker) sendPendingLogs(ctx context.Context) {
	left, err := filepath.Glob(filepath.Join(w.State, "build-*.log"))
	if err != nil {
		w.Log.WarnContext(ctx, "logs of earlier builds not listed", "err", err)
	}
	for _, path := range left {
		var build int64
		if _, err := fmt.Sscanf(filepath.Base(path), "build-%d.log", &build); err != nil || path != w.logPath(build) {
			continue // the file is not a log of this package
		}
		b, err := w.Server.Build(ctx, build)
		// If another worker has had the build since then, the server must keep that worker's log.
		if err == nil && b.Worker == w.ID && b.State == api.Building {
			err = w.sendLog(ctx, build, path)
		}
		// With another token, the server may accept the log at the next start.
		keep := err != nil && (mayPass(err) || fault.Is(err, fault.Unauthorized) || fault.Is(err, fault.Forbidden))
		if !keep {
			err = errors.Join(err, dropLog(path))
		}
		if err != nil {
			w.Log.WarnContext(ctx, "log of an earlier build not sent", "build", build, "err", err)
		}
	}
}

// reporter reports each new phase to the server, and after every [Config.Heartbeat] that the build is still running. It
// does not delay the build: a lost report does no harm. The server's response may cancel the build.
type reporter struct {
	server *api.Client
	build  int64
	// heartbeat is the content of each report.
	heartbeat api.BuildUpdate
	// end cancels the build. It may be called several times.
	end  context.CancelCauseFunc
	log  *slog.Logger
	next chan string
	done sync.WaitGroup
}

func (w *worker) newReporter(build int64, attempt int, end context.CancelCauseFunc, log *slog.Logger) *reporter {
	r := &reporter{server: w.Server, build: build, end: end, log: log, next: make(chan string, 1),
		heartbeat: api.BuildUpdate{Worker: w.ID, Attempt: attempt}}
	every := w.Heartbeat
	if every <= 0 {
		every = api.HeartbeatInterval
	}
	r.done.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case phase, more := <-r.next:
				if !more {
					return
				}
				r.heartbeat.Phase = phase
			case <-tick.C:
			}
			r.sendReport()
		}
	})
	return r
}

// sendReport sends one report. If the server responds that the build was cancelled or taken over, sendReport cancels
// the build.
func (r *reporter) sendReport() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	b, err := r.server.UpdateBuild(ctx, r.build, r.heartbeat)
	switch {
	case fault.Is(err, fault.Mismatch):
		r.end(fault.Wrap(fault.Cancelled, fmt.Errorf("the build does not belong to this builder any more: %w", err), ""))
	case err != nil:
		r.log.DebugContext(ctx, "phase not reported", "err", err)
	case b.State == api.Cancelled:
		r.end(fault.New(fault.Cancelled, "the build was cancelled", ""))
	}
}

// follow sends a log while it grows, until the channel is closed. A part that cannot be sent now is sent later.
func (w *worker) follow(ctx context.Context, build int64, stop <-chan struct{}, log *slog.Logger) {
	every := w.LogEvery
	if every <= 0 {
		every = logEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	offset, part := int64(0), make([]byte, api.MaxLiveLogPart)
	for {
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n, err := w.readLog(build, offset, part)
		if err == nil && n > 0 {
			err = w.sendPart(ctx, build, offset, part[:n])
		}
		switch {
		case fault.Is(err, fault.Mismatch):
			offset = 0 // the server lost the log, or has the log of another attempt, so the next part is the log's start
		case fault.Of(err).Retryable():
			log.DebugContext(ctx, "part of the build log not sent yet", "err", err)
		case err != nil: // the log is too long, or the server is an older version that accepts no parts
			log.DebugContext(ctx, "build log is sent only when the build ends", "err", err)
			return
		default:
			offset += int64(n)
		}
	}
}

// logEvery is the time between two parts of a growing log.
const logEvery = 2 * time.Second

func (w *worker) readLog(build, offset int64, part []byte) (int, error) {
	f, err := os.Open(w.logPath(build))
	if err != nil {
		return 0, err
	}
	n, err := f.ReadAt(part, offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, errors.Join(err, f.Close())
}

func (w *worker) sendPart(ctx context.Context, build, offset int64, part []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return w.Server.AppendBuildLog(ctx, build, offset, part)
}

// setPhase sets the phase for the next report. Only the timeline calls setPhase, and never concurrently.
func (r *reporter) setPhase(name string) {
	select {
	case <-r.next: // drops an older phase that was not reported
	default:
	}
	r.next <- name
}

func (r *reporter) close() {
	close(r.next)
	r.done.Wait()
}
