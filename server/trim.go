package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

const day = 24 * time.Hour

// auditRetention is how long the audit log is kept.
const auditRetention = 400 * day

// trimmed is a catalogue from which old records are removed.
type trimmed interface {
	TrimAudit(ctx context.Context, before time.Time) error
	TrimBuilds(ctx context.Context, before time.Time) (int, error)
	Build(ctx context.Context, id int64) (api.Build, error)
}

// trimmedLogs are the logs of builds.
type trimmedLogs interface {
	Trim(before time.Time, gone func(build int64) (bool, error)) (int, error)
}

// trim removes old records once a day, until ctx is done: entries of the audit log, and builds that ended more than the
// given time ago, with their logs. 0 keeps all builds.
func trim(ctx context.Context, db trimmed, logs trimmedLogs, keep time.Duration, log *slog.Logger) error {
	tick := time.NewTicker(day)
	defer tick.Stop()
	for {
		now := time.Now()
		if err := db.TrimAudit(ctx, now.Add(-auditRetention)); err != nil && ctx.Err() == nil {
			log.WarnContext(ctx, "audit log not trimmed", "err", err)
		}
		if keep > 0 {
			trimBuilds(ctx, db, logs, now.Add(-keep), log)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// trimBuilds removes builds that ended before the given time, and then the logs of builds that are gone. So a crash
// between the two leaves no log for ever, and each server of one database removes its own logs.
func trimBuilds(ctx context.Context, db trimmed, logs trimmedLogs, before time.Time, log *slog.Logger) {
	builds, err := db.TrimBuilds(ctx, before)
	removed := 0
	if err == nil {
		removed, err = logs.Trim(before, func(build int64) (bool, error) {
			_, err := db.Build(ctx, build)
			if fault.Is(err, fault.NotFound) {
				return true, nil
			}
			return false, err
		})
	}
	if err != nil && ctx.Err() == nil {
		log.WarnContext(ctx, "old builds not removed", "err", err)
	}
	if builds > 0 || removed > 0 {
		log.InfoContext(ctx, "old builds removed", "builds", builds, "logs", removed)
	}
}
