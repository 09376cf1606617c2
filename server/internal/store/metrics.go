package store

import (
	"context"
	"time"

	"github.com/prebake/prebake/pkg/queue"
)

// CountFailures counts failed builds by class, without builds that only early-warning entries want. Of each cell, it
// counts only the first failure of a class since the cell's last published build, so that repeated failures of one
// cause are counted once.
func (s *Store) CountFailures(ctx context.Context) (map[string]int, error) {
	counts := map[string]int{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var class string
		var n int
		err := row(&class, &n)
		counts[class] = n
		return err
	}, `
SELECT class, COUNT(*) FROM (
    SELECT DISTINCT class, build_id, board, driver, flavour, (
        SELECT MAX(s.id) FROM builds s WHERE s.build_id = b.build_id AND s.board = b.board
        AND s.driver = b.driver AND s.flavour = b.flavour AND s.id < b.id AND s.state = 'published'
    ) AS success
    FROM builds b WHERE state = 'failed' AND (priority <> $1 OR EXISTS (
        SELECT 1 FROM wanted w WHERE w.build_id = b.build_id AND w.board = b.board
        AND w.driver = b.driver AND w.flavour = b.flavour AND w.early = 0
    ))
) firsts GROUP BY class`, queue.PriorityWarning)
	return counts, classify("count the failed builds", err)
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
