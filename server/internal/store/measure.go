package store

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// Changes returns the number of writes that this process knows of. While this number stays the same, measurements stay
// valid.
func (s *Store) Changes() uint64 {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.cache.dropped
}

// wantedAtOnce is the number of wanted cells in one transaction, and wantedRows in one statement.
const (
	wantedAtOnce = 1000
	wantedRows   = 100
)

// WantedCell is a cell that a wish list asks for.
type WantedCell struct {
	CellKey
	// Early is true if an early-warning entry asks for the cell.
	Early bool
}

// early returns the value for the database's column of the same name.
func (w WantedCell) early() int {
	if w.Early {
		return 1
	}
	return 0
}

// SetWanted replaces the wanted cells of a wish list by those of one version of its text. If the list has another
// version by now, or was removed, SetWanted changes nothing more: another plan stores the cells of the new version. It
// uses several transactions for a long list, so that other writers need not wait.
func (s *Store) SetWanted(ctx context.Context, list string, version int64, cells []WantedCell) error {
	stored := map[WantedCell]bool{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var key WantedCell
		var early int
		err := row(&key.BuildID, &key.Board, &key.Driver.Version, &key.Driver.Flavour, &early)
		key.Early = early != 0
		stored[key] = true
		return err
	}, `SELECT build_id, board, driver, flavour, early FROM wanted WHERE list = $1`, list)
	if err != nil {
		return classify("read cells of wish list "+list, err)
	}
	var added, gone []WantedCell
	for _, key := range cells {
		if !stored[key] {
			added = append(added, key)
		}
		delete(stored, key)
	}
	for key := range stored {
		gone = append(gone, key)
	}
	for current := true; current && len(added)+len(gone) > 0; {
		err := s.Write(ctx, func(tx *Tx) error {
			now, err := tx.lockWishList(ctx, list)
			if current = err == nil && now == version; !current {
				return err
			}
			n := min(len(gone), wantedAtOnce)
			for _, key := range gone[:n] {
				_, err := tx.ExecContext(
					ctx,
					`DELETE FROM wanted WHERE list = $1 AND build_id = $2 AND board = $3 AND driver = $4 AND flavour = $5 AND early = $6`,
					list,
					key.BuildID,
					key.Board,
					key.Driver.Version,
					string(key.Driver.Flavour),
					key.early(),
				)
				if err != nil {
					return err
				}
			}
			gone = gone[n:]
			for range wantedAtOnce / wantedRows {
				n := min(len(added), wantedRows)
				if err := tx.addWanted(ctx, list, added[:n]); err != nil {
					return err
				}
				added = added[n:]
			}
			return nil
		})
		if err != nil {
			return classify("store the cells of wish list "+list, err)
		}
	}
	return nil
}

// addWanted stores wanted cells of a wish list. The wish list must exist.
func (tx *Tx) addWanted(ctx context.Context, list string, cells []WantedCell) error {
	if len(cells) == 0 {
		return nil
	}
	var rows []string
	args := []any{list}
	for _, key := range cells {
		n := len(args)
		rows = append(rows, fmt.Sprintf("SELECT $1, $%d, $%d, $%d, $%d, %d", n+1, n+2, n+3, n+4, key.early()))
		args = append(args, key.BuildID, key.Board, key.Driver.Version, string(key.Driver.Flavour))
	}
	text := `INSERT INTO wanted (list, build_id, board, driver, flavour, early) SELECT * FROM (` + strings.Join(
		rows,
		" UNION ALL ",
	) +
		`) c WHERE TRUE ON CONFLICT (list, build_id, board, driver, flavour)
DO UPDATE SET early = excluded.early`
	if tx.postgres { // PostgreSQL does not know the types of these parameters
		text = strings.ReplaceAll(text, "SELECT $1,", "SELECT CAST($1 AS TEXT),")
	}
	_, err := tx.ExecContext(ctx, text, args...)
	return err
}

// Coverage counts wanted cells by milestone and state, without cells that only early-warning entries want. Milestone 0
// means unknown. State Unknown means no artifact and no build. For other states, package catalogue has the rules.
func (s *Store) Coverage(ctx context.Context) (map[int]map[api.State]int, error) {
	counts := map[int]map[api.State]int{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var milestone, n int
		var state api.State
		err := row(&milestone, &state, &n)
		if counts[milestone] == nil {
			counts[milestone] = map[api.State]int{}
		}
		counts[milestone][state] += n
		return err
	}, `
WITH cells AS (SELECT DISTINCT build_id, board, driver, flavour FROM wanted WHERE early = 0),
facts AS (
    SELECT COALESCE(k.milestone, 0) AS milestone,
    CASE WHEN k.fingerprint <> '' THEN (
        SELECT MIN(CASE a.state WHEN 'published' THEN 0 WHEN 'yanked' THEN 1 ELSE 2 END)
        FROM artifacts a CROSS JOIN artifact_kernels t
        WHERE a.fingerprint = k.fingerprint AND a.driver = w.driver AND a.flavour = w.flavour
        AND t.digest = a.digest AND t.build_id = w.build_id AND t.board = w.board
    ) ELSE (
        SELECT MIN(CASE a.state WHEN 'published' THEN 0 WHEN 'yanked' THEN 1 ELSE 2 END)
        FROM artifact_kernels t CROSS JOIN artifacts a
        WHERE t.build_id = w.build_id AND t.board = w.board AND a.digest = t.digest
        AND a.driver = w.driver AND a.flavour = w.flavour
    ) END AS best,
    (
        SELECT CASE WHEN b.state = 'failed' AND b.class = 'unsupported' THEN 'unsupported' ELSE b.state END
        FROM builds b WHERE b.build_id = w.build_id AND b.board = w.board AND b.driver = w.driver AND b.flavour = w.flavour
        ORDER BY b.id DESC LIMIT 1
    ) AS build
    FROM cells w LEFT JOIN kernels k ON k.build_id = w.build_id AND k.board = w.board
)
SELECT milestone, CASE
    WHEN best = 0 THEN 'published'
    WHEN build IN ('queued', 'building') THEN build
    WHEN best = 1 THEN 'yanked'
    WHEN best = 2 THEN 'quarantined'
    WHEN build IN ('failed', 'unsupported', 'cancelled') THEN build
    ELSE 'unknown' END AS state, COUNT(*)
FROM facts GROUP BY 1, 2`)
	return counts, classify("count the wanted cells", err)
}

// Waiting is a queued build.
type Waiting struct {
	ID       int64
	Priority int
	Flavour  target.Flavour
}

// maxWaiting is the maximum number of waiting builds, and of running builds, that are read.
const maxWaiting = 100_000

// WaitingBuilds lists the queued builds in the order in which they will start.
func (s *Store) WaitingBuilds(ctx context.Context) ([]Waiting, error) {
	var all []Waiting
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var w Waiting
		err := row(&w.ID, &w.Priority, &w.Flavour)
		all = append(all, w)
		return err
	}, `SELECT id, priority, flavour FROM builds WHERE state = 'queued' ORDER BY priority, id LIMIT $1`, maxWaiting)
	return all, classify("list the waiting builds", err)
}

// Working has the times of a build that is running or was published by a builder.
type Working struct {
	Worker                             string
	Flavour                            target.Flavour
	StartedAt, HeartbeatAt, FinishedAt time.Time
}

func (s *Store) listWorking(ctx context.Context, tail string, args ...any) ([]Working, error) {
	var all []Working
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var w Working
		var started, beat, finished int64
		err := row(&w.Worker, &w.Flavour, &started, &beat, &finished)
		w.StartedAt, w.HeartbeatAt, w.FinishedAt = timeOf(started), timeOf(beat), timeOf(finished)
		all = append(all, w)
		return err
	}, `SELECT worker, flavour, started_at, beat_at, finished_at FROM builds WHERE state = `+tail, args...)
	return all, classify("list the builds under way", err)
}

// RunningBuilds lists the builds that are running.
func (s *Store) RunningBuilds(ctx context.Context) ([]Working, error) {
	return s.listWorking(ctx, `'building' ORDER BY id LIMIT $1`, maxWaiting)
}

// PublishedBuilds lists the n newest builds of a flavour that were published by a builder.
func (s *Store) PublishedBuilds(ctx context.Context, f target.Flavour, n int) ([]Working, error) {
	return s.listWorking(ctx, `'published' AND flavour = $1 AND started_at > 0 ORDER BY id DESC LIMIT $2`, string(f), n)
}
