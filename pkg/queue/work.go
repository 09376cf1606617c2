package queue

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/riverqueue/river"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Work passes builds from the queue to the callback until ctx ends. At most concurrency callbacks run at a time. After
// the end of ctx, Work starts no more builds, waits a grace period for the running builds ([Queue.SetGrace]), and
// cancels the rest. Work returns nil when all builds have ended.
//
// id is the name of the worker. The caller ensures that only one process uses it at a time, for example with a lock
// file. Jobs of a killed process with the same id become available again at once.
//
// The callback's error decides what happens to the job:
//   - An error of [Requeue] puts the job back into the queue.
//   - An error that is not retryable, or of kind Cancelled, ends the job.
//   - After any other error the job is tried again, with growing pauses, up to MaxAttempts attempts.
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
		FetchPollInterval:    pollInterval,
		PollOnly:             q.sqlite != nil,
		Queues:               map[string]river.QueueConfig{api.BuildQueue: {MaxWorkers: max(concurrency, 1)}},
		Workers:              workers,
	})
	if err != nil {
		return fmt.Errorf("take builds from the queue: %w", err)
	}
	if q.pg != nil {
		checking, stop := context.WithCancel(ctx)
		var check sync.WaitGroup
		check.Go(func() { q.checkNotifications(checking) })
		defer check.Wait()
		defer stop()
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

// pollInterval is the pause between two queries for new jobs. SQLite has no notifications, so this pause decides how
// soon a job starts.
const pollInterval = 500 * time.Millisecond

// handBackPause is the pause before the next attempt of a job that a running worker put back into the queue.
const handBackPause = 15 * time.Second

// requeueError is the error that [Requeue] returns.
type requeueError struct{ error }

func (h requeueError) Unwrap() error { return h.error }

// Requeue marks an error that the build did not cause, such as a stopped worker or a silent server. The queue offers
// the job again: at once if the worker is stopping, else after a short pause. The attempt does not count.
func Requeue(err error) error { return requeueError{err} }

// riverError converts the error of a build to an error for River. Only the given error decides whether the job ends,
// because the callback may have reported the error to others. ctx decides only about the pause.
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
