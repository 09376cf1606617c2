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

// reportEnd sends the log and then the outcome: a reader who sees that a build is
// over finds its log. A log that the server refuses does not hide the outcome.
func (w *worker) reportEnd(ctx context.Context, log *slog.Logger, build int64, update api.BuildUpdate) error {
	err := retryUntilDone(ctx, func() error { return w.sendLog(ctx, build) })
	switch {
	case err != nil && mayPass(err):
		return err // the file stays for the next start
	case err != nil:
		log.WarnContext(ctx, "log not taken", "err", err)
	}
	err = retryUntilDone(ctx, func() error {
		_, err := w.Server.UpdateBuild(ctx, build, update)
		return err
	})
	if err != nil {
		return fmt.Errorf("report end of build %d: %w", build, err)
	}
	if err := w.dropLog(build); err != nil {
		log.WarnContext(ctx, "log not removed", "err", err)
	}
	return nil
}

// mayPass reports whether the server may answer better later: what goes wrong
// inside it is not the build's fault either.
func mayPass(err error) bool {
	kind := fault.Of(err)
	return kind.Retryable() || kind == fault.Internal
}

// retryUntilDone repeats a call that may succeed later, until ctx is done.
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

// sendLog sends the end of a build's log, as much as the server takes.
func (w *worker) sendLog(ctx context.Context, build int64) (err error) {
	f, err := os.Open(w.logPath(build))
	if errors.Is(err, os.ErrNotExist) {
		return nil // the disk was full before the first line
	}
	if err != nil {
		return fmt.Errorf("send log: %w", err)
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
		return fmt.Errorf("send log: %w", err)
	}
	return nil
}

func (w *worker) dropLog(build int64) error {
	if err := os.Remove(w.logPath(build)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove log: %w", err)
	}
	return nil
}

// sendPendingLogs sends the logs of builds that a killed process of this worker
// was at, so that the last log lines of a build that kills its worker are read.
func (w *worker) sendPendingLogs(ctx context.Context) {
	left, err := filepath.Glob(filepath.Join(w.State, "build-*.log"))
	if err != nil {
		w.Log.WarnContext(ctx, "old logs not found", "err", err)
	}
	for _, name := range left {
		var build int64
		if _, err := fmt.Sscanf(filepath.Base(name), "build-%d.log", &build); err != nil {
			continue // not ours
		}
		b, err := w.Server.Build(ctx, build)
		// Another worker may have been at the build since: its log counts.
		if err == nil && b.State == api.Building && b.Worker == w.ID {
			err = w.sendLog(ctx, build)
		}
		if err == nil || !mayPass(err) {
			err = errors.Join(err, w.dropLog(build))
		}
		if err != nil {
			w.Log.WarnContext(ctx, "old log not sent", "build", build, "err", err)
		}
	}
}

// reporter tells the server of phases, and every [api.HeartbeatInterval] that the build is running, without delaying
// the build: only the newest phase matters, and a lost report harms nobody. What the server answers may end the build.
type reporter struct {
	server *api.Client
	build  int64
	// heartbeat is what each report says.
	heartbeat api.BuildUpdate
	// end cancels the build; it may be called several times.
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
			r.report()
		}
	})
	return r
}

// report tells the server once, and learns whether the build is still wanted.
func (r *reporter) report() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	b, err := r.server.UpdateBuild(ctx, r.build, r.heartbeat)
	switch {
	case fault.Is(err, fault.Mismatch):
		r.end(fault.Wrap(fault.Cancelled, fmt.Errorf("the build is not this builder's any more: %w", err), ""))
	case err != nil:
		r.log.DebugContext(ctx, "phase not reported", "err", err)
	case b.State == api.Cancelled:
		r.end(fault.New(fault.Cancelled, "the build was cancelled", ""))
	}
}

// follow sends a log as it grows, until stop is closed. What cannot be sent now is sent
// with the next part, or with the whole log at the end.
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
			offset = 0 // another server, or another builder's log
		case fault.Of(err).Retryable():
			log.DebugContext(ctx, "log not sent yet", "err", err)
		case err != nil: // there is too much of it, or the server is an older one
			log.DebugContext(ctx, "log is sent at the end only", "err", err)
			return
		default:
			offset += int64(n)
		}
	}
}

// logEvery is how often the new part of a log is sent.
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

// phase is called by one timeline, which never calls concurrently.
func (r *reporter) phase(name string) {
	select {
	case <-r.next: // an older one that nobody took
	default:
	}
	r.next <- name
}

func (r *reporter) close() {
	close(r.next)
	r.done.Wait()
}
