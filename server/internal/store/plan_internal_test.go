package store

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/queue"
)

// recorder runs queries, and keeps their texts and arguments.
type recorder struct {
	reader
	texts []string
	args  [][]any
}

func (r *recorder) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	r.texts, r.args = append(r.texts, text), append(r.args, args)
	return r.reader.QueryContext(ctx, text, args...)
}

// openSQLite opens an empty database in a file, and closes it at the end of the test.
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

// TestCellsAreLookedUp checks that SQLite answers the frequent queries by an index, and does not scan a table. As in
// production, the database has no statistics.
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
			// Two scans are allowed: that of k, which is the inner query's page, and one in the order of an index, because it
			// ends with the page.
			if strings.HasPrefix(step, "SCAN") && !strings.HasPrefix(step, "SCAN k") && !strings.Contains(step, "USING") {
				t.Errorf("%q of\n%s\nwant a look-up by an index", step, text)
			}
		}
	}
}

// TestOldLogsAreLookedUp checks that the removal of old logs does not read the whole table: SQLite must find the builds
// of these logs by number, and the other builds of the same cells by an index.
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

// TestFailuresAreCountedFromIndex checks two queries about failures. SQLite must count them in the index that has only
// counted builds. To choose which builds count, it must not read the builds of other cells.
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

// plan returns the query plan of a statement, one step a line.
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
