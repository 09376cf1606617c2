package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

const buildColumns = `id, kernel, driver, flavour, state, phase, worker, attempt, class, error, hint, digest, phases, created_at, started_at, finished_at, beat_at, priority, tries, log_removed_at`

func scanBuild(row func(...any) error) (api.Build, error) {
	var b api.Build
	var kernel, phases string
	var created, started, finished, beat, logRemoved int64
	err := row(&b.ID, &kernel, &b.Driver.Version, &b.Driver.Flavour, &b.State, &b.Phase, &b.Worker, &b.Attempt,
		&b.Class, &b.Error, &b.Hint, &b.Digest, &phases, &created, &started, &finished, &beat, &b.Priority,
		&b.Tries, &logRemoved)
	if err != nil {
		return b, err
	}
	b.CreatedAt, b.StartedAt, b.FinishedAt, b.HeartbeatAt, b.LogRemovedAt =
		timeOf(created), timePtr(started), timePtr(finished), timePtr(beat), timePtr(logRemoved)
	if phases != "[]" {
		err = json.Unmarshal([]byte(phases), &b.Phases)
	}
	for i := range b.Phases { // phases have the only times that come from a builder
		b.Phases[i].Start = encodableTime(b.Phases[i].Start)
	}
	return b, errors.Join(err, json.Unmarshal([]byte(kernel), &b.Kernel))
}

// encodableTime returns a time in UTC, or the zero time if JSON cannot encode it. JSON allows the years 0 to 9999 (RFC
// 3339). A time that was read with an offset can be outside of them in UTC.
func encodableTime(t time.Time) time.Time {
	t = t.UTC()
	if year := t.Year(); year < 0 || year > 9999 {
		return time.Time{}
	}
	return t
}

// withPrefix returns a list of columns with a table's name before each column.
func withPrefix(table, columns string) string {
	return table + "." + strings.ReplaceAll(columns, ", ", ", "+table+".")
}

func builds(ctx context.Context, q querier, tail string, args ...any) ([]api.Build, error) {
	all := []api.Build{}
	err := query(ctx, q, func(row func(...any) error) error {
		b, err := scanBuild(row)
		all = append(all, b)
		return err
	}, `SELECT `+buildColumns+` FROM builds`+tail, args...)
	return all, classify("list the builds", err)
}

// BuildFilter chooses builds. An empty field allows any value.
type BuildFilter struct {
	State          api.State
	BuildID, Board string
	Milestone      int // the milestone of the build's kernel; if the catalogue lacks the kernel, no milestone matches
	Driver         string
	Flavour        target.Flavour
}

// NextBuilds lists the first n waiting builds, in the order in which they will start.
func (s *Store) NextBuilds(ctx context.Context, n int) ([]api.Build, error) {
	return builds(ctx, s.readers, ` WHERE state = 'queued' ORDER BY priority, id LIMIT $1`, n)
}

// Builds lists a page of builds, newest first.
func (s *Store) Builds(ctx context.Context, f BuildFilter, p Page) (all []api.Build, next string, err error) {
	after, err := p.parse(1)
	if err != nil {
		return nil, "", err
	}
	w := &where{}
	addEqual(w, "state", string(f.State))
	addEqual(w, "build_id", f.BuildID)
	addEqual(w, "board", f.Board)
	addEqual(w, "driver", f.Driver)
	addEqual(w, "flavour", string(f.Flavour))
	if f.Milestone != 0 {
		w.and(
			"EXISTS (SELECT 1 FROM kernels k WHERE k.build_id = builds.build_id AND k.board = builds.board AND k.milestone = ?)",
			f.Milestone,
		)
	}
	if after != nil {
		w.and("id < CAST(? AS BIGINT)", after[0])
	}
	all, err = builds(ctx, s.readers, w.String()+` ORDER BY id DESC`+w.limit(p.Limit), w.args...)
	all, next = cut(all, p.Limit, func(b api.Build) []string { return []string{strconv.FormatInt(b.ID, 10)} })
	return all, next, err
}

// OpenBuilds lists every build that is queued or building, oldest first.
func (s *Store) OpenBuilds(ctx context.Context) ([]api.Build, error) {
	return builds(ctx, s.readers, ` WHERE state IN ('queued', 'building') ORDER BY id`)
}

// Build reads one build.
func (s *Store) Build(ctx context.Context, id int64) (api.Build, error) {
	return build(ctx, s.readers, id, "")
}

// Build reads one build and locks its row, so that no other transaction changes it.
func (tx *Tx) Build(ctx context.Context, id int64) (api.Build, error) {
	lock := ""
	if tx.postgres {
		lock = " FOR UPDATE" // with SQLite, each transaction that writes has a lock already
	}
	return build(ctx, tx, id, lock)
}

func build(ctx context.Context, q querier, id int64, lock string) (api.Build, error) {
	b, err := scanBuild(q.QueryRowContext(ctx, `SELECT `+buildColumns+` FROM builds WHERE id = $1`+lock, id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return b, fault.New(fault.NotFound, fmt.Sprintf("build %d does not exist", id),
			"take the number from the list of builds: server builds")
	}
	return b, classify(fmt.Sprintf("read build %d", id), err)
}

// AddBuild stores a new build and returns it with its number. If the cell has an open build, it returns that build
// instead, and added is false.
func (tx *Tx) AddBuild(ctx context.Context, b api.Build) (stored api.Build, added bool, err error) {
	kernel, err := json.Marshal(b.Kernel)
	if err != nil {
		return b, false, fmt.Errorf("encode kernel %s: %w", b.Kernel, err)
	}
	b.Tries = max(b.Tries, 1)
	tx.touch(b.Kernel.String())
	// A unique index allows one open build of a cell. If another transaction has added one, the INSERT returns no row.
	for range 3 {
		err = tx.QueryRowContext(
			ctx,
			`
INSERT INTO builds (build_id, board, kernel, driver, flavour, state, digest, created_at, finished_at, priority, tries)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING RETURNING id`,
			b.Kernel.BuildID,
			b.Kernel.Board,
			string(kernel),
			b.Driver.Version,
			string(b.Driver.Flavour),
			string(b.State),
			b.Digest,
			micros(b.CreatedAt),
			ptrMicros(b.FinishedAt),
			b.Priority,
			b.Tries,
		).Scan(&b.ID)
		if err == nil {
			return b, true, nil
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return b, false, classify("store the build", err)
		}
		open, found, err := tx.openBuild(ctx, b)
		if err != nil || found {
			return open, false, err
		}
		// The open build ended between the two statements, so the loop tries again.
	}
	return b, false, fault.New(fault.Busy, "store the build: the cell's open build keeps changing",
		"send the request again")
}

// BuildBefore returns the newest build of b's cell that is older than b.
func (tx *Tx) BuildBefore(ctx context.Context, b api.Build) (before api.Build, found bool, err error) {
	all, err := builds(ctx, tx, ` WHERE build_id = $1 AND board = $2 AND driver = $3 AND flavour = $4
        AND id < $5 ORDER BY id DESC LIMIT 1`,
		b.Kernel.BuildID, b.Kernel.Board, b.Driver.Version, string(b.Driver.Flavour), b.ID)
	if err != nil || len(all) == 0 {
		return api.Build{}, false, classify("read the previous build", err)
	}
	return all[0], true, nil
}

// openBuild returns the open build of b's cell.
func (tx *Tx) openBuild(ctx context.Context, b api.Build) (api.Build, bool, error) {
	open, err := builds(ctx, tx, ` WHERE build_id = $1 AND board = $2 AND driver = $3 AND flavour = $4
        AND state IN ('queued', 'building')`, b.Kernel.BuildID, b.Kernel.Board, b.Driver.Version, string(b.Driver.Flavour))
	if err != nil || len(open) == 0 {
		return b, false, err
	}
	return open[0], true, nil
}

// SetBuild stores the state of a build, but not its cell, number and creation time. If another build of the cell is
// open, too, the error has kind Busy.
func (tx *Tx) SetBuild(ctx context.Context, b api.Build) error {
	kernel, err := json.Marshal(b.Kernel)
	if err != nil {
		return fmt.Errorf("encode kernel %s: %w", b.Kernel, err)
	}
	phases, err := json.Marshal(append([]timeline.Phase{}, b.Phases...))
	if err != nil {
		return fmt.Errorf("encode phases of build %d: %w", b.ID, err)
	}
	if b.State == api.Queued || b.State == api.Building {
		open, found, err := tx.openBuild(ctx, b)
		if err != nil {
			return err
		}
		if found && open.ID != b.ID {
			return fault.New(
				fault.Busy,
				fmt.Sprintf("store the record of build %d: build %d of the same cell has not ended yet", b.ID, open.ID),
				"",
			)
		}
	}
	tx.touch(b.Kernel.String())
	counted := 0
	err = tx.QueryRowContext(ctx, `
UPDATE builds SET kernel = $2, state = $3, phase = $4, worker = $5, attempt = $6, class = $7, error = $8, hint = $9,
    digest = $10, phases = $11, started_at = $12, finished_at = $13, beat_at = $14, priority = $15, tries = $16,
    log_removed_at = $17 WHERE id = $1 RETURNING counted`,
		b.ID, string(kernel), string(b.State), b.Phase, b.Worker, b.Attempt, b.Class, b.Error, b.Hint, b.Digest,
		string(phases), ptrMicros(b.StartedAt), ptrMicros(b.FinishedAt), ptrMicros(b.HeartbeatAt), b.Priority,
		max(b.Tries, 1), ptrMicros(b.LogRemovedAt)).Scan(&counted)
	if errors.Is(err, sql.ErrNoRows) {
		return nil // the build was removed
	}
	if err != nil {
		return classify(fmt.Sprintf("store the record of build %d", b.ID), err)
	}
	if b.State != api.Failed && b.State != api.Published && counted == 0 {
		return nil // such a change, as each report of a running build, changes no count of failures
	}
	return tx.chooseCounted(ctx, CellKey{b.Kernel.BuildID, b.Kernel.Board, b.Driver})
}

// SkipBuilds ensures that each new build gets a higher number than last. It reports whether that changed the next
// number.
func (s *Store) SkipBuilds(ctx context.Context, last int64) (skipped bool, err error) {
	err = s.Write(ctx, func(tx *Tx) error {
		if tx.postgres {
			low := false
			err := tx.QueryRowContext(ctx, `SELECT COALESCE(pg_sequence_last_value(
pg_get_serial_sequence('builds', 'id')::regclass), 0) < $1`, last).Scan(&low)
			if err != nil || !low { // usually the lock is not needed, and other servers write to the table
				return err
			}
			// This lock waits for the transactions that insert builds, because they change the number, too.
			if _, err := tx.ExecContext(ctx, `LOCK TABLE builds IN SHARE ROW EXCLUSIVE MODE`); err != nil {
				return err
			}
			return query(ctx, tx, func(row func(...any) error) error {
				skipped = true
				return row(new(int64))
			}, `SELECT setval(seq, $1) FROM (SELECT pg_get_serial_sequence('builds', 'id')::regclass AS seq) AS s
WHERE COALESCE(pg_sequence_last_value(seq), 0) < $1`, last)
		}
		// sqlite_sequence has no row for builds before the first insert.
		_, err := tx.ExecContext(ctx, `INSERT INTO sqlite_sequence (name, seq)
SELECT 'builds', 0 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'builds')`)
		if err != nil {
			return err
		}
		done, err := tx.ExecContext(ctx, `UPDATE sqlite_sequence SET seq = $1 WHERE name = 'builds' AND seq < $1`, last)
		if err != nil {
			return err
		}
		n, err := done.RowsAffected()
		skipped = n > 0
		return err
	})
	return skipped, err
}
