package worker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// keptLog is the log of an attempt that has ended, for which the server had no space. Its file name in Config.State
// contains the build, the attempt and the worker. So another worker that uses the same folder later can find out
// whether the server still needs this log.
type keptLog struct {
	path    string
	build   int64
	attempt int
	worker  string // idSum of the worker's ID
	size    int64
	at      time.Time
}

// keptName matches the file name of a kept log, as the method keptPath returns it.
var keptName = regexp.MustCompile(`^build-([0-9]{1,18})-([0-9]{1,9})-([0-9a-f]{16})\.kept$`)

func (w *worker) keptPath(build int64, attempt int) string {
	return filepath.Join(w.State, fmt.Sprintf("build-%d-%d-%s.kept", build, attempt, idSum(w.ID)))
}

// idSum returns a digest of a worker's ID. The ID itself may contain characters that a file name must not contain.
func idSum(id string) string {
	sum := sha256.Sum256([]byte(id))
	return fmt.Sprintf("%x", sum[:8])
}

// The kept logs are at most maxKept files with maxKeptBytes in all. The newest ones stay. A log that does not fit
// beside newer ones is removed, but smaller and older ones may still fit.
const (
	maxKept      = 50
	maxKeptBytes = 256 << 20
)

// keptEvery is the time between two rounds of sending kept logs.
const keptEvery = time.Minute

// keepLog renames the log of an attempt that has ended to a kept log.
func (w *worker) keepLog(ctx context.Context, build int64, attempt int) error {
	if err := os.Rename(w.logPath(build), w.keptPath(build, attempt)); err != nil {
		return err
	}
	_, err := w.trimKept(ctx)
	return err
}

// trimKept removes the kept logs that do not fit beside newer ones, and returns the others, the newest first.
func (w *worker) trimKept(ctx context.Context) (kept []keptLog, err error) {
	list, err := os.ReadDir(w.State)
	if err != nil {
		return nil, fmt.Errorf("find the build logs that wait to be sent: %w", err)
	}
	for _, e := range list {
		m := keptName.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find the build logs that wait to be sent: %w", err)
		}
		l := keptLog{path: filepath.Join(w.State, e.Name()), worker: m[3], size: info.Size(), at: info.ModTime()}
		l.build, _ = strconv.ParseInt(m[1], 10, 64) // the pattern admits only numbers that fit
		l.attempt, _ = strconv.Atoi(m[2])
		kept = append(kept, l)
	}
	slices.SortFunc(kept, func(a, b keptLog) int { return cmp.Or(b.at.Compare(a.at), cmp.Compare(b.build, a.build)) })
	var errs []error
	var size int64
	var fit []keptLog
	for i, l := range kept {
		if i < maxKept && size+l.size <= maxKeptBytes {
			size += l.size
			fit = append(fit, l)
			continue
		}
		w.Log.WarnContext(ctx, "kept build log removed unsent", "build", l.build,
			"err", "the server has no space for logs, and this builder keeps no more of them")
		errs = append(errs, dropLog(l.path))
	}
	return fit, errors.Join(errs...)
}

// sendKeptLogs sends the kept logs, at once and then at each interval, until the worker takes no more builds.
func (w *worker) sendKeptLogs() {
	every := w.KeptEvery
	if every <= 0 {
		every = keptEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		w.sendKept(w.stopping)
		select {
		case <-w.stopping.Done():
			return
		case <-tick.C:
		}
	}
}

// sendKept sends the kept logs, the newest first. It stops at the first error that sending the other logs would cause
// too.
func (w *worker) sendKept(ctx context.Context) {
	kept, err := w.trimKept(ctx)
	if err != nil {
		w.Log.WarnContext(ctx, "kept build logs not trimmed", "err", err)
	}
	for _, l := range kept {
		log := w.Log.With("build", l.build, "attempt", l.attempt)
		err := w.sendOne(ctx, l)
		switch kind := fault.Of(err); {
		case err == nil:
			log.InfoContext(ctx, "kept build log sent")
		case ctx.Err() != nil:
			return
		case kind.Retryable(), kind == fault.Unauthorized, kind == fault.Forbidden: // another token may be allowed to
			log.DebugContext(ctx, "kept build log not sent yet", "err", err)
			return
		case kind == fault.Internal: // it may be an error about this log alone
			log.DebugContext(ctx, "kept build log not sent yet", "err", err)
			continue
		default:
			log.WarnContext(ctx, "kept build log removed unsent", "err", err)
		}
		if err := dropLog(l.path); err != nil {
			log.WarnContext(ctx, "kept build log not removed from the state folder", "err", err)
		}
	}
}

// sendOne sends a kept log. If the build has had another attempt or worker since then, the server must keep their log,
// and the error is of kind Mismatch.
func (w *worker) sendOne(ctx context.Context, l keptLog) error {
	b, err := w.Server.Build(ctx, l.build)
	if err != nil {
		return err
	}
	if b.Attempt != l.attempt || idSum(b.Worker) != l.worker {
		return fault.Errorf(fault.Mismatch, "the build's last attempt is number %d, by builder %s; this log is of attempt %d",
			b.Attempt, b.Worker, l.attempt)
	}
	return w.sendLog(ctx, l.build, l.path)
}
