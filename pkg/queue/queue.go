// Package queue is the build queue that server and builder share. It opens and migrates the database, inserts builds,
// and passes them to workers. It uses River over SQLite (one machine) or PostgreSQL (many machines).
//
// The package knows nothing about a build except [api.BuildJob]. The fetcher must never import it, because a node needs
// no database driver.
package queue

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/gofrs/flock"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/riverdriver/riversqlite"
	"github.com/riverqueue/river/rivermigrate"
	"github.com/riverqueue/river/rivertype"
	_ "modernc.org/sqlite" // registers the database/sql driver "sqlite"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// MaxAttempts is the maximum number of attempts of a build, even if the fault is retryable.
const MaxAttempts = 5

// JobTimeout is the time limit for one attempt of a build. If an attempt has run for RescueAfter, the queue makes the
// job available to other workers. RescueAfter must be longer than JobTimeout: otherwise a second worker would get a
// running build.
const (
	JobTimeout  = time.Hour
	RescueAfter = JobTimeout + 15*time.Minute
)

// grace is how long running builds may continue after Work was told to stop. A build can finish publishing in that
// time. A process manager such as Kubernetes does not kill the process so early.
const grace = 5 * time.Second

// Queue is an open queue. The caller closes it.
type Queue struct {
	sqlite *sql.DB // exactly one of sqlite and pg is set
	path   string  // path of the SQLite file
	pg     *pgxpool.Pool
	exec   riverdriver.Executor
	insert client
	log    *slog.Logger
	grace  time.Duration // set by SetGrace; 0 means the constant grace
}

// client has the methods of River's generic client that are the same for SQLite and PostgreSQL.
type client interface {
	Insert(ctx context.Context, args river.JobArgs, opts *river.InsertOpts) (*rivertype.JobInsertResult, error)
	JobCancel(ctx context.Context, id int64) (*rivertype.JobRow, error)
	Start(ctx context.Context) error
	Stopped() <-chan struct{}
}

// Open opens sqlite:///abs/path or postgres://… and updates River's tables. Several processes of one machine may share
// a SQLite file.
func Open(ctx context.Context, rawURL string) (*Queue, error) {
	q := &Queue{log: slog.New(slog.DiscardHandler)}
	var err error
	if path, ok := strings.CutPrefix(rawURL, "sqlite://"); ok {
		err = q.openSQLite(path)
	} else if strings.HasPrefix(rawURL, "postgres://") || strings.HasPrefix(rawURL, "postgresql://") {
		err = q.openPostgres(ctx, rawURL)
	} else {
		return nil, fault.New(fault.Usage, "open queue: the URL is neither sqlite:///PATH nor postgres://…",
			"use sqlite:///abs/path/queue.db, or postgres://user@host/database")
	}
	if err != nil {
		return nil, fmt.Errorf("open queue: %w", err)
	}
	if err := q.migrate(ctx); err != nil {
		return nil, errors.Join(fault.Wrap(fault.Transient, fmt.Errorf("migrate queue: %w", err),
			"check that the queue's database is reachable and writable"), q.Close())
	}
	if q.insert, err = q.client(&river.Config{MaxAttempts: MaxAttempts, Logger: q.log}); err != nil {
		return nil, errors.Join(fmt.Errorf("open queue: %w", err), q.Close())
	}
	return q, nil
}

// SetLogger sets the logger for River's own messages, which are dropped by default.
func (q *Queue) SetLogger(log *slog.Logger) { q.log = log }

// SetGrace sets how long running builds may continue after Work was told to stop. The default is five seconds.
func (q *Queue) SetGrace(d time.Duration) { q.grace = d }

func (q *Queue) openSQLite(path string) error {
	if !filepath.IsAbs(path) {
		return fault.New(fault.Usage, fmt.Sprintf("the path %q of the SQLite file is not absolute", path),
			"write sqlite:///abs/path/queue.db")
	}
	// Server and builder share the file, and SQLite allows one writer at a time. An immediate transaction waits for its
	// turn. A deferred transaction that begins to write later fails at once.
	dsn := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{
		"_pragma": {"busy_timeout(10000)", "journal_mode(WAL)", "synchronous(NORMAL)", "foreign_keys(1)"},
		"_txlock": {"immediate"},
	}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return err
	}
	db.SetMaxOpenConns(1)
	q.path, q.sqlite, q.exec = path, db, riversqlite.New(db).GetExecutor()
	return nil
}

func (q *Queue) openPostgres(ctx context.Context, rawURL string) error {
	config, err := pgxpool.ParseConfig(rawURL) // the error does not contain the password
	if err != nil {
		return fault.Wrap(fault.Usage, err, "use postgres://user@host/database")
	}
	// A migration needs two connections: one holds the lock, and the other one does the work.
	config.MaxConns = max(config.MaxConns, 4)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return err
	}
	q.pg, q.exec = pool, riverpgxv5.New(pool).GetExecutor()
	return nil
}

// migrationLock is the key of PostgreSQL's advisory lock around migrations, an arbitrary number. River's migrations
// take no lock. With SQLite, a lock file beside the database has the same purpose.
const migrationLock = 0x70726562616b65

// migrate runs River's migrations. Only one process runs them at a time.
func (q *Queue) migrate(ctx context.Context) (err error) {
	if q.sqlite != nil {
		lock := flock.New(q.path + ".lock")
		if _, err := lock.TryLockContext(ctx, 50*time.Millisecond); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, lock.Close()) }()
		m, err := rivermigrate.New(riversqlite.New(q.sqlite), &rivermigrate.Config{Logger: q.log})
		if err != nil {
			return err
		}
		_, err = m.Migrate(ctx, rivermigrate.DirectionUp, nil)
		return err
	}
	conn, err := q.pg.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	if _, err := conn.Exec(ctx, "SELECT pg_advisory_lock($1)", int64(migrationLock)); err != nil {
		return err
	}
	defer func() {
		_, uerr := conn.Exec(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", int64(migrationLock))
		err = errors.Join(err, uerr)
	}()
	m, err := rivermigrate.New(riverpgxv5.New(q.pg), &rivermigrate.Config{Logger: q.log})
	if err != nil {
		return err
	}
	_, err = m.Migrate(ctx, rivermigrate.DirectionUp, nil)
	return err
}

func (q *Queue) client(config *river.Config) (client, error) {
	if q.sqlite != nil {
		c, err := river.NewClient[*sql.Tx](riversqlite.New(q.sqlite), config)
		return c, err
	}
	c, err := river.NewClient[pgx.Tx](riverpgxv5.New(q.pg), config)
	return c, err
}

// Close closes the database.
func (q *Queue) Close() error {
	if q.pg != nil {
		q.pg.Close()
		return nil
	}
	return q.sqlite.Close()
}

// Ping returns an error if the database does not respond.
func (q *Queue) Ping(ctx context.Context) error {
	if err := q.exec.Ping(ctx); err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("reach the queue's database: %w", err), "")
	}
	return nil
}

// Priorities of builds. River starts jobs with lower numbers first, and allows the numbers 1 to 4.
const (
	PriorityAsked   = 1 // a node or a person waits for the build
	PriorityWanted  = 2 // a wish list wants the build; builds for newer kernels are inserted first
	PriorityWarning = 4 // the build is for a milestone that is not released yet
	PriorityAgain   = 4 // a wish list wants the build, and the former build of the cell failed
)

// Insert adds a build to the queue. Priority 0 means PriorityAsked. A second Insert of the same build changes nothing.
func (q *Queue) Insert(ctx context.Context, job api.BuildJob, priority int) error {
	return q.outsideTx().insertBuild(ctx, job, priority)
}

func (db database) insertBuild(ctx context.Context, job api.BuildJob, priority int) error {
	_, err := db.insert(ctx, job, &river.InsertOpts{
		MaxAttempts: MaxAttempts,
		Priority:    priority,
		Queue:       api.BuildQueue,
		UniqueOpts:  river.UniqueOpts{ByArgs: true},
	})
	if err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("insert build %d into the queue: %w", job.Build, err), "")
	}
	return nil
}

// Depth returns the number of the queue's jobs in each River state.
func (q *Queue) Depth(ctx context.Context) (map[string]int, error) {
	counts, err := q.exec.JobCountByAllStates(ctx, &riverdriver.JobCountByAllStatesParams{})
	if err != nil {
		return nil, fault.Wrap(fault.Transient, fmt.Errorf("count the jobs: %w", err), "")
	}
	depth := make(map[string]int, len(counts))
	for state, n := range counts {
		depth[string(state)] = n
	}
	return depth, nil
}

// JobState is the state of a build's job.
type JobState struct {
	// Found is true if the queue has a job for the build. If it is false, all other fields are zero.
	Found bool
	// Ended is true if no worker will work on the job again.
	Ended bool
	// State is River's name of the state.
	State string
	// Attempt is the number of attempts so far.
	Attempt int
	// Priority is the current priority, which may have been raised after the insertion.
	Priority int
	// Error is the newest error; "" means none.
	Error string
}

// Lookup returns the state of a build's job.
func (q *Queue) Lookup(ctx context.Context, build int64) (JobState, error) {
	row, err := q.outsideTx().find(ctx, build)
	if err != nil || row == nil {
		return JobState{}, err
	}
	return jobState(row), nil
}

func jobState(row *rivertype.JobRow) JobState {
	s := JobState{Found: true, Ended: row.FinalizedAt != nil, State: string(row.State), Attempt: row.Attempt,
		Priority: row.Priority}
	if n := len(row.Errors); n > 0 {
		s.Error = row.Errors[n-1].Error
	}
	return s
}

// find returns the newest job of a build; nil means that there is none.
func (db database) find(ctx context.Context, build int64) (*rivertype.JobRow, error) {
	where := `kind = @kind AND json_extract(args, '$.build') = @build`
	if db.pg {
		where = `kind = @kind AND (args->>'build')::bigint = @build`
	}
	rows, err := db.exec.JobList(ctx, &riverdriver.JobListParams{
		Max: 1, WhereClause: where, OrderByClause: "id DESC",
		NamedArgs: map[string]any{"kind": api.BuildJob{}.Kind(), "build": build},
	})
	if err != nil {
		return nil, fault.Wrap(fault.Transient, fmt.Errorf("look up the job of build %d: %w", build, err), "")
	}
	if len(rows) == 0 {
		return nil, nil
	}
	return rows[0], nil
}

// Newest returns the highest number of a build for which the queue has a job, open or ended. 0 means that it has none.
func (q *Queue) Newest(ctx context.Context) (int64, error) {
	order := `json_extract(args, '$.build') DESC`
	if q.pg != nil {
		order = `(args->>'build')::bigint DESC`
	}
	rows, err := q.exec.JobList(ctx, &riverdriver.JobListParams{
		Max: 1, WhereClause: "kind = @kind", OrderByClause: order, NamedArgs: map[string]any{"kind": api.BuildJob{}.Kind()},
	})
	if err != nil {
		return 0, fault.Wrap(fault.Transient, fmt.Errorf("find the newest build of the queue: %w", err), "")
	}
	if len(rows) == 0 {
		return 0, nil
	}
	var job api.BuildJob
	if err := json.Unmarshal(rows[0].EncodedArgs, &job); err != nil {
		return 0, fmt.Errorf("read job %d: %w", rows[0].ID, err)
	}
	return job.Build, nil
}

// jobsPerQuery is the largest number of jobs that one query returns.
const jobsPerQuery = 5000

// Open returns the states of all jobs that have not ended, by build number. It reads them with several queries, each
// for at most jobsPerQuery jobs.
func (q *Queue) Open(ctx context.Context) (map[int64]JobState, error) {
	all := map[int64]JobState{}
	for last := int64(0); ; {
		rows, err := q.exec.JobList(ctx, &riverdriver.JobListParams{
			Max: jobsPerQuery, OrderByClause: "id ASC",
			WhereClause: "kind = @kind AND state NOT IN ('completed', 'cancelled', 'discarded') AND id > @last",
			NamedArgs:   map[string]any{"kind": api.BuildJob{}.Kind(), "last": last},
		})
		if err != nil {
			return nil, fault.Wrap(fault.Transient, fmt.Errorf("list the open jobs: %w", err), "")
		}
		for _, row := range rows {
			var job api.BuildJob
			if err := json.Unmarshal(row.EncodedArgs, &job); err != nil {
				return nil, fmt.Errorf("read job %d: %w", row.ID, err)
			}
			all[job.Build], last = jobState(row), row.ID
		}
		if len(rows) < jobsPerQuery {
			return all, nil
		}
	}
}

// Cancel cancels a build's job. It does not interrupt a running worker: the server tells the worker in the response to
// the worker's next report. The job ends as cancelled, even if the worker reports another result. If the build has no
// job, or its job has ended, Cancel changes nothing and returns nil.
func (q *Queue) Cancel(ctx context.Context, build int64) error {
	return q.outsideTx().cancel(ctx, build)
}

func (db database) cancel(ctx context.Context, build int64) error {
	row, err := db.find(ctx, build)
	if err != nil || row == nil || row.FinalizedAt != nil {
		return err
	}
	if _, err := db.remove(ctx, row.ID); err != nil && !errors.Is(err, rivertype.ErrNotFound) {
		return fault.Wrap(fault.Transient, fmt.Errorf("cancel the job of build %d: %w", build, err), "")
	}
	return nil
}

// SetPriority raises, and never lowers, the priority of a build's waiting job. It writes to River's table, because
// River has no function for that.
func (q *Queue) SetPriority(ctx context.Context, build int64, priority int) error {
	return q.outsideTx().raise(ctx, build, priority)
}

func (db database) raise(ctx context.Context, build int64, priority int) error {
	row, err := db.find(ctx, build)
	if err != nil || row == nil {
		return err
	}
	text := `UPDATE river_job SET priority = $2 WHERE id = $1 AND state IN ('available', 'scheduled', 'retryable') AND priority > $2`
	if err := db.exec.Exec(ctx, text, row.ID, priority); err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("raise the priority of build %d: %w", build, err), "")
	}
	return nil
}
