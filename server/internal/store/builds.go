package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

const buildColumns = `id, kernel, driver, flavour, state, phase, worker, attempt, class, error, hint, digest, phases, created_at, started_at, finished_at`

func scanBuild(row func(...any) error) (api.Build, error) {
	var b api.Build
	var kernel, phases string
	var created, started, finished int64
	err := row(&b.ID, &kernel, &b.Driver.Version, &b.Driver.Flavour, &b.State, &b.Phase, &b.Worker, &b.Attempt,
		&b.Class, &b.Error, &b.Hint, &b.Digest, &phases, &created, &started, &finished)
	if err != nil {
		return b, err
	}
	b.CreatedAt, b.StartedAt, b.FinishedAt = timeOf(created), timePtr(started), timePtr(finished)
	if phases != "[]" {
		err = json.Unmarshal([]byte(phases), &b.Phases)
	}
	return b, errors.Join(err, json.Unmarshal([]byte(kernel), &b.Kernel))
}

func (s *Store) builds(ctx context.Context, tail string, args ...any) ([]api.Build, error) {
	all := []api.Build{}
	err := s.query(ctx, func(row func(...any) error) error {
		b, err := scanBuild(row)
		all = append(all, b)
		return err
	}, `SELECT `+buildColumns+` FROM builds `+tail, args...)
	return all, trouble("list builds", err)
}

// Builds lists the newest builds in this state (or in any, for ""), newest
// first, at most limit.
func (s *Store) Builds(ctx context.Context, state api.State, limit int) ([]api.Build, error) {
	return s.builds(ctx, `WHERE $1 = '' OR state = $1 ORDER BY id DESC LIMIT $2`, string(state), limit)
}

// OpenBuilds lists every build that is queued or building, oldest first.
func (s *Store) OpenBuilds(ctx context.Context) ([]api.Build, error) {
	return s.builds(ctx, `WHERE state IN ('queued', 'building') ORDER BY id`)
}

// NewestBuilds lists the newest build of every cell.
func (s *Store) NewestBuilds(ctx context.Context) ([]api.Build, error) {
	return s.builds(ctx, `WHERE id IN (SELECT MAX(id) FROM builds GROUP BY build_id, board, driver, flavour) ORDER BY id DESC`)
}

// NewestBuild reads the newest build of one cell; nil when there is none.
func (s *Store) NewestBuild(ctx context.Context, buildID, board string, d target.Driver) (*api.Build, error) {
	all, err := s.builds(ctx, `WHERE build_id = $1 AND board = $2 AND driver = $3 AND flavour = $4 ORDER BY id DESC LIMIT 1`,
		buildID, board, d.Version, string(d.Flavour))
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return &all[0], nil
}

// Build reads one build.
func (s *Store) Build(ctx context.Context, id int64) (api.Build, error) {
	b, err := scanBuild(s.db.QueryRowContext(ctx, `SELECT `+buildColumns+` FROM builds WHERE id = $1`, id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return b, noBuild(id)
	}
	return b, trouble(fmt.Sprintf("read build %d", id), err)
}

func noBuild(id int64) error {
	return fault.New(fault.InputMissing, fmt.Sprintf("build %d does not exist", id), "list builds: server builds")
}

// AddBuild stores a new build and returns it with its number. When the cell
// has an open build already, that one is returned and added is false.
func (s *Store) AddBuild(ctx context.Context, b api.Build) (stored api.Build, added bool, err error) {
	kernel, err := json.Marshal(b.Kernel)
	if err != nil {
		return b, false, fmt.Errorf("encode kernel %s: %w", b.Kernel, err)
	}
	// The unique index over open builds decides; a lost race shows as no row.
	for range 3 {
		err = s.db.QueryRowContext(ctx, `
INSERT INTO builds (build_id, board, kernel, driver, flavour, state, digest, created_at, finished_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING RETURNING id`,
			b.Kernel.BuildID, b.Kernel.Board, string(kernel), b.Driver.Version, string(b.Driver.Flavour), string(b.State), b.Digest,
			micros(b.CreatedAt), ptrMicros(b.FinishedAt)).Scan(&b.ID)
		if err == nil {
			return b, true, nil
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return b, false, trouble("store build", err)
		}
		open, err := s.builds(ctx, `WHERE build_id = $1 AND board = $2 AND driver = $3 AND flavour = $4
            AND state IN ('queued', 'building')`, b.Kernel.BuildID, b.Kernel.Board, b.Driver.Version, string(b.Driver.Flavour))
		if err != nil {
			return b, false, err
		}
		if len(open) > 0 {
			return open[0], false, nil
		}
		// It was finished between the two statements: try once more.
	}
	return b, false, fault.New(fault.Busy, "store build: the cell's open build keeps changing", "ask again")
}

// ChangeBuild reads a build, lets change decide on the new one, and stores
// that, in one transaction that no other change of the build can cross.
func (s *Store) ChangeBuild(ctx context.Context, id int64, change func(*api.Build) error) (api.Build, error) {
	var b api.Build
	lockRow := ""
	if s.postgres {
		lockRow = " FOR UPDATE" // SQLite's immediate transaction is a lock already
	}
	var refused error
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		var err error
		b, err = scanBuild(tx.QueryRowContext(ctx, `SELECT `+buildColumns+` FROM builds WHERE id = $1`+lockRow, id).Scan)
		if errors.Is(err, sql.ErrNoRows) {
			refused = noBuild(id)
			return refused
		}
		if err != nil {
			return err
		}
		if refused = change(&b); refused != nil {
			return refused
		}
		kernel, err := json.Marshal(b.Kernel)
		if err != nil {
			return err
		}
		phases, err := json.Marshal(append([]timeline.Phase{}, b.Phases...))
		if err != nil {
			return err
		}
		if b.State == api.Queued || b.State == api.Building {
			var other int64
			err := tx.QueryRowContext(ctx, `SELECT id FROM builds WHERE build_id = $1 AND board = $2 AND driver = $3 AND flavour = $4
                AND state IN ('queued', 'building') AND id <> $5`,
				b.Kernel.BuildID, b.Kernel.Board, b.Driver.Version, string(b.Driver.Flavour), id).Scan(&other)
			if err == nil {
				refused = fault.New(fault.Busy, fmt.Sprintf("build %d cannot be opened: build %d of the same cell is open", id, other), "")
				return refused
			}
			if !errors.Is(err, sql.ErrNoRows) {
				return err
			}
		}
		_, err = tx.ExecContext(ctx, `
UPDATE builds SET kernel = $2, state = $3, phase = $4, worker = $5, attempt = $6, class = $7, error = $8, hint = $9,
    digest = $10, phases = $11, started_at = $12, finished_at = $13 WHERE id = $1`,
			id, string(kernel), string(b.State), b.Phase, b.Worker, b.Attempt, b.Class, b.Error, b.Hint, b.Digest,
			string(phases), ptrMicros(b.StartedAt), ptrMicros(b.FinishedAt))
		return err
	})
	if refused != nil {
		return b, refused
	}
	return b, trouble(fmt.Sprintf("change build %d", id), err)
}

// CountBuilds counts builds by state.
func (s *Store) CountBuilds(ctx context.Context) (map[api.State]int, error) {
	counts := map[api.State]int{}
	err := s.query(ctx, func(row func(...any) error) error {
		var state api.State
		var n int
		err := row(&state, &n)
		counts[state] = n
		return err
	}, `SELECT state, COUNT(*) FROM builds GROUP BY state`)
	return counts, trouble("count builds", err)
}

// CountArtifacts counts artifacts by state.
func (s *Store) CountArtifacts(ctx context.Context) (map[api.State]int, error) {
	counts := map[api.State]int{}
	err := s.query(ctx, func(row func(...any) error) error {
		var state api.State
		var n int
		err := row(&state, &n)
		counts[state] = n
		return err
	}, `SELECT state, COUNT(*) FROM artifacts GROUP BY state`)
	return counts, trouble("count artifacts", err)
}
