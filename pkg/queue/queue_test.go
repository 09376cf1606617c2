package queue_test

import (
	"context"
	"crypto/rand"
	"errors"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// eachDatabase runs a test with SQLite and with PostgreSQL. The test can open several queues in the same database.
func eachDatabase(t *testing.T, f func(t *testing.T, open func(t *testing.T) *queue.Queue)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		f(t, opener("sqlite://"+filepath.Join(t.TempDir(), "queue.db")))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		f(t, opener(freshSchema(t)))
	})
}

// freshSchema makes an empty schema in the PostgreSQL database for tests, and returns a URL of the schema.
func freshSchema(t *testing.T) string {
	t.Helper()
	raw := installed.Postgres(t)
	conn, err := pgx.Connect(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	schema := "queue_" + strings.ToLower(rand.Text())
	exec := func(statement string) {
		if _, err := conn.Exec(context.WithoutCancel(t.Context()), statement); err != nil {
			t.Error(err)
		}
	}
	exec("CREATE SCHEMA " + schema)
	t.Cleanup(func() {
		exec("DROP SCHEMA " + schema + " CASCADE")
		if err := conn.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("search_path", schema)
	u.RawQuery = query.Encode()
	return u.String()
}

func opener(rawURL string) func(t *testing.T) *queue.Queue {
	return func(t *testing.T) *queue.Queue {
		t.Helper()
		q, err := queue.Open(t.Context(), rawURL)
		if err != nil {
			t.Error(err)
			runtime.Goexit()
		}
		t.Cleanup(func() {
			if err := q.Close(); err != nil {
				t.Errorf("Close() = %v", err)
			}
		})
		return q
	}
}

func job(build int64) api.BuildJob {
	return api.BuildJob{Build: build, BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open"}
}

func TestWorkVerdicts(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		q := open(t)
		for n := range int64(6) {
			for range 2 { // the second insert must not make a second job
				if err := q.Insert(t.Context(), job(n), 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		results := map[int64]error{
			0: nil,
			1: fault.New(fault.APIBreak, "nv-pci.c:1: error", ""),
			2: fault.New(fault.Transient, "mirror is away", ""),
			3: errors.New("nobody knows"),
			4: queue.Requeue(errors.New("the server is away")),
			5: fault.New(fault.Cancelled, "somebody called it off", ""),
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var seen atomic.Int64
		err := q.Work(ctx, "w1", 2, func(_ context.Context, j api.BuildJob, attempt int) error {
			if attempt == 1 && seen.Add(1) == 6 {
				stop()
			}
			if j.Build == 2 { // the second attempt of build 2 must come after the first attempts of all other builds
				<-ctx.Done()
			}
			return results[j.Build]
		})
		if err != nil {
			t.Fatalf("Work() = %v", err)
		}
		if n := seen.Load(); n != 6 {
			t.Errorf("%d first attempts; want 6", n)
		}
		for n, want := range []queue.JobState{
			{Found: true, Ended: true, State: "completed", Attempt: 1},
			{Found: true, Ended: true, State: "cancelled", Attempt: 1},
			{Found: true, State: "retryable", Attempt: 1},
			{Found: true, Ended: true, State: "cancelled", Attempt: 1},
			{Found: true, State: "scheduled", Attempt: 0},
			{Found: true, Ended: true, State: "cancelled", Attempt: 1},
		} {
			got, err := q.Lookup(t.Context(), int64(n))
			if err != nil {
				t.Fatal(err)
			}
			if n == 2 && got.State == "available" { // River makes a job available at once if its pause is short
				got.State = "retryable"
			}
			if n == 4 && got.State == "available" { // the worker may have been stopping already
				got.State = "scheduled"
			}
			got.Error, want.Priority = "", queue.PriorityAsked
			if got != want {
				t.Errorf("Lookup(%d) = %+v; want %+v", n, got, want)
			}
		}
		if got, err := q.Lookup(t.Context(), 99); err != nil || got.Found {
			t.Errorf("Lookup(absent) = %+v, %v; want nothing", got, err)
		}
	})
}

// TestStopHandsBack checks that a stopped worker gives its running build back to the queue. The next worker must get
// the build with the same attempt number.
func TestStopHandsBack(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		q := open(t)
		if err := q.Insert(t.Context(), job(1), 0); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		err := q.Work(ctx, "w1", 1, func(jobCtx context.Context, _ api.BuildJob, _ int) error {
			stop()
			<-jobCtx.Done()
			return queue.Requeue(jobCtx.Err())
		})
		if err != nil {
			t.Fatal(err)
		}
		expectBuild(t, q, 1, 1)
	})
}

// hang starts a worker that takes a build and hangs in it. After wake, the build ends with the given result, and the
// worker takes no other build.
func hang(t *testing.T, q *queue.Queue, id string, result error) (wake func()) {
	t.Helper()
	started, gone, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		done <- q.Work(ctx, id, 1, func(context.Context, api.BuildJob, int) error {
			close(started)
			<-gone
			return result
		})
	}()
	<-started
	return func() {
		t.Helper()
		stop()
		close(gone)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestKilledWorker checks the job that was running in a killed worker. The next worker with the same id must get the
// job again, as a second attempt.
func TestKilledWorker(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		// The first worker hangs in the build and is never told to stop, as if it had been killed.
		dead := open(t)
		if err := dead.Insert(t.Context(), job(1), 0); err != nil {
			t.Fatal(err)
		}
		wake := hang(t, dead, "w1", nil)
		q := open(t)
		if s, err := q.Lookup(t.Context(), 1); err != nil || s.State != "running" {
			t.Fatalf("Lookup() = %+v, %v; want running", s, err)
		}
		expectBuild(t, q, 1, 2)
		if s, err := q.Lookup(t.Context(), 1); err != nil || s.State != "completed" {
			t.Errorf("Lookup() = %+v, %v; want completed", s, err)
		}
		wake()
	})
}

// expectBuild runs a worker named w1 until it gets the given build. The attempt must have the given number.
func expectBuild(t *testing.T, q *queue.Queue, build int64, attempt int) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var got atomic.Int64
	err := q.Work(ctx, "w1", 1, func(_ context.Context, j api.BuildJob, attempt int) error {
		if j.Build == build {
			got.Store(int64(attempt))
			stop()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got.Load() != int64(attempt) {
		t.Errorf("worked in attempt %d; want %d", got.Load(), attempt)
	}
}

// TestOpenTogether checks that a server and several builders can open a new queue at the same moment.
func TestOpenTogether(t *testing.T) {
	t.Parallel()
	eachDatabase(t, func(t *testing.T, open func(*testing.T) *queue.Queue) {
		var wait sync.WaitGroup
		for n := range int64(4) {
			wait.Go(func() {
				if err := open(t).Insert(t.Context(), job(n), 0); err != nil {
					t.Error(err)
				}
			})
		}
		wait.Wait()
	})
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"", "queue.db", "sqlite://relative.db", "mysql://x/y"} {
		if q, err := queue.Open(t.Context(), bad); !fault.Is(err, fault.Usage) {
			t.Errorf("Open(%q) = %v, %v; want a usage error", bad, q, err)
		}
	}
}

func TestDepth(t *testing.T) {
	t.Parallel()
	q := opener("sqlite://" + filepath.Join(t.TempDir(), "queue.db"))(t)
	if err := q.Insert(t.Context(), job(1), 0); err != nil {
		t.Fatal(err)
	}
	depth, err := q.Depth(t.Context())
	if err != nil || depth["available"] != 1 || depth["running"] != 0 {
		t.Errorf("Depth() = %v, %v; want one available", depth, err)
	}
	if err := q.Ping(t.Context()); err != nil {
		t.Errorf("Ping() = %v", err)
	}
}
