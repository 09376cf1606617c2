package store

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// TestFailuresByDefinition gives three cells random histories: builds with each end and class, builds of early
// warnings, builds that start again, and builds that are removed. After each step, the stored count of failures must
// equal that of a query over all builds.
func TestFailuresByDefinition(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		failuresByDefinition(t, "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		failuresByDefinition(t, installed.Postgres(t))
	})
}

// failures is the query that defines what [Store.CountFailures] counts, for the COS builds of one board.
const failures = `
SELECT class, COUNT(*) FROM (
    SELECT DISTINCT class, build_id, board, driver, flavour, (
        SELECT MAX(s.id) FROM builds s WHERE s.build_id = b.build_id AND s.board = b.board
        AND s.driver = b.driver AND s.flavour = b.flavour AND s.id < b.id AND s.state = 'published'
    ) AS success
    FROM builds b WHERE board = $2 AND state = 'failed' AND (priority <> $1 OR EXISTS (
        SELECT 1 FROM wanted w WHERE w.build_id = b.build_id AND w.board = b.board
        AND w.driver = b.driver AND w.flavour = b.flavour AND w.early = 0
    ))
) firsts GROUP BY class`

func failuresByDefinition(t *testing.T, url string) {
	ctx := t.Context()
	s, err := Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	board := fmt.Sprintf("failures%d", time.Now().UnixNano()) // other tests share the database
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	kernel := func(i int) target.Kernel { return target.Kernel{BuildID: fmt.Sprintf("1.%d.0", i), Board: board} }
	write := func(f func(tx *Tx) error) {
		t.Helper()
		if err := s.Write(ctx, f); err != nil {
			t.Fatal(err)
		}
	}
	write(func(tx *Tx) error { return tx.PutWishList(ctx, board, "x", 0, time.Now()) })
	var wanted []WantedCell
	for i, early := range []bool{false, true} { // no list wants the third cell
		wanted = append(wanted, WantedCell{CellKey{kernel(i).BuildID, board, driver}, early})
	}
	if err := s.SetWanted(ctx, board, 1, wanted); err != nil {
		t.Fatal(err)
	}
	read := func(text string, args ...any) map[string]int {
		t.Helper()
		counts := map[string]int{}
		err := query(ctx, s.db, func(row func(...any) error) error {
			var class string
			var n int
			err := row(&class, &n)
			counts[class] = n
			return err
		}, text, args...)
		if err != nil {
			t.Fatal(err)
		}
		return counts
	}
	const seed = 1
	r := rand.New(rand.NewPCG(seed, seed))
	classes := []string{"api-break", "transient"}
	var all []api.Build
	for step := range 400 {
		switch what := r.IntN(10); {
		case what == 0 && len(all) > 0: // a failed build starts again, and then ends
			b := all[r.IntN(len(all))]
			if b.State != api.Failed {
				continue
			}
			b.State = api.Building
			write(func(tx *Tx) error { return tx.SetBuild(ctx, b) })
			compareFailures(t, step, read, board)
			b.State, b.Class = api.Failed, classes[r.IntN(2)]
			if r.IntN(2) == 0 {
				b.State, b.Class = api.Published, ""
			}
			write(func(tx *Tx) error { return tx.SetBuild(ctx, b) })
			for i := range all {
				if all[i].ID == b.ID {
					all[i] = b
				}
			}
		case what == 1 && len(all) > 0: // an old build is removed
			i := r.IntN(len(all))
			b := all[i]
			all = append(all[:i:i], all[i+1:]...)
			old := []storedBuild{{id: b.ID, state: b.State}}
			if n, err := s.removeBuilds(ctx, CellKey{b.Kernel.BuildID, board, driver}, old); err != nil || n != 1 {
				t.Fatalf("removeBuilds() = %d, %v; want 1", n, err)
			}
		default:
			b := api.Build{Kernel: kernel(r.IntN(3)), Driver: driver, State: api.Queued, CreatedAt: time.Now(),
				Priority: []int{queue.PriorityAsked, queue.PriorityWarning}[r.IntN(2)]}
			write(func(tx *Tx) (err error) {
				b, _, err = tx.AddBuild(ctx, b)
				return err
			})
			b.State, b.Class = api.Failed, classes[r.IntN(2)]
			switch r.IntN(6) {
			case 0:
				b.State, b.Class = api.Published, ""
			case 1:
				b.State, b.Class = api.Cancelled, ""
			}
			write(func(tx *Tx) error { return tx.SetBuild(ctx, b) })
			all = append(all, b)
		}
		compareFailures(t, step, read, board)
	}
}

// compareFailures compares the marks on the builds of one board with the query in failures.
func compareFailures(t *testing.T, step int, read func(text string, args ...any) map[string]int, board string) {
	t.Helper()
	want := read(failures, queue.PriorityWarning, board)
	got := read(`SELECT class, COUNT(*) FROM (SELECT * FROM builds WHERE board = $2 AND counted = 1) b
WHERE priority <> $1 OR EXISTS (
    SELECT 1 FROM wanted w WHERE w.build_id = b.build_id AND w.board = b.board
    AND w.driver = b.driver AND w.flavour = b.flavour AND w.early = 0
) GROUP BY class`, queue.PriorityWarning, board)
	if !maps.Equal(want, got) {
		t.Fatalf("failures after step %d (-want +got):\n%s", step, cmp.Diff(want, got))
	}
}
