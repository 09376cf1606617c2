package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

const wishColumns = `name, text, version, changed_at, planned_at, cells, problems`

func scanWishList(row func(...any) error) (api.WishList, error) {
	var l api.WishList
	var changed, planned int64
	var problems string
	if err := row(&l.Name, &l.Text, &l.Version, &changed, &planned, &l.Cells, &problems); err != nil {
		return l, err
	}
	l.ChangedAt, l.PlannedAt = timeOf(changed), timePtr(planned)
	return l, json.Unmarshal([]byte(problems), &l.Problems)
}

// WishLists lists all wish lists, sorted by name.
func (s *Store) WishLists(ctx context.Context) ([]api.WishList, error) {
	all := []api.WishList{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		l, err := scanWishList(row)
		all = append(all, l)
		return err
	}, `SELECT `+wishColumns+` FROM wish_lists ORDER BY name`)
	return all, classify("list the wish lists", err)
}

// WishList reads one wish list.
func (s *Store) WishList(ctx context.Context, name string) (api.WishList, error) {
	l, err := scanWishList(
		s.readers.QueryRowContext(ctx, `SELECT `+wishColumns+` FROM wish_lists WHERE name = $1`, name).Scan,
	)
	if errors.Is(err, sql.ErrNoRows) {
		return l, noWishList(name)
	}
	return l, classify("read wish list "+name, err)
}

func noWishList(name string) error {
	return fault.New(fault.NotFound, fmt.Sprintf("wish list %q does not exist", name),
		"take the name from the list of wish lists: server wish-lists")
}

// PutWishList stores a text as the newest version of a wish list. If version is not 0, it must be the stored version,
// so that two people cannot overwrite each other's changes.
func (tx *Tx) PutWishList(ctx context.Context, name, text string, version int64, at time.Time) error {
	stored, err := tx.lockWishList(ctx, name)
	if err != nil {
		return err
	}
	if version != 0 && version != stored {
		return fault.New(
			fault.Busy,
			fmt.Sprintf("wish list %q has version %d now, not %d", name, stored, version),
			"read the wish list again, and send your change with the new version number",
		)
	}
	_, err = tx.ExecContext(ctx, `
INSERT INTO wish_lists (name, text, version, changed_at) VALUES ($1, $2, 1, $3)
ON CONFLICT (name) DO UPDATE SET text = excluded.text, version = wish_lists.version + 1, changed_at = excluded.changed_at,
    planned_at = 0, problems = '[]'`, name, text, micros(at))
	return classify("store the wish list "+name, err)
}

// lockWishList returns the version of a wish list, or 0 if it does not exist. No other transaction changes the list
// until the end of this one.
func (tx *Tx) lockWishList(ctx context.Context, name string) (version int64, err error) {
	text := `SELECT version FROM wish_lists WHERE name = $1`
	if tx.postgres {
		text += ` FOR UPDATE` // with SQLite, each transaction that writes has a lock already
	}
	err = tx.QueryRowContext(ctx, text, name).Scan(&version)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return version, classify("read wish list "+name, err)
}

// DropWishList removes a wish list. Its artifacts stay.
func (tx *Tx) DropWishList(ctx context.Context, name string) error {
	done, err := tx.ExecContext(ctx, `DELETE FROM wish_lists WHERE name = $1`, name)
	if err != nil {
		return classify("remove wish list "+name, err)
	}
	if n, err := done.RowsAffected(); err == nil && n == 0 {
		return noWishList(name)
	}
	return nil
}

// PlannedWishList stores the result of planning one version of a wish list.
func (tx *Tx) PlannedWishList(ctx context.Context, l api.WishList) error {
	problems, err := json.Marshal(append([]string{}, l.Problems...))
	if err != nil {
		return fmt.Errorf("encode problems of wish list %s: %w", l.Name, err)
	}
	_, err = tx.ExecContext(
		ctx,
		`UPDATE wish_lists SET planned_at = $3, cells = $4, problems = $5 WHERE name = $1 AND version = $2`,
		l.Name,
		l.Version,
		ptrMicros(l.PlannedAt),
		l.Cells,
		string(problems),
	)
	return classify("store the plan of wish list "+l.Name, err)
}

// ReadyTimes returns how long cells took from the discovery of their kernel to publication, shortest first. It includes
// the cells published after the given time, except artifacts older than their kernel's record.
func (s *Store) ReadyTimes(ctx context.Context, since time.Time) ([]time.Duration, error) {
	var all []time.Duration
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var us int64
		err := row(&us)
		all = append(all, time.Duration(us)*time.Microsecond)
		return err
	}, `
SELECT t.attested_at - k.first_seen_at FROM artifact_kernels t
JOIN kernels k ON k.build_id = t.build_id AND k.board = t.board
WHERE t.attested_at > $1 AND k.first_seen_at > 0 AND t.attested_at >= k.first_seen_at ORDER BY 1`, micros(since))
	return all, classify("read ready times", err)
}
