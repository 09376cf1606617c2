package queue

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/riverqueue/river"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Work takes builds and calls do for each, at most concurrency at a time, until
// ctx is done. Then it takes no more, gives running builds a short grace,
// cancels them, and returns nil once they have ended.
//
// id names the worker and must be used by one process at a time; the caller
// makes sure of that, with a lock file for example. Jobs that a killed process
// of the same id left behind are made available again at once.
//
// do's error decides: [Requeue] hands the job back; one that is not retryable,
// or Cancelled, ends it; others are tried again with growing pauses, in all
// MaxAttempts times.
func (q *Queue) Work(
	ctx context.Context,
	id string,
	concurrency int,
	do func(ctx context.Context, job api.BuildJob, attempt int) error,
) error {
	if err := q.adopt(ctx, id); err != nil {
		return err
	}
	soft := grace
	if q.grace > 0 {
		soft = q.grace
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, river.WorkFunc(func(jobCtx context.Context, job *river.Job[api.BuildJob]) error {
		return riverError(ctx, do(jobCtx, job.Args, job.Attempt))
	}))
	c, err := q.client(&river.Config{
		ID:                   id,
		Logger:               q.log,
		MaxAttempts:          MaxAttempts,
		JobTimeout:           JobTimeout,
		RescueStuckJobsAfter: RescueAfter,
		SoftStopTimeout:      soft,
		// SQLite has no notification of its own, so polling is the pace there.
		FetchPollInterval: 500 * time.Millisecond,
		PollOnly:          q.sqlite != nil,
		Queues:            map[string]river.QueueConfig{api.BuildQueue: {MaxWorkers: max(concurrency, 1)}},
		Workers:           workers,
	})
	if err != nil {
		return fmt.Errorf("work queue: %w", err)
	}
	if err := c.Start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fault.Wrap(fault.Transient, fmt.Errorf("work queue: %w", err), "check that the queue's database is reachable")
	}
	<-c.Stopped()
	return nil
}

// handBackPause is how long a job rests that a worker gave back of its own.
const handBackPause = 15 * time.Second

// requeueError is the error of [Requeue].
type requeueError struct{ error }

func (h requeueError) Unwrap() error { return h.error }

// Requeue says that a build is not to blame for how its attempt ended, such as
// when the worker was stopped or its server is away: the job comes back,
// at once after a stop and else after a short pause, and the attempt does not
// count.
func Requeue(err error) error { return requeueError{err} }

// riverError maps the outcome of a build to River's words. It examines the error
// alone, so that what do reported elsewhere is what the queue does.
func riverError(ctx context.Context, err error) error {
	var back requeueError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &back) && ctx.Err() != nil:
		return river.JobSnooze(0)
	case errors.As(err, &back):
		return river.JobSnooze(handBackPause)
	case fault.Is(err, fault.Cancelled) || !fault.Of(err).Retryable():
		return river.JobCancel(err)
	}
	return err
}
