// Package jobs keeps the catalogue and the queue of one mind. The two are
// separate databases (a file each, with SQLite), so a crash between a write to
// the one and to the other must heal by itself: the sweep queues stored builds
// that the queue lacks, and fails builds whose job is over.
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
	"github.com/prebake/prebake/pkg/queue"
)

// catalogue is what the sweep asks of the use-cases.
type catalogue interface {
	OpenBuilds(ctx context.Context) ([]api.Build, error)
	Enqueue(ctx context.Context, b api.Build) error
	Abandon(ctx context.Context, id int64, why string) error
}

// looker tells where a build's job is.
type looker interface {
	Lookup(ctx context.Context, build int64) (queue.Standing, error)
}

// Sweeper compares open builds with the queue.
type Sweeper struct {
	Catalogue catalogue
	Queue     looker
	// Every is the pause between sweeps; 0 is 15 seconds.
	Every time.Duration
	Log   *slog.Logger
}

// Run sweeps until ctx is done. Trouble is logged and tried again.
func (s *Sweeper) Run(ctx context.Context) error {
	every := s.Every
	if every <= 0 {
		every = 15 * time.Second
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.Log.WarnContext(ctx, "sweep failed", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Sweep looks at every open build once. Trouble with one does not keep it from
// the others.
func (s *Sweeper) Sweep(ctx context.Context) error {
	open, err := s.Catalogue.OpenBuilds(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range open {
		if err := s.sweep(ctx, b); err != nil {
			errs = append(errs, fmt.Errorf("build %d: %w", b.ID, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Sweeper) sweep(ctx context.Context, b api.Build) error {
	at, err := s.Queue.Lookup(ctx, b.ID)
	switch {
	case err != nil:
		return err
	case !at.Found && b.State == api.Queued:
		s.Log.InfoContext(ctx, "build queued again", "build", b.ID)
		return s.Catalogue.Enqueue(ctx, b)
	case !at.Found:
		return s.Catalogue.Abandon(ctx, b.ID, "the queue lost the build's job")
	case at.Over:
		why := at.Error
		if why == "" {
			why = "the worker reported no outcome"
		}
		s.Log.WarnContext(ctx, "build abandoned", "build", b.ID, "err", why)
		return s.Catalogue.Abandon(ctx, b.ID, fmt.Sprintf("the job ended as %s after %d attempts: %s", at.State, at.Attempt, why))
	}
	return nil
}
