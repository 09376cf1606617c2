package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/riverqueue/river/riverdriver"
	"github.com/riverqueue/river/rivertype"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Release makes the running jobs of these builds available to other workers. Call it if the present workers seem to be
// dead. It ends each job and inserts a successor, which continues with the next attempt. A worker that is alive after
// all can then end only the first job.
func (q *Queue) Release(ctx context.Context, builds ...int64) error {
	var rows []*rivertype.JobRow
	for _, build := range builds {
		row, err := q.outsideTx().find(ctx, build)
		if err != nil {
			return err
		}
		if row != nil && row.State == rivertype.JobStateRunning {
			rows = append(rows, row)
		}
	}
	if len(rows) == 0 {
		return nil
	}
	if err := q.replaceJobs(ctx, rows); err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("release the jobs of workers that are gone: %w", err), "")
	}
	return nil
}

// End ends the job of a build that has ended, even if its worker is dead. If the build has no job, or its job has
// ended, End changes nothing and returns nil.
func (q *Queue) End(ctx context.Context, build int64) error {
	row, err := q.outsideTx().find(ctx, build)
	if err != nil {
		return err
	}
	if row == nil || row.State != rivertype.JobStateRunning {
		return q.Cancel(ctx, build)
	}
	if err := rescue(ctx, q.exec, []*rivertype.JobRow{row}, rivertype.JobStateDiscarded); err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("end the job of build %d: %w", build, err), "")
	}
	return nil
}

// Remove removes the waiting jobs of these builds, and returns how many it removed. It keeps no record of them, so a
// build can be inserted again. It changes no running and no ended job.
func (q *Queue) Remove(ctx context.Context, builds ...int64) (removed int, err error) {
	for part := range slices.Chunk(builds, jobsPerQuery) {
		where, list := `(args->>'build')::bigint = ANY(@builds)`, any(part)
		if q.pg == nil {
			text, err := json.Marshal(part)
			if err != nil {
				return removed, fmt.Errorf("remove jobs: %w", err)
			}
			where, list = `json_extract(args, '$.build') IN (SELECT value FROM json_each(@builds))`, string(text)
		}
		rows, err := q.exec.JobDeleteMany(ctx, &riverdriver.JobDeleteManyParams{
			Max: jobsPerQuery, OrderByClause: "id",
			WhereClause: "kind = @kind AND state IN ('available', 'pending', 'retryable', 'scheduled') AND " + where,
			NamedArgs:   map[string]any{"kind": api.BuildJob{}.Kind(), "builds": list},
		})
		if err != nil {
			return removed, fault.Wrap(fault.Transient, fmt.Errorf("remove %d jobs: %w", len(part), err), "")
		}
		removed += len(rows)
	}
	return removed, nil
}

// replaceJobs ends jobs and inserts their successors, in one transaction.
func (q *Queue) replaceJobs(ctx context.Context, rows []*rivertype.JobRow) (err error) {
	tx, err := q.exec.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil { // after a failed commit there is nothing to roll back
			_ = tx.Rollback(context.WithoutCancel(ctx))
		}
	}()
	if err := rescue(ctx, tx, rows, rivertype.JobStateDiscarded); err != nil {
		return err
	}
	for _, row := range rows {
		if row.Attempt >= row.MaxAttempts {
			continue
		}
		if err := tx.Exec(ctx, successor, row.ID, row.Attempt); err != nil {
			return fmt.Errorf("insert a new job in place of job %d: %w", row.ID, err)
		}
	}
	return tx.Commit(ctx)
}

// successor inserts a waiting copy of an ended job, with its former attempts. River has no function for that. The
// statement leaves out a job that ended by itself meanwhile, or that another server has copied.
const successor = `INSERT INTO river_job (args, attempt, attempted_at, attempted_by, errors, kind, max_attempts, metadata,
	priority, queue, scheduled_at, state, tags, unique_key, unique_states)
SELECT args, attempt, attempted_at, attempted_by, errors, kind, max_attempts, metadata,
	priority, queue, scheduled_at, 'available', tags, unique_key, unique_states
FROM river_job WHERE id = $1 AND state = 'discarded' AND attempt = $2 AND attempt < max_attempts
ON CONFLICT DO NOTHING`

// If the database shows jobs as running under this worker's id, adopt makes them available again. No process runs them,
// because this process has just started. A job in its last attempt is discarded.
func (q *Queue) adopt(ctx context.Context, id string) error {
	rows, err := q.exec.JobList(ctx, &riverdriver.JobListParams{
		Max: 10000, OrderByClause: "id ASC",
		WhereClause: "queue = @queue AND state = 'running'",
		NamedArgs:   map[string]any{"queue": api.BuildQueue},
	})
	if err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("find jobs that worker %s left behind: %w", id, err), "")
	}
	var again, last []*rivertype.JobRow
	for _, row := range rows {
		switch n := len(row.AttemptedBy); {
		case n == 0 || row.AttemptedBy[n-1] != id:
		case row.Attempt >= row.MaxAttempts: // a build that kills its worker in every attempt must end
			last = append(last, row)
		default:
			again = append(again, row)
		}
	}
	err = errors.Join(
		rescue(ctx, q.exec, again, rivertype.JobStateAvailable),
		rescue(ctx, q.exec, last, rivertype.JobStateDiscarded),
	)
	if err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("make the jobs that worker %s left behind available again: %w", id,
			err), "")
	}
	return nil
}

// rescue ends the current attempts of running jobs, and sets the jobs to another state.
func rescue(ctx context.Context, exec riverdriver.Executor, rows []*rivertype.JobRow, state rivertype.JobState) error {
	if len(rows) == 0 {
		return nil
	}
	now := time.Now().UTC()
	params := &riverdriver.JobRescueManyParams{StuckHorizon: now.Add(time.Minute)}
	for _, row := range rows {
		text, err := json.Marshal(rivertype.AttemptError{At: now, Attempt: row.Attempt,
			Error: "the worker ended during the build"})
		if err != nil {
			return fmt.Errorf("record the lost attempt of job %d: %w", row.ID, err)
		}
		var finalized *time.Time
		if state == rivertype.JobStateDiscarded {
			finalized = &now
		}
		params.ID = append(params.ID, row.ID)
		params.Error = append(params.Error, text)
		params.FinalizedAt = append(params.FinalizedAt, finalized)
		// The job keeps its place in the queue. If ScheduledAt were the current time, the job would come after all
		// others.
		params.ScheduledAt = append(params.ScheduledAt, row.ScheduledAt)
		params.State = append(params.State, string(state))
	}
	_, err := exec.JobRescueMany(ctx, params)
	return err
}
