package store

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"
)

// recorder runs queries and stores their texts.
type recorder struct {
	reader
	texts []string
	args  [][]any
}

func (r *recorder) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	r.texts, r.args = append(r.texts, text), append(r.args, args)
	return r.reader.QueryContext(ctx, text, args...)
}

// openSQLite opens an empty database in a file until the test ends.
func openSQLite(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.Context(), "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// TestCellsAreLookedUp checks that SQLite answers the frequent queries with an index, without a scan of a table. The
// database has no statistics, as in production.
func TestCellsAreLookedUp(t *testing.T) {
	t.Parallel()
	s := openSQLite(t)
	r := &recorder{reader: s.readers}
	s.readers = r
	one := KernelFilter{BuildID: "17800.66.78", Board: "lakitu"}
	if _, _, err := s.Kernels(t.Context(), one, Page{Limit: 1}); err != nil {
		t.Fatal(err)
	}
	for _, f := range []KernelFilter{one, {}, {Milestone: 109}} {
		from, args, err := f.page("build_id, board, fingerprint", Page{Limit: 20})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := facts(t.Context(), r, from, args); err != nil {
			t.Fatal(err)
		}
	}
	f := BuildFilter{BuildID: one.BuildID, Board: one.Board}
	if _, _, err := s.Builds(t.Context(), f, Page{Limit: 20}); err != nil {
		t.Fatal(err)
	}
	if len(r.texts) < 8 {
		t.Fatalf("%d queries were seen; want those of kernels, cells and builds", len(r.texts))
	}
	for i, text := range r.texts {
		rows, err := s.db.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+text, r.args[i]...)
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
			var id, parent, unused int
			var step string
			if err := rows.Scan(&id, &parent, &unused, &step); err != nil {
				t.Fatal(err)
			}
			// The inner query's page k may be scanned. A scan in the order of an index is allowed, too, because it ends
			// with the page.
			if strings.HasPrefix(step, "SCAN") && !strings.HasPrefix(step, "SCAN k") && !strings.Contains(step, "USING") {
				t.Errorf("%q of\n%s\nwant a look-up by an index", step, text)
			}
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
		if err := rows.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOldLogsAreLookedUp checks that SQLite finds the builds of old logs by their numbers, and newer builds by their
// cells, so that the removal of logs does not read the whole table.
func TestOldLogsAreLookedUp(t *testing.T) {
	t.Parallel()
	s := openSQLite(t)
	var plan []string
	err := query(t.Context(), s.db, func(row func(...any) error) error {
		var id, parent, unused int
		var step string
		err := row(&id, &parent, &unused, &step)
		plan = append(plan, step)
		return err
	}, "EXPLAIN QUERY PLAN "+markOldLogs(2), 1, 2, 3, 4)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(plan, "\n")
	for _, want := range []string{
		"SEARCH b USING INTEGER PRIMARY KEY (rowid=?)",
		"SEARCH n USING INDEX builds_by_cell (build_id=? AND board=? AND driver=? AND flavour=? AND id>?)",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the plan lacks %q:\n%s", want, text)
		}
	}
}
