package store

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/queue"
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
		for step := range strings.Lines(plan(t, s, text, r.args[i]...)) {
			// The inner query's page k may be scanned. A scan in the order of an index is allowed, too, because it ends
			// with the page.
			if strings.HasPrefix(step, "SCAN") && !strings.HasPrefix(step, "SCAN k") && !strings.Contains(step, "USING") {
				t.Errorf("%q of\n%s\nwant a look-up by an index", step, text)
			}
		}
	}
}

// TestOldLogsAreLookedUp checks that SQLite finds the builds of old logs by their numbers, and other builds by their
// cells, so that the removal of logs does not read the whole table.
func TestOldLogsAreLookedUp(t *testing.T) {
	t.Parallel()
	text := plan(t, openSQLite(t), markOldLogs(2), 1, 2, 3, 4)
	for _, want := range []string{
		"SEARCH b USING INTEGER PRIMARY KEY (rowid=?)",
		"SEARCH n USING INDEX builds_by_cell (build_id=? AND board=? AND driver=? AND flavour=? AND id>?)",
		"SEARCH p USING INDEX builds_by_cell (build_id=? AND board=? AND driver=? AND flavour=? AND id<?)",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the plan lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "SCAN") {
		t.Errorf("the plan reads a whole table:\n%s", text)
	}
}

// TestFailuresAreCountedFromIndex checks that SQLite counts failures in an index that has only the counted ones, and
// finds the builds of one cell when it chooses which of them count.
func TestFailuresAreCountedFromIndex(t *testing.T) {
	t.Parallel()
	s := openSQLite(t)
	counting := plan(t, s, countFailures, queue.PriorityWarning)
	if !strings.Contains(counting, "SCAN builds USING COVERING INDEX builds_counted") ||
		!strings.Contains(counting, "SCAN b USING COVERING INDEX builds_counted") || strings.Contains(counting, "SCAN w") ||
		strings.Contains(counting, "TEMP") {
		t.Errorf("the plan of the count; want scans of the index alone, and a search of wanted cells:\n%s", counting)
	}
	cell := "build_id = $2 AND board = $3 AND driver = $4 AND flavour = $5"
	choosing := plan(t, s, chooseCounted(cell), queue.PriorityWarning, "1.2.3", "lakitu", "535.1", "open")
	if strings.Contains(choosing, "SCAN builds") {
		t.Errorf("the plan of the choice reads all builds:\n%s", choosing)
	}
}

// plan returns the steps in which SQLite runs a statement.
func plan(t *testing.T, s *Store, text string, args ...any) string {
	t.Helper()
	var steps []string
	err := query(t.Context(), s.db, func(row func(...any) error) error {
		var id, parent, unused int
		var step string
		err := row(&id, &parent, &unused, &step)
		steps = append(steps, step)
		return err
	}, "EXPLAIN QUERY PLAN "+text, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(steps, "\n")
}
