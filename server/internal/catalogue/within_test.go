package catalogue_test

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

// failingQueue does its work, and then returns an error, as if the database were lost during the transaction.
type failingQueue struct {
	queue.Within
	broken *bool
}

func (b failingQueue) err(err error) error {
	if err == nil && *b.broken {
		err = errors.New("the database went away")
	}
	return err
}

func (b failingQueue) Insert(ctx context.Context, job api.BuildJob, priority int) error {
	return b.err(b.Within.Insert(ctx, job, priority))
}

func (b failingQueue) Cancel(ctx context.Context, build int64) error {
	return b.err(b.Within.Cancel(ctx, build))
}

// TestBuildAndJobAreOne checks a build and its job in the queue if both are in one database. Either both must be
// written, or neither.
func TestBuildAndJobAreOne(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		areOne(t, "sqlite://"+filepath.Join(t.TempDir(), "both.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		areOne(t, emptySchema(t, installed.Postgres(t)))
	})
}

// emptySchema makes a schema in a database and returns a URL that uses it.
func emptySchema(t *testing.T, raw string) string {
	t.Helper()
	db, err := sql.Open("pgx", raw)
	if err != nil {
		t.Fatal(err)
	}
	schema := "one_" + strings.ToLower(rand.Text())
	if _, err := db.ExecContext(t.Context(), "CREATE SCHEMA "+schema); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, err := db.ExecContext(context.WithoutCancel(t.Context()), "DROP SCHEMA "+schema+" CASCADE")
		if err := errors.Join(err, db.Close()); err != nil {
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

func areOne(t *testing.T, url string) {
	t.Helper()
	s, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	q, err := queue.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(q.Close(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	broken := true
	c := catalogue.New(catalogue.Config{Store: s, Queue: q, Repository: "/prebake/driver",
		Within: func(tx *store.Tx) catalogue.Enqueuer { return failingQueue{q.Within(tx.Conn, tx.Tx), &broken} }})
	k := target.Kernel{BuildID: first, Board: "lakitu", Release: "6.1.0", Arch: target.AMD64}
	if err := c.RecordKernel(t.Context(), api.Kernel{Kernel: k}); err != nil {
		t.Fatal(err)
	}
	ask := api.BuildRequest{BuildID: first, Board: "lakitu", Driver: v261, Flavour: "open"}
	id := int64(1)
	agree := func(after string, state api.State, job string) {
		t.Helper()
		all, _, err := c.Builds(t.Context(), store.BuildFilter{}, store.Page{})
		at, qerr := q.Lookup(t.Context(), id)
		if err := errors.Join(err, qerr); err != nil {
			t.Fatal(err)
		}
		var got api.State
		if len(all) > 0 {
			got = all[0].State
		}
		if got != state || at.State != job {
			t.Errorf("after %s, the build is %q and its job %q; want %q and %q", after, got, at.State, state, job)
		}
	}
	if b, err := c.Request(t.Context(), ask); err == nil {
		t.Errorf("Request(%v) with a broken queue = build %d; want an error", ask, b.ID)
	}
	agree("a request that failed", "", "")
	broken = false
	b, err := c.Request(t.Context(), ask)
	if err != nil {
		t.Fatal(err)
	}
	id = b.ID // PostgreSQL does not use a number again, even after a rollback of its transaction
	agree("a request", api.Queued, "available")
	broken = true
	if _, err := c.Cancel(t.Context(), id); err == nil {
		t.Error("Cancel() with a broken queue = nil; want an error")
	}
	agree("a cancel that failed", api.Queued, "available")
	broken = false
	if _, err := c.Cancel(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	agree("a cancel", api.Cancelled, "cancelled")
}
