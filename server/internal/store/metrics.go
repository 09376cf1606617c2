package store

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
)

// A count of builds reads an index with one entry for each build. Ended builds are therefore counted once in countEvery
// if there are more than countedAlways of them.
const (
	countEvery    = time.Minute
	countedAlways = 10_000
)

// openBuilds are the builds that have not ended.
const openBuilds = `builds WHERE state IN ('queued', 'building')`

// counts has the numbers of ended builds.
type counts struct {
	mu    sync.Mutex
	at    time.Time // zero if nothing was counted
	ended map[api.State]int
}

// CountBuilds counts builds by state. If there are many ended builds, their numbers may be a minute old.
func (s *Store) CountBuilds(ctx context.Context) (map[api.State]int, error) {
	counts, err := s.countBuilds(ctx, time.Now())
	return counts, classify("count the builds", err)
}

func (s *Store) countBuilds(ctx context.Context, now time.Time) (map[api.State]int, error) {
	s.counts.mu.Lock()
	defer s.counts.mu.Unlock()
	counted := 0
	for _, n := range s.counts.ended {
		counted += n
	}
	if counted <= countedAlways || now.Sub(s.counts.at) >= countEvery {
		all, err := s.count(ctx, "builds")
		if err != nil {
			return nil, err
		}
		s.counts.at, s.counts.ended = now, maps.Clone(all)
		delete(s.counts.ended, api.Queued)
		delete(s.counts.ended, api.Building)
		return all, nil
	}
	open, err := s.count(ctx, openBuilds)
	if err == nil {
		maps.Copy(open, s.counts.ended)
	}
	return open, err
}

// CountFailures counts failed builds by class, without builds that only early-warning entries want. Of each cell, it
// counts only the first failure of a class since the cell's last published build, so that repeated builds of one cause
// are counted once. It reads an index with one entry for each counted build.
func (s *Store) CountFailures(ctx context.Context) (map[string]int, error) {
	counts := map[string]int{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var class string
		var n int
		err := row(&class, &n)
		counts[class] += n
		return err
	}, countFailures, queue.PriorityWarning)
	return counts, classify("count the failed builds", err)
}

// countFailures has two parts. With one part and an OR, PostgreSQL expects so much work that it first compiles the
// query, which takes longer than the query itself.
const countFailures = `
SELECT class, COUNT(*) FROM builds WHERE counted = 1 AND priority <> $1 GROUP BY class
UNION ALL
SELECT class, COUNT(*) FROM builds b WHERE counted = 1 AND priority = $1 AND EXISTS (
    SELECT 1 FROM wanted w WHERE w.build_id = b.build_id AND w.board = b.board
    AND w.driver = b.driver AND w.flavour = b.flavour AND w.early = 0
) GROUP BY class`

// chooseCounted returns a statement that sets the column counted. The condition chooses all builds of one cell, or of
// all cells. Parameter $1 is the priority of early warnings. If several builds failed with one class, the statement
// prefers one that is no early warning, because [Store.CountFailures] may leave out an early warning.
func chooseCounted(condition string) string {
	return `
WITH numbered AS (
    SELECT id, state, class, priority, build_id, board, driver, flavour,
        SUM(CASE WHEN state = 'published' THEN 1 ELSE 0 END)
            OVER (PARTITION BY build_id, board, driver, flavour ORDER BY id) AS successes
    FROM builds WHERE ` + condition + `
), ranked AS (
    SELECT id, ROW_NUMBER() OVER (
        PARTITION BY build_id, board, driver, flavour, successes, class
        ORDER BY CASE WHEN priority = $1 THEN 1 ELSE 0 END, id
    ) AS place FROM numbered WHERE state = 'failed'
)
UPDATE builds SET counted = 1 - counted WHERE ` + condition + `
AND counted <> CASE WHEN id IN (SELECT id FROM ranked WHERE place = 1) THEN 1 ELSE 0 END`
}

// chooseAllCounted sets the column counted of all builds, for a catalogue from before the column was added.
func chooseAllCounted(ctx context.Context, tx *sql.Tx) error {
	_, err := tx.ExecContext(ctx, chooseCounted("TRUE"), queue.PriorityWarning)
	return err
}

// chooseCounted sets the column counted of a cell's builds. With PostgreSQL, two builds of a cell that end at the same
// moment may both count, until the next build of the cell ends.
func (tx *Tx) chooseCounted(ctx context.Context, key CellKey) error {
	_, err := tx.ExecContext(ctx, chooseCounted("build_id = $2 AND board = $3 AND driver = $4 AND flavour = $5"),
		queue.PriorityWarning, key.BuildID, key.Board, key.Driver.Version, string(key.Driver.Flavour))
	return classify(fmt.Sprintf("count the failures of %s for %s/%s", key.Driver, key.BuildID, key.Board), err)
}

// OldestQueued returns the creation time of the oldest queued build, or the zero time if there is none.
// It leaves out builds of the lowest priority, which wait behind all others.
func (s *Store) OldestQueued(ctx context.Context) (time.Time, error) {
	var oldest int64
	err := s.readers.QueryRowContext(
		ctx,
		`SELECT COALESCE(MIN(created_at), 0) FROM builds WHERE state = 'queued' AND priority < $1`,
		min(queue.PriorityAgain, queue.PriorityWarning),
	).Scan(
		&oldest,
	)
	return timeOf(oldest), classify("read age of the queue", err)
}
