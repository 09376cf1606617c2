// Package jobs keeps the catalogue and the queue in agreement. The two may be in different databases, and a crash may
// come between the writes to both. A sweep repairs that:
//
//   - It queues stored builds that the queue lacks.
//   - It marks an open build as failed if its job has ended.
//   - It removes jobs of cancelled builds from the queue.
//   - It raises the priority of jobs to the priority of their builds.
//   - It gives the jobs of a dead builder to other builders.
//   - It removes waiting jobs of builds that the catalogue does not know, such as after the restore of an older
//     catalogue. If this is the wrong catalogue, the right one queues these builds again.
//
// The package runs no builds: builders take their jobs from the queue.
package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
)

// catalogue has the use-cases that the sweep needs.
type catalogue interface {
	OpenBuilds(ctx context.Context) ([]api.Build, error)
	HasBuilds(ctx context.Context) (bool, error)
	Build(ctx context.Context, id int64) (api.Build, error)
	Enqueue(ctx context.Context, b api.Build) error
	Abandon(ctx context.Context, id int64, why string) error
	Update(ctx context.Context, id int64, u api.BuildUpdate) (api.Build, error)
}

// jobQueue has the functions of the queue that the sweep needs.
type jobQueue interface {
	Open(ctx context.Context) (map[int64]queue.JobState, error)
	Lookup(ctx context.Context, build int64) (queue.JobState, error)
	Cancel(ctx context.Context, build int64) error
	SetPriority(ctx context.Context, build int64, priority int) error
	End(ctx context.Context, build int64) error
	Remove(ctx context.Context, builds ...int64) (removed int, err error)
	Release(ctx context.Context, builds ...int64) error
}

// A builder reports every [api.HeartbeatInterval]. A builder is dead if the sweeps see no new report for deadAfter.
// Only the sweeper's own clock measures this time, because another server may have written the time of the report. A
// dead builder's builds continue within a minute, also after the server was down.
const (
	deadAfter  = 30 * time.Second
	sweepEvery = 5 * time.Second
	// idleFactor is the minimum pause after a sweep, as a multiple of its duration. It limits sweeps to some hundredths
	// of a core. But no pause is longer than maxPause, even after a sweep that queues many builds again.
	idleFactor = 25
	maxPause   = time.Minute
)

// Sweeper compares open builds with the queue.
type Sweeper struct {
	Catalogue catalogue
	Queue     jobQueue
	// Every is the pause between sweeps; 0 means 5 seconds.
	Every time.Duration
	Log   *slog.Logger
	// Now returns the current time. nil means time.Now.
	Now func() time.Time

	// heard has the last report of each running build. It is empty after an error of the database and after a stall,
	// because reports may have been lost.
	heard map[int64]heard
	// read is when the last sweep had read the open builds, and pause is how long Run pauses after it.
	read  time.Time
	pause time.Duration
	late  bool // the last sweep came later than its pause explains
	empty bool // the last sweep found jobs and a catalogue without builds
}

// heard has the time of a builder's last report, and the time at which a sweep first saw this report.
type heard struct{ report, seen time.Time }

// Run sweeps at intervals until ctx is done. It logs errors and continues.
func (s *Sweeper) Run(ctx context.Context) error {
	every := s.Every
	if every <= 0 {
		every = sweepEvery
	}
	for {
		begin := time.Now()
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "comparison of the builds with the queue failed", "err", err)
		}
		s.pause = max(every, min(maxPause, idleFactor*time.Since(begin)))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(s.pause):
		}
	}
}

// Sweep examines every open build. An error with one does not stop the others.
func (s *Sweeper) Sweep(ctx context.Context) error {
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	jobs, err := s.Queue.Open(ctx)
	var open []api.Build
	if err == nil {
		open, err = s.Catalogue.OpenBuilds(ctx)
	}
	if err != nil {
		s.heard, s.read = nil, time.Time{}
		return err
	}
	var errs []error
	note := func(id int64, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("compare build %d with its job in the queue: %w", id, err))
		}
	}
	before := s.heard
	if s.stalled(now()) {
		before = nil
	}
	s.heard = map[int64]heard{}
	refused := false
	for _, b := range open {
		at, found := jobs[b.ID]
		delete(jobs, b.ID)
		switch {
		case !found:
			note(b.ID, s.repairLost(ctx, b, b.State == api.Building && s.dead(b, before, now())))
		case b.State == api.Building && s.dead(b, before, now()):
			err := s.releaseJob(ctx, b, at)
			note(b.ID, err)
			refused = refused || err != nil
		case b.State == api.Queued && b.Priority > 0 && at.Priority > b.Priority:
			note(b.ID, s.Queue.SetPriority(ctx, b.ID, b.Priority))
		}
	}
	if refused { // the database may have refused the builders' reports, too
		s.heard = nil
	}
	if len(open) > 0 || len(jobs) == 0 {
		s.empty = false
	} else if err := s.checkEmpty(ctx, len(jobs)); err != nil || s.empty {
		return errors.Join(append(errs, err)...)
	}
	var unknown []int64
	for id := range jobs { // these jobs have no open build
		known, err := s.endLeftOver(ctx, id, now())
		note(id, err)
		if !known {
			unknown = append(unknown, id)
		}
	}
	return errors.Join(append(errs, s.removeUnknown(ctx, unknown))...)
}

// checkEmpty sets whether the catalogue has no builds at all, and warns about it once. Then the server probably has the
// wrong catalogue, so the sweep leaves the queue as it is.
func (s *Sweeper) checkEmpty(ctx context.Context, jobs int) error {
	has, err := s.Catalogue.HasBuilds(ctx)
	if err != nil {
		return err
	}
	if !has && !s.empty {
		s.Log.WarnContext(ctx, "jobs left in the queue, because the catalogue has no builds", "jobs", jobs, "hint",
			"start the server with its own --data and --database, or restore the catalogue: docs/how-to/back-up.md")
	}
	s.empty = !has
	return nil
}

// removeUnknown removes the waiting jobs of builds that the catalogue does not know. It removes them without a record,
// and it ends no running job. So if this is the wrong catalogue, the right one queues the builds again.
func (s *Sweeper) removeUnknown(ctx context.Context, builds []int64) error {
	if len(builds) == 0 {
		return nil
	}
	n, err := s.Queue.Remove(ctx, builds...)
	if n > 0 {
		s.Log.WarnContext(ctx, "jobs of unknown builds removed", "jobs", n, "hint",
			"if the catalogue is not of the queue's farm, start the server with its own --data and --database; that server "+
				"queues the builds again: docs/how-to/back-up.md")
	}
	return err
}

// stalled reports whether the server or its database was stalled since the last sweep: this sweep came later than its
// pause explains. If all sweeps are late, only the first counts as stalled, because dead builders must be found.
func (s *Sweeper) stalled(now time.Time) bool {
	late := !s.read.IsZero() && now.Sub(s.read)-s.pause > deadAfter
	stalled := late && !s.late
	s.read, s.late = now, late
	return stalled
}

// dead reports whether the builder of a running build is dead: a sweep first saw its last report more than deadAfter
// ago, and no newer report has come.
func (s *Sweeper) dead(b api.Build, before map[int64]heard, now time.Time) bool {
	h := heard{seen: now}
	if b.HeartbeatAt != nil {
		h.report = *b.HeartbeatAt
	}
	if old, ok := before[b.ID]; ok && old.report.Equal(h.report) {
		h = old
	}
	s.heard[b.ID] = h
	return now.Sub(h.seen) > deadAfter
}

// releaseJob gives a dead builder's job to other builders. It changes the queue first, because the next sweep repeats a
// failed change of the build.
func (s *Sweeper) releaseJob(ctx context.Context, b api.Build, at queue.JobState) error {
	s.Log.WarnContext(ctx, "builder gone", "build", b.ID, "worker", b.Worker, "state", at.State)
	if err := s.Queue.Release(ctx, b.ID); err != nil {
		return err
	}
	_, err := s.Catalogue.Update(ctx, b.ID, api.BuildUpdate{State: api.Queued, Attempt: b.Attempt,
		Class: fault.Transient.String(), Error: fmt.Sprintf("builder %s stopped reporting in phase %s", b.Worker, b.Phase)})
	return err
}

// repairLost handles an open build without an open job: it queues the build again or marks it as failed. dead is
// whether the builder of a running build is dead. Such a build becomes queued, and the next sweep queues it again.
func (s *Sweeper) repairLost(ctx context.Context, b api.Build, dead bool) error {
	at, err := s.Queue.Lookup(ctx, b.ID)
	switch {
	case err != nil:
		return err
	case !at.Found && b.State == api.Queued:
		s.Log.InfoContext(ctx, "build queued again", "build", b.ID)
		return s.Catalogue.Enqueue(ctx, b)
	case !at.Found && dead:
		return s.releaseJob(ctx, b, at)
	case !at.Found: // the builder can still report the end of the build
		return nil
	case at.Ended:
		why := at.Error
		if why == "" {
			why = "the worker reported no result"
		}
		s.Log.WarnContext(ctx, "build abandoned", "build", b.ID, "err", why)
		return s.Catalogue.Abandon(
			ctx,
			b.ID,
			fmt.Sprintf("the job ended as %s after %d attempts: %s", at.State, at.Attempt, why),
		)
	}
	return nil
}

// endLeftOver removes a job without an open build, and reports whether the catalogue knows the build. It removes no job
// of an unknown build. It removes the job of a cancelled build at once. Other jobs usually end by themselves, so it
// removes them only after deadAfter.
func (s *Sweeper) endLeftOver(ctx context.Context, id int64, now time.Time) (known bool, err error) {
	b, err := s.Catalogue.Build(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound): // a build is stored before its job, so it is not a new one
		return false, nil
	case err != nil:
		return true, err
	case b.FinishedAt != nil && now.Sub(*b.FinishedAt) > deadAfter:
		if err := s.Queue.End(ctx, id); err != nil {
			return true, err
		}
		s.Log.WarnContext(ctx, "job of an ended build removed", "build", id, "state", b.State)
		return true, nil
	case b.State == api.Cancelled:
		return true, s.Queue.Cancel(ctx, id)
	}
	return true, nil
}
