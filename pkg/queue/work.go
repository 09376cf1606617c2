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

// Work takes builds from the queue and calls the function do for each build, until ctx ends. At most concurrency calls
// run at a time. When ctx has ended, Work takes no more builds, waits a grace period for the running builds (see
// [Queue.SetGrace]), and cancels those that still run. It returns nil after all of them have ended.
//
// id is the name of the worker. The caller ensures that only one process uses the name at a time, for example with a
// lock file. If a killed process with the same id left jobs behind, they become available again at once.
//
// The error of the function do decides what happens to the job. An error from [Requeue] gives the job back to the
// queue. An error that is not retryable, or of kind Cancelled, ends the job. After any other error the job is tried
// again, with growing pauses, until it has had MaxAttempts attempts.
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
		// SQLite has no notifications, so the poll interval decides how soon a job starts.
		FetchPollInterval: 500 * time.Millisecond,
		PollOnly:          q.sqlite != nil,
		Queues:            map[string]river.QueueConfig{api.BuildQueue: {MaxWorkers: max(concurrency, 1)}},
		Workers:           workers,
	})
	if err != nil {
		return fmt.Errorf("take builds from the queue: %w", err)
	}
	if err := c.Start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fault.Wrap(fault.Transient, fmt.Errorf("take builds from the queue: %w", err),
			"check that the database of --queue is reachable")
	}
	<-c.Stopped()
	return nil
}

// handBackPause is the pause before the next attempt of a job that a worker gave back while the worker was not
// stopping.
const handBackPause = 15 * time.Second

// requeueError is the error that [Requeue] returns.
type requeueError struct{ error }

func (h requeueError) Unwrap() error { return h.error }

// Requeue marks an error that the build did not cause, such as a stopped worker or a server that does not answer. The
// queue offers the job again: at once if the worker is stopping, else after a short pause. The attempt does not count.
func Requeue(err error) error { return requeueError{err} }

// riverError converts the error of a build to the error that River expects. Whether the job ends depends only on the
// error and not on ctx. The function do may report the error to others, and they must come to the same result as the
// queue. ctx decides only about the pause.
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
