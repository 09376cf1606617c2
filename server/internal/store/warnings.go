package store

import (
	"context"
	"strings"

	"github.com/prebake/prebake/pkg/api"
)

// maxWarnings is the maximum number of entries that Warnings returns. More failures than that have the same cause.
const maxWarnings = 1000

// Warnings lists the cells that only early-warning entries want and whose last ended build failed, newest builds first.
// An entry's field Since is the end of the first failed build after the last published one.
func (s *Store) Warnings(ctx context.Context) ([]api.Warning, error) {
	all := []api.Warning{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var since int64
		b, err := scanBuild(func(into ...any) error { return row(append(into, &since)...) })
		if err != nil {
			return err
		}
		w := api.Warning{
			Kernel: b.Kernel,
			Driver: b.Driver,
			Class:  b.Class,
			Error:  firstLineOf(b.Error),
			Hint:   b.Hint,
			Build:  b.ID,
			Since:  timeOf(since),
		}
		if b.FinishedAt != nil {
			w.LastSeenAt = *b.FinishedAt
		}
		all = append(all, w)
		return nil
	}, `
WITH early AS (
    SELECT build_id, board, driver, flavour FROM wanted GROUP BY build_id, board, driver, flavour HAVING MIN(early) = 1
)
SELECT `+withPrefix("b", buildColumns)+`, (
    SELECT MIN(f.finished_at) FROM builds f
    WHERE f.build_id = e.build_id AND f.board = e.board AND f.driver = e.driver AND f.flavour = e.flavour
    AND f.state = 'failed' AND f.id > COALESCE((
        SELECT MAX(p.id) FROM builds p
        WHERE p.build_id = e.build_id AND p.board = e.board AND p.driver = e.driver AND p.flavour = e.flavour
        AND p.state = 'published'
    ), 0)
) AS since
FROM early e JOIN builds b ON b.id = (
    SELECT MAX(l.id) FROM builds l
    WHERE l.build_id = e.build_id AND l.board = e.board AND l.driver = e.driver AND l.flavour = e.flavour
    AND l.state IN ('failed', 'published')
)
WHERE b.state = 'failed' AND NOT EXISTS (
    SELECT 1 FROM artifact_kernels t JOIN artifacts a ON a.digest = t.digest
    WHERE t.build_id = e.build_id AND t.board = e.board AND a.driver = e.driver AND a.flavour = e.flavour
    AND a.state = 'published'
)
ORDER BY b.id DESC LIMIT $1`, maxWarnings)
	return all, classify("list the early warnings", err)
}

func firstLineOf(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}
