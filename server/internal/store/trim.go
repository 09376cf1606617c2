package store

import (
	"context"
	"fmt"
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
		n, err := s.removeBuilds(ctx, oldBuilds(all, before))
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

// removeBuilds removes builds whose state is the same as before, and returns their number.
func (s *Store) removeBuilds(ctx context.Context, old []storedBuild) (removed int, err error) {
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
			return nil
		})
		if err != nil {
			return removed, err
		}
		removed += gone
		old = old[n:]
	}
	return removed, nil
}
