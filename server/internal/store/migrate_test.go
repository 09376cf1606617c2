package store_test

import (
	"database/sql"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/server/internal/store"
)

// TestTriesOfOldBuilds opens a catalogue from before builds had tries and failures were marked. The migration must give
// each failed build its number since the last published build of the same cell.
func TestTriesOfOldBuilds(t *testing.T) {
	t.Parallel()
	onBoth(t, "tries", migrateTries)
}

// onBoth runs a test with SQLite and with PostgreSQL, each with a database of its own. dsn is what package sql opens
// with the driver, and url is what package store opens.
func onBoth(t *testing.T, name string, f func(t *testing.T, driver, dsn, url string)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		file := filepath.Join(t.TempDir(), "catalogue.db")
		f(t, "sqlite", file, "sqlite://"+file)
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		url := newPostgres(t, name)
		f(t, "pgx", url, url)
	})
}

// newPostgres makes a PostgreSQL database for this test only, and returns its URL.
func newPostgres(t *testing.T, name string) string {
	t.Helper()
	raw := installed.Postgres(t)
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := sql.Open("pgx", raw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := admin.Close(); err != nil {
			t.Error(err)
		}
	})
	name = "prebake_" + name + "_" + strconv.Itoa(os.Getpid())
	if _, err := admin.ExecContext(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := admin.Exec("DROP DATABASE " + name + " WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	u.Path = "/" + name
	return u.String()
}

func migrateTries(t *testing.T, driver, dsn, url string) {
	t.Helper()
	s, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	states := []api.State{api.Failed, api.Failed, api.Published, api.Failed, api.Cancelled, api.Failed}
	for _, state := range states {
		for _, id := range []string{"1.2.3", "1.2.4"} {
			b := add(t, s, id)
			_, err := changeBuild(t.Context(), s, b.ID, func(b *api.Build) error { b.State = state; return nil })
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	failures := func() int {
		t.Helper()
		counts, err := s.CountFailures(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return counts[""]
	}
	if n := failures(); n != 4 {
		t.Errorf("CountFailures() = %d; want 4, in each cell one before the success and one after it", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	// Migrations run in order, so the migrations after the one with tries must be undone, too.
	for _, statement := range []string{
		`DROP INDEX builds_counted`, `ALTER TABLE builds DROP COLUMN counted`,
		`ALTER TABLE builds DROP COLUMN log_removed_at`, `ALTER TABLE builds DROP COLUMN tries`,
		`DELETE FROM goose_db_version WHERE version_id >= 11`,
	} {
		if _, err := db.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, url)
	if n := failures(); n != 4 {
		t.Errorf("CountFailures() after the migration = %d; want 4", n)
	}
	for _, id := range []string{"1.2.3", "1.2.4"} {
		all, _, err := s.Builds(t.Context(), store.BuildFilter{BuildID: id}, page)
		if err != nil {
			t.Fatal(err)
		}
		var got []int
		for _, b := range all {
			got = append(got, b.Tries)
		}
		if d := cmp.Diff([]int{2, 1, 1, 1, 2, 1}, got); d != "" { // from the newest build to the oldest
			t.Errorf("tries of COS build %s (-want +got):\n%s", id, d)
		}
	}
}

// TestNewerSchema checks a database that a newer server has migrated. This server must not start with it. If it was
// running already, it must not write with PostgreSQL any more. It may read.
func TestNewerSchema(t *testing.T) {
	t.Parallel()
	onBoth(t, "newer", newerSchema)
}

func newerSchema(t *testing.T, driver, dsn, url string) {
	t.Helper()
	s := open(t, url)
	add(t, s, "1.2.3")
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(t.Context(), `INSERT INTO goose_db_version (version_id, is_applied) VALUES (1000, TRUE)`)
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), url); !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "1000") {
		t.Errorf("Open() of a newer database = %v; want kind usage, and its schema", err)
	}
	if driver == "sqlite" { // no other server can use the database meanwhile
		return
	}
	err = s.Write(t.Context(), func(tx *store.Tx) error {
		return tx.PutKernel(t.Context(), api.Kernel{Kernel: kernelOf("9.9.9")})
	})
	if !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "1000") {
		t.Errorf("Write() to a newer database = %v; want kind transient, and its schema", err)
	}
	if _, known, err := s.Kernel(t.Context(), "9.9.9", "lakitu"); known || err != nil {
		t.Errorf("Kernel() after the refused write = %t, %v; want no kernel", known, err)
	}
}

// TestNewerSchemaAtAnyLevel checks a write during which a newer server migrates the database. The write must notice it,
// also if the database's default isolation level lets a transaction see only what was there when it began.
func TestNewerSchemaAtAnyLevel(t *testing.T) {
	t.Parallel()
	for _, level := range []string{"read committed", "repeatable read", "serializable"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			raw := newPostgres(t, "level_"+strings.ReplaceAll(level, " ", "_"))
			u, err := url.Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			q := u.Query()
			q.Set("default_transaction_isolation", level)
			u.RawQuery = strings.ReplaceAll(q.Encode(), "+", "%20") // PostgreSQL's URLs have no "+" for a space
			s := open(t, u.String())
			db, err := sql.Open("pgx", raw)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := db.Close(); err != nil {
					t.Error(err)
				}
			})
			err = s.Write(t.Context(), func(tx *store.Tx) error {
				var one int
				if err := tx.QueryRowContext(t.Context(), `SELECT 1 FROM goose_db_version LIMIT 1`).Scan(&one); err != nil {
					return err
				}
				_, err := db.ExecContext(t.Context(),
					`INSERT INTO goose_db_version (version_id, is_applied) VALUES (1000, TRUE)`)
				return err
			})
			if !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "schema 1000") {
				t.Errorf("Write() while a newer server migrates the database = %v; want kind transient, and its schema", err)
			}
		})
	}
}
