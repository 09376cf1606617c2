package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
)

// KeptBuilds is the number of newest builds of each cell that [Store.TrimBuilds] keeps, however old they are. It is
// more than the automatic tries of a cell.
const KeptBuilds = 50

// trimmedAtOnce is the maximum number of builds that one transaction removes, so that other writers need not wait.
const trimmedAtOnce = 500

// storedBuild has the columns of a build that decide whether it is removed.
type storedBuild struct {
	id             int64
	state          api.State
	created, ended time.Time
}

// TrimBuilds removes builds that ended before the given time, and returns their number. Of each cell it keeps the
// newest KeptBuilds builds, the newest build of each state, and the first failure since the last success, with which an
// early warning begins. Without the newest build of a cell, the cell would count as never requested.
func (s *Store) TrimBuilds(ctx context.Context, before time.Time) (removed int, err error) {
	var cells []CellKey
	err = query(ctx, s.readers, func(row func(...any) error) error {
		var key CellKey
		err := row(&key.BuildID, &key.Board, &key.Driver.Version, &key.Driver.Flavour)
		cells = append(cells, key)
		return err
	}, `SELECT build_id, board, driver, flavour FROM builds GROUP BY build_id, board, driver, flavour
HAVING COUNT(*) > $1`, KeptBuilds)
	if err != nil {
		return 0, classify("find cells with many builds", err)
	}
	for _, key := range cells {
		var all []storedBuild
		err := query(ctx, s.readers, func(row func(...any) error) error {
			var b storedBuild
			var created, ended int64
			err := row(&b.id, &b.state, &created, &ended)
			b.created, b.ended = timeOf(created), timeOf(ended)
			all = append(all, b)
			return err
		}, `SELECT id, state, created_at, finished_at FROM builds
WHERE build_id = $1 AND board = $2 AND driver = $3 AND flavour = $4 ORDER BY id DESC`,
			key.BuildID, key.Board, key.Driver.Version, string(key.Driver.Flavour))
		if err != nil {
			return removed, classify("find old builds", err)
		}
		n, err := s.removeBuilds(ctx, key, oldBuilds(all, before))
		removed += n
		if err != nil {
			return removed, err
		}
	}
	return removed, nil
}

// oldBuilds returns the builds of a cell that may be removed. The given builds are all builds of the cell, newest
// first.
func oldBuilds(all []storedBuild, before time.Time) (old []storedBuild) {
	newest := map[api.State]int64{}
	firstFailure := int64(0) // since the last success
	for _, b := range all {
		if _, ok := newest[b.state]; !ok {
			newest[b.state] = b.id
		}
		if b.state == api.Failed && newest[api.Published] == 0 {
			firstFailure = b.id
		}
	}
	for i, b := range all {
		open := b.state == api.Queued || b.state == api.Building
		if i >= KeptBuilds && !open && newest[b.state] != b.id && firstFailure != b.id &&
			b.created.Before(before) && b.ended.Before(before) {
			old = append(old, b)
		}
	}
	return old
}

// removeBuilds removes the builds old of a cell, and returns the number of removed builds. It keeps a build whose state
// has changed since it was read.
func (s *Store) removeBuilds(ctx context.Context, key CellKey, old []storedBuild) (removed int, err error) {
	for len(old) > 0 {
		n, gone := min(len(old), trimmedAtOnce), 0
		err := s.Write(ctx, func(tx *Tx) error {
			for _, b := range old[:n] {
				done, err := tx.ExecContext(ctx, `DELETE FROM builds WHERE id = $1 AND state = $2`, b.id, string(b.state))
				if err != nil {
					return classify(fmt.Sprintf("remove build %d", b.id), err)
				}
				rows, err := done.RowsAffected()
				if err != nil {
					return classify(fmt.Sprintf("remove build %d", b.id), err)
				}
				gone += int(rows)
			}
			return tx.chooseCounted(ctx, key)
		})
		if err != nil {
			return removed, err
		}
		removed += gone
		old = old[n:]
	}
	return removed, nil
}

// MarkOldLogs records that the logs of old builds among the given ones are removed at the time now, and returns these
// builds. The caller then removes their logs, and calls [Store.ForgetFacts] when it has removed all. A build is old if
// it ended before the given time. The newest failure of a cell, and the first one since the cell's last success, are
// not old until a newer build of the cell was published: their logs say why the cell has no artifact, and how that
// began.
func (s *Store) MarkOldLogs(ctx context.Context, builds []int64, before, now time.Time) (old []int64, err error) {
	err = s.Write(ctx, func(tx *Tx) error {
		old = nil
		return query(ctx, tx, func(row func(...any) error) error {
			var id int64
			err := row(&id)
			old = append(old, id)
			return err
		}, markOldLogs(len(builds)), append([]any{micros(now), micros(before)}, anys(builds)...)...)
	})
	if err != nil {
		return nil, classify("find old logs", err)
	}
	return old, nil
}

// markOldLogs returns the statement of [Store.MarkOldLogs] for n builds. A failure with another failure directly before
// it, leaving out cancelled builds, is not the first one since the last success.
func markOldLogs(n int) string {
	const newer = `SELECT 1 FROM builds n WHERE n.build_id = b.build_id AND n.board = b.board AND n.driver = b.driver
    AND n.flavour = b.flavour AND n.id > b.id AND n.state IN `
	return `
UPDATE builds AS b SET log_removed_at = $1
WHERE b.id IN (` + parameters(3, n) + `) AND b.state IN ('published', 'failed', 'cancelled') AND b.finished_at < $2
AND (b.state <> 'failed' OR 'failed' = (
    SELECT p.state FROM builds p WHERE p.build_id = b.build_id AND p.board = b.board AND p.driver = b.driver
    AND p.flavour = b.flavour AND p.id < b.id AND p.state IN ('failed', 'published') ORDER BY p.id DESC LIMIT 1
) AND EXISTS (` + newer + `('failed', 'published')) OR EXISTS (` + newer + `('published'))) RETURNING id`
}

// ForgetFacts makes all servers read again what they remember about kernels and drivers.
func (s *Store) ForgetFacts(ctx context.Context) error {
	return s.Write(ctx, func(tx *Tx) error {
		tx.touch("")
		return nil
	})
}

// AbsentBuilds returns those of the given builds that the catalogue lacks.
func (s *Store) AbsentBuilds(ctx context.Context, builds []int64) (absent []int64, err error) {
	present := map[int64]bool{}
	// Not s.readers, which keeps each statement for ever: here, each number of builds makes another statement.
	err = query(ctx, s.db, func(row func(...any) error) error {
		var id int64
		err := row(&id)
		present[id] = true
		return err
	}, `SELECT id FROM builds WHERE id IN (`+parameters(1, len(builds))+`)`, anys(builds)...)
	if err != nil {
		return nil, classify("find builds", err)
	}
	return slices.DeleteFunc(slices.Clone(builds), func(id int64) bool { return present[id] }), nil
}

// parameters returns a list of n numbered parameters, such as "$3, $4". The first has the given number.
func parameters(first, n int) string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("$%d", first+i)
	}
	return strings.Join(all, ", ")
}

func anys(numbers []int64) []any {
	all := make([]any, len(numbers))
	for i, n := range numbers {
		all[i] = n
	}
	return all
}
