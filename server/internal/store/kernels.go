package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

const kernelColumns = `build_id, board, milestone, commit_id, release, version, arch, fingerprint, default_driver,
latest_driver, branches, gpus, gke, seen_at, first_seen_at`

func scanKernel(row func(...any) error, more ...any) (api.Kernel, error) {
	var k api.Kernel
	var branches, gpus, gke string
	var seen, first int64
	err := row(append([]any{&k.BuildID, &k.Board, &k.Milestone, &k.Commit, &k.Release, &k.Version, &k.Arch,
		&k.Fingerprint, &k.Default, &k.Latest, &branches, &gpus, &gke, &seen, &first}, more...)...)
	if err != nil {
		return k, err
	}
	k.SeenAt, k.FirstSeenAt = timeOf(seen), timeOf(first)
	for _, field := range []struct {
		text, empty string
		to          any
	}{{branches, noMap, &k.Branches}, {gpus, noMap, &k.GPUs}, {gke, noList, &k.GKE}} {
		if field.text != field.empty {
			err = errors.Join(err, json.Unmarshal([]byte(field.text), field.to))
		}
	}
	return k, err
}

// noMap and noList are an empty map and an empty list in the database.
const (
	noMap  = "{}"
	noList = "[]"
)

// KernelFilter chooses kernels. An empty field allows any value.
type KernelFilter struct {
	BuildID, Board string
	Milestone      int
	// State chooses kernels with a cell in this state. Yanked and quarantined are states of an attested artifact; all
	// other states are those of the cell's newest build. Published is not allowed.
	State api.State
	// Text is the beginning of a BUILD_ID or kernel release. It may have only letters, digits and ".+~-", because it
	// becomes part of an SQL pattern.
	Text string
	// GKE is a GKE version or its beginning, such as 1.33. It may have only digits, dots and "-gke.", because it
	// becomes part of an SQL pattern.
	GKE string
}

// gke adds to a query the condition that nodes of the GKE version boot the kernel.
func (f KernelFilter) gke(w *where) {
	switch dots := strings.Count(f.GKE, "."); {
	case f.GKE == "":
	case strings.Contains(f.GKE, "-gke."):
		w.and("gke LIKE ?", `%"`+f.GKE+`"%`)
	case dots == 1:
		w.and("gke LIKE ?", `%"`+f.GKE+`.%`)
	default:
		w.and("gke LIKE ?", `%"`+f.GKE+`-gke.%`)
	}
}

// state adds to a query the condition that the kernel has a cell in the state.
func (f KernelFilter) state(w *where) {
	switch f.State {
	case "":
	case api.Yanked, api.Quarantined:
		w.and(`(build_id, board) IN (SELECT t.build_id, t.board FROM artifacts a CROSS JOIN artifact_kernels t
WHERE a.state = ? AND t.digest = a.digest)`, string(f.State))
	default:
		w.and(`EXISTS (SELECT 1 FROM builds b WHERE b.build_id = kernels.build_id AND b.board = kernels.board AND b.state = ?
AND NOT EXISTS (SELECT 1 FROM builds n WHERE n.build_id = b.build_id AND n.board = b.board AND n.driver = b.driver
AND n.flavour = b.flavour AND n.id > b.id))`, string(f.State))
	}
}

// page returns the query for a page of kernels, newest BUILD_ID first, and its arguments.
func (f KernelFilter) page(columns string, p Page) (text string, args []any, err error) {
	after, err := p.parse(2)
	if err != nil {
		return "", nil, err
	}
	w := &where{}
	addEqual(w, "build_id", f.BuildID)
	addEqual(w, "board", f.Board)
	addEqual(w, "milestone", f.Milestone)
	if f.Text != "" {
		w.and("(build_id LIKE ? OR release LIKE ?)", f.Text+"%", f.Text+"%")
	}
	f.gke(w)
	f.state(w)
	if after != nil {
		w.and("sort_key <= ? AND (sort_key < ? OR board > ?)", after[0], after[0], after[1])
	}
	text = `SELECT ` + columns + ` FROM kernels` + w.String() + ` ORDER BY sort_key DESC, board` + w.limit(p.Limit)
	return text, w.args, nil
}

// AfterKernel returns the cursor of the page that starts after this kernel in lists of kernels.
func AfterKernel(k api.Kernel) string { return cursor(kernelKey(k)...) }

func kernelKey(k api.Kernel) []string { return []string{target.SortKey(k.BuildID), k.Board} }

func kernels(ctx context.Context, q querier, f KernelFilter, p Page) (all []api.Kernel, next string, err error) {
	text, args, err := f.page(kernelColumns, p)
	if err != nil {
		return nil, "", err
	}
	all = []api.Kernel{}
	err = query(ctx, q, func(row func(...any) error) error {
		k, err := scanKernel(row)
		all = append(all, k)
		return err
	}, text, args...)
	all, next = cut(all, p.Limit, kernelKey)
	return all, next, err
}

// Kernels lists a page of kernels, newest BUILD_ID first.
func (s *Store) Kernels(ctx context.Context, f KernelFilter, p Page) (all []api.Kernel, next string, err error) {
	all, next, err = kernels(ctx, s.readers, f, p)
	return all, next, classify("list the kernels", err)
}

// Kernel reads one kernel. It reports whether the catalogue has the kernel.
func (s *Store) Kernel(ctx context.Context, buildID, board string) (k api.Kernel, known bool, err error) {
	return kernel(ctx, s.readers, buildID, board)
}

// Kernel reads one kernel inside the transaction. It reports whether the catalogue has the kernel.
func (tx *Tx) Kernel(ctx context.Context, buildID, board string) (k api.Kernel, known bool, err error) {
	return kernel(ctx, tx, buildID, board)
}

func kernel(ctx context.Context, q querier, buildID, board string) (k api.Kernel, known bool, err error) {
	k, err = scanKernel(q.QueryRowContext(ctx,
		`SELECT `+kernelColumns+` FROM kernels WHERE build_id = $1 AND board = $2`, buildID, board).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return api.Kernel{}, false, nil
	}
	return k, err == nil, classify("read kernel "+buildID+"/"+board, err)
}

// PutKernel adds or changes a kernel. Empty fields do not change stored values.
func (tx *Tx) PutKernel(ctx context.Context, k api.Kernel) error {
	branches, err := encodeMap(k.Branches)
	if err != nil {
		return fmt.Errorf("encode the branches of kernel %s: %w", k, err)
	}
	gpus, err := encodeMap(k.GPUs)
	if err != nil {
		return fmt.Errorf("encode the GPUs of kernel %s: %w", k, err)
	}
	tx.touch(k.String())
	_, err = tx.ExecContext(ctx, `
INSERT INTO kernels (`+kernelColumns+`, sort_key)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $14, '[]', $12, $12, $13)
ON CONFLICT (build_id, board) DO UPDATE SET
    milestone      = CASE WHEN excluded.milestone = 0       THEN kernels.milestone      ELSE excluded.milestone END,
    commit_id      = CASE WHEN excluded.commit_id = ''      THEN kernels.commit_id      ELSE excluded.commit_id END,
    release        = CASE WHEN excluded.release = ''        THEN kernels.release        ELSE excluded.release END,
    version        = CASE WHEN excluded.version = ''        THEN kernels.version        ELSE excluded.version END,
    arch           = CASE WHEN excluded.arch = ''           THEN kernels.arch           ELSE excluded.arch END,
    fingerprint    = CASE WHEN excluded.fingerprint = ''    THEN kernels.fingerprint    ELSE excluded.fingerprint END,
    default_driver = CASE WHEN excluded.default_driver = '' THEN kernels.default_driver ELSE excluded.default_driver END,
    latest_driver  = CASE WHEN excluded.latest_driver = ''  THEN kernels.latest_driver  ELSE excluded.latest_driver END,
    branches       = CASE WHEN excluded.branches = '{}'     THEN kernels.branches       ELSE excluded.branches END,
    gpus           = CASE WHEN excluded.gpus = '{}'         THEN kernels.gpus           ELSE excluded.gpus END,
    seen_at        = excluded.seen_at`,
		k.BuildID, k.Board, k.Milestone, k.Commit, k.Release, k.Version, string(k.Arch), string(k.Fingerprint),
		k.Default, k.Latest, branches, micros(k.SeenAt), target.SortKey(k.BuildID), gpus)
	return classify("store the kernel "+k.String(), err)
}

func encodeMap[T any](m map[string]T) (string, error) {
	if len(m) == 0 {
		return noMap, nil
	}
	text, err := json.Marshal(m)
	return string(text), err
}

// PutGKE replaces the GKE versions of a kernel. If the catalogue lacks the kernel, it does nothing.
func (tx *Tx) PutGKE(ctx context.Context, buildID, board string, versions []string) error {
	text, err := json.Marshal(append([]string{}, versions...))
	if err != nil {
		return fmt.Errorf("encode the GKE versions of kernel %s/%s: %w", buildID, board, err)
	}
	tx.touch(buildID + "/" + board)
	_, err = tx.ExecContext(ctx, `UPDATE kernels SET gke = $1 WHERE build_id = $2 AND board = $3`, string(text), buildID,
		board)
	return classify("store the GKE versions of "+buildID+"/"+board, err)
}
