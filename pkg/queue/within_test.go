package queue_test

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
)

// TestWithin checks writes to the queue inside a transaction of the caller. They must take effect if the transaction
// commits, and not if it is rolled back.
func TestWithin(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		within(t, "sqlite", "sqlite://"+filepath.Join(t.TempDir(), "both.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		within(t, "pgx", freshSchema(t))
	})
}

func within(t *testing.T, driver, rawURL string) {
	q := opener(rawURL)(t)
	file := strings.TrimPrefix(rawURL, "sqlite://")
	if driver == "sqlite" {
		file = "file:" + file + "?_txlock=immediate&_pragma=busy_timeout(10000)"
	}
	db, err := sql.Open(driver, file)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	step := func(what string, commit bool, do func(queue.Within) error) {
		t.Helper()
		tx, err := conn.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := do(q.Within(conn, tx)); err != nil {
			t.Errorf("%s = %v", what, err)
		}
		end := tx.Rollback
		if commit {
			end = tx.Commit
		}
		if err := end(); err != nil {
			t.Errorf("%s, and the transaction's end = %v", what, err)
		}
	}
	stands := func(after string, build int64, want string) {
		t.Helper()
		got, err := q.Lookup(t.Context(), build)
		if err != nil || got.State != want {
			t.Errorf("after %s, Lookup(%d) = %+v, %v; want state %q", after, build, got, err, want)
		}
	}
	put := func(build int64) func(queue.Within) error {
		return func(w queue.Within) error { return w.Insert(t.Context(), job(build), queue.PriorityWarning) }
	}
	out := func(w queue.Within) error { return w.Cancel(t.Context(), 1) }
	up := func(w queue.Within) error { return w.SetPriority(t.Context(), 2, queue.PriorityAsked) }
	step("Insert(1)", false, put(1))
	stands("a rollback", 1, "")
	for build := int64(1); build <= 3; build++ {
		step("Insert", true, put(build))
	}
	step("Insert(1) again", true, put(1))
	stands("a commit", 1, "available")
	step("Cancel(1)", false, out)
	stands("a rollback", 1, "available")
	step("Cancel(1)", true, out)
	stands("a commit", 1, "cancelled")
	if driver == "pgx" { // SQLite itself refuses a write outside its transaction
		err := q.Within(conn, nil).Insert(t.Context(), job(5), queue.PriorityAsked)
		if !fault.Is(err, fault.Internal) {
			t.Errorf("Insert(5) without a transaction = %v; want %v", err, fault.Internal)
		}
		stands("that", 5, "")
	}
	step("SetPriority(3)", false, func(w queue.Within) error { return w.SetPriority(t.Context(), 3, queue.PriorityAsked) })
	step("SetPriority(2)", true, up)

	// A worker gets the waiting builds by priority. Build 2 comes first, because its raised priority was committed. The
	// raised priority of build 3 was rolled back. After that, the worker gets each new build.
	begun := make(chan int64, 9)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- q.Work(ctx, "w", 1, func(_ context.Context, j api.BuildJob, _ int) error {
			begun <- j.Build
			return nil
		})
	}()
	next := func(want int64) {
		t.Helper()
		select {
		case got := <-begun:
			if got != want {
				t.Errorf("worker began build %d; want %d", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("worker began nothing; want build %d", want)
		}
	}
	next(2)
	next(3)
	step("Insert(4)", true, put(4))
	next(4)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
