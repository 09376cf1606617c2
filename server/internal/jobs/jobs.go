// Package jobs keeps the catalogue and the queue consistent. The two may be
// separate databases (a file each, with SQLite), so a crash between a write to
// the one and to the other must heal by itself. The sweep queues stored builds
// that the queue lacks, fails builds whose job is over, takes jobs of cancelled
// builds out of the queue, raises what was asked for, and gives what a dead
// builder left to the others.
//
// It refuses to work builds: builders do that, through package queue.
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

// catalogue is what the sweep asks of the use-cases.
type catalogue interface {
	OpenBuilds(ctx context.Context) ([]api.Build, error)
	Build(ctx context.Context, id int64) (api.Build, error)
	Enqueue(ctx context.Context, b api.Build) error
	Abandon(ctx context.Context, id int64, why string) error
	Update(ctx context.Context, id int64, u api.BuildUpdate) (api.Build, error)
}

// jobQueue is what the sweep asks of the queue.
type jobQueue interface {
	Open(ctx context.Context) (map[int64]queue.JobState, error)
	Lookup(ctx context.Context, build int64) (queue.JobState, error)
	Cancel(ctx context.Context, build int64) error
	SetPriority(ctx context.Context, build int64, priority int) error
	End(ctx context.Context, build int64) error
	Release(ctx context.Context, builds ...int64) error
}

// A builder reports every [api.HeartbeatInterval]. One that has not for deadAfter is gone,
// and with sweepEvery its builds go on elsewhere within a minute, also when the
// server or its database was away meanwhile: then builders get settle to be heard
// again, and not all of deadAfter.
const (
	deadAfter  = 30 * time.Second
	settleTime = 15 * time.Second
	sweepEvery = 5 * time.Second
	// idle is how many times longer than a sweep the pause after it is at least, so
	// that a queue of any length costs some hundredths of a core.
	idle = 25
)

// Sweeper compares open builds with the queue.
type Sweeper struct {
	Catalogue catalogue
	Queue     jobQueue
	// Every is the pause between sweeps; 0 means 5 seconds.
	Every time.Duration
	Log   *slog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time

	// listening is since when builders' reports have been heard without a break: a
	// builder is not dead because the server was away.
	listening time.Time
}

// Run sweeps until ctx is done. Trouble is logged and tried again.
func (s *Sweeper) Run(ctx context.Context) error {
	every := s.Every
	if every <= 0 {
		every = sweepEvery
	}
	for {
		begin := time.Now()
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "sweep failed", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(every, idle*time.Since(begin))):
		}
	}
}

// Sweep examines every open build once. A failure of one does not keep it from
// the others.
func (s *Sweeper) Sweep(ctx context.Context) error {
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	if s.listening.IsZero() {
		s.listening = now()
	}
	jobs, err := s.Queue.Open(ctx)
	var open []api.Build
	if err == nil {
		open, err = s.Catalogue.OpenBuilds(ctx)
	}
	if err != nil {
		s.listening = time.Time{} // reports may have been lost as well
		return err
	}
	var errs []error
	note := func(id int64, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("build %d: %w", id, err))
		}
	}
	for _, b := range open {
		at, found := jobs[b.ID]
		delete(jobs, b.ID)
		switch {
		case !found:
			note(b.ID, s.lost(ctx, b))
		case b.State == api.Building && s.dead(b, now()):
			note(b.ID, s.release(ctx, b, at))
		case b.State == api.Queued && b.Priority > 0 && at.Priority > b.Priority:
			note(b.ID, s.Queue.SetPriority(ctx, b.ID, b.Priority))
		}
	}
	for id := range jobs { // jobs without an open build
		note(id, s.leftOver(ctx, id, now()))
	}
	return errors.Join(errs...)
}

// dead reports whether the builder of a running build is gone.
func (s *Sweeper) dead(b api.Build, now time.Time) bool {
	silent := b.HeartbeatAt == nil || now.Sub(*b.HeartbeatAt) > deadAfter
	return silent && now.Sub(s.listening) > settleTime
}

// release gives a dead builder's work to the others. The job comes first: when the
// build is not put back after that, the next sweep does it, or the attempt that has
// begun by then makes it needless.
func (s *Sweeper) release(ctx context.Context, b api.Build, at queue.JobState) error {
	s.Log.WarnContext(ctx, "builder gone", "build", b.ID, "worker", b.Worker, "state", at.State)
	if err := s.Queue.Release(ctx, b.ID); err != nil {
		return err
	}
	_, err := s.Catalogue.Update(ctx, b.ID, api.BuildUpdate{State: api.Queued, Attempt: b.Attempt,
		Class: fault.Transient.String(), Error: fmt.Sprintf("builder %s stopped reporting in phase %s", b.Worker, b.Phase)})
	return err
}

// lost ends or queues a build that has no job which a worker will touch.
func (s *Sweeper) lost(ctx context.Context, b api.Build) error {
	at, err := s.Queue.Lookup(ctx, b.ID)
	switch {
	case err != nil:
		return err
	case !at.Found && b.State == api.Queued:
		s.Log.InfoContext(ctx, "build queued again", "build", b.ID)
		return s.Catalogue.Enqueue(ctx, b)
	case !at.Found:
		return s.Catalogue.Abandon(ctx, b.ID, "the queue lost the build's job")
	case at.Ended:
		why := at.Error
		if why == "" {
			why = "the worker reported no outcome"
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

// leftOver cancels the job of a build that was called off. Jobs of builds that have
// ended otherwise are about to end, too, unless a builder died between its report and
// the end of its job: that one is ended here.
func (s *Sweeper) leftOver(ctx context.Context, id int64, now time.Time) error {
	b, err := s.Catalogue.Build(ctx, id)
	switch {
	case err != nil:
		return err
	case b.FinishedAt != nil && now.Sub(*b.FinishedAt) > deadAfter:
		s.Log.WarnContext(ctx, "job of an ended build removed", "build", id, "state", b.State)
		return s.Queue.End(ctx, id)
	case b.State == api.Cancelled:
		return s.Queue.Cancel(ctx, id)
	}
	return nil
}
