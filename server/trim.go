package main

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

const day = 24 * time.Hour

// auditRetention is how long the audit log is kept. forgetTime is how long a server that stops waits for the database.
const (
	auditRetention = 400 * day
	forgetTime     = 5 * time.Second
)

// retention is how long builds and their logs are kept after the builds' ends. 0 keeps all.
type retention struct{ builds, logs time.Duration }

// trimmed is a catalogue from which old records are removed.
type trimmed interface {
	TrimAudit(ctx context.Context, before time.Time) error
	TrimBuilds(ctx context.Context, before time.Time) (int, error)
	MarkOldLogs(ctx context.Context, builds []int64, before, now time.Time) ([]int64, error)
	ForgetFacts(ctx context.Context) error
	AbsentBuilds(ctx context.Context, builds []int64) ([]int64, error)
}

// trimmedLogs are the logs of builds.
type trimmedLogs interface {
	Trim(before time.Time, choose func(builds []int64) ([]int64, error)) (int, error)
}

// trim removes old records once a day, until ctx is done: entries of the audit log, logs of builds, and builds.
func trim(ctx context.Context, db trimmed, logs trimmedLogs, keep retention, log *slog.Logger) error {
	tick := time.NewTicker(day)
	defer tick.Stop()
	for {
		now := time.Now()
		if err := db.TrimAudit(ctx, now.Add(-auditRetention)); err != nil && ctx.Err() == nil {
			log.WarnContext(ctx, "audit log not trimmed", "err", err)
		}
		if keep.logs > 0 {
			trimLogs(ctx, db, logs, now, keep.logs, log)
		}
		if keep.builds > 0 {
			trimBuilds(ctx, db, logs, now.Add(-keep.builds), log)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// trimLogs removes the logs of old builds. It asks the catalogue only about the logs that this server has, so the work
// does not grow with the catalogue. The catalogue records the removal first: after a crash between the two, the log can
// still be read, and the next trim removes it.
func trimLogs(
	ctx context.Context, db trimmed, logs trimmedLogs, now time.Time, keep time.Duration, log *slog.Logger,
) {
	before, marked := now.Add(-keep), 0
	removed, err := logs.Trim(before, func(builds []int64) ([]int64, error) {
		old, err := db.MarkOldLogs(ctx, builds, before, now)
		marked += len(old)
		return old, err
	})
	if marked > 0 {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTime)
		defer cancel()
		err = errors.Join(err, db.ForgetFacts(last))
	}
	if err != nil && ctx.Err() == nil {
		log.WarnContext(ctx, "old logs not removed", "err", err)
	}
	if removed > 0 {
		log.InfoContext(ctx, "old logs removed", "logs", removed)
	}
}

// trimBuilds removes builds that ended before the given time, and then the logs of builds that are gone. In this order,
// a crash between the two steps leaves no log for ever, and each server of one database removes its own logs. A younger
// log may belong to a build that a restored database does not have yet.
func trimBuilds(ctx context.Context, db trimmed, logs trimmedLogs, before time.Time, log *slog.Logger) {
	builds, err := db.TrimBuilds(ctx, before)
	removed := 0
	if err == nil {
		removed, err = logs.Trim(before, func(builds []int64) ([]int64, error) { return db.AbsentBuilds(ctx, builds) })
	}
	if err != nil && ctx.Err() == nil {
		log.WarnContext(ctx, "old builds not removed", "err", err)
	}
	if builds > 0 || removed > 0 {
		log.InfoContext(ctx, "old builds removed", "builds", builds, "logs", removed)
	}
}
