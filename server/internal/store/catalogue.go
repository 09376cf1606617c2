package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func scanDriver(row func(...any) error) (api.DriverRelease, error) {
	var d api.DriverRelease
	var flavours string
	var seen int64
	if err := row(&d.Version, &flavours, &seen); err != nil {
		return d, err
	}
	d.Branch, d.SeenAt = target.Branch(d.Version), timeOf(seen)
	return d, json.Unmarshal([]byte(flavours), &d.Flavours)
}

// Drivers lists a page of driver versions, newest first.
func (s *Store) Drivers(ctx context.Context, p Page) (all []api.DriverRelease, next string, err error) {
	after, err := p.parse(1)
	if err != nil {
		return nil, "", err
	}
	w := &where{}
	if after != nil {
		w.and("sort_key < ?", after[0])
	}
	all = []api.DriverRelease{}
	err = query(ctx, s.readers, func(row func(...any) error) error {
		d, err := scanDriver(row)
		all = append(all, d)
		return err
	}, `SELECT version, flavours, seen_at FROM drivers`+w.String()+` ORDER BY sort_key DESC`+w.limit(p.Limit), w.args...)
	all, next = cut(all, p.Limit, func(d api.DriverRelease) []string { return []string{target.SortKey(d.Version)} })
	return all, next, classify("list the drivers", err)
}

// Driver reads one driver version. An unknown version is not an error: the result has no flavours.
func (s *Store) Driver(ctx context.Context, version string) (api.DriverRelease, error) {
	return remember(s.cache, s.cache.drivers, version, func() (api.DriverRelease, bool, error) {
		d, err := scanDriver(
			s.readers.QueryRowContext(ctx, `SELECT version, flavours, seen_at FROM drivers WHERE version = $1`, version).Scan,
		)
		if errors.Is(err, sql.ErrNoRows) {
			return api.DriverRelease{Version: version, Branch: target.Branch(version)}, false, nil
		}
		return d, true, classify("read driver "+version, err)
	})
}

// PutDriver adds a driver version, or adds facts to a known one.
func (tx *Tx) PutDriver(ctx context.Context, d api.DriverRelease) error {
	flavours, err := json.Marshal(append([]target.Flavour{}, d.Flavours...))
	if err != nil {
		return fmt.Errorf("encode the flavours of driver %s: %w", d.Version, err)
	}
	tx.touch(d.Version)
	_, err = tx.ExecContext(ctx, `
INSERT INTO drivers (version, flavours, seen_at, sort_key) VALUES ($1, $2, $3, $4)
ON CONFLICT (version) DO UPDATE SET
    flavours = CASE WHEN excluded.flavours = '[]' THEN drivers.flavours ELSE excluded.flavours END,
    seen_at  = excluded.seen_at`,
		d.Version, string(flavours), micros(d.SeenAt), target.SortKey(d.Version))
	return classify("store the driver "+d.Version, err)
}

const artifactColumns = `a.digest, a.repository, a.fingerprint, a.driver, a.flavour, a.arch, a.release, a.state, a.reason, a.published_at, a.replacement, a.withdrawn_at`

func scanArtifact(row func(...any) error, more ...any) (api.Artifact, error) {
	var a api.Artifact
	var published, withdrawn int64
	err := row(append([]any{&a.Digest, &a.Repository, &a.Fingerprint, &a.Driver.Version, &a.Driver.Flavour, &a.Arch,
		&a.Release, &a.State, &a.Reason, &published, &a.Replacement, &withdrawn}, more...)...)
	a.PublishedAt, a.WithdrawnAt = timeOf(published), timePtr(withdrawn)
	return a, err
}

// ArtifactFilter chooses artifacts. An empty field allows any value.
type ArtifactFilter struct {
	Digest, Driver string
	Flavour        target.Flavour
	State          api.State
	// BuildID and Board choose the artifacts that are attested for this kernel.
	BuildID, Board string
}

// Artifacts lists a page of artifacts with their kernels, newest first.
func (s *Store) Artifacts(ctx context.Context, f ArtifactFilter, p Page) (all []api.Artifact, next string, err error) {
	all, next, err = artifacts(ctx, s.readers, f, p)
	return all, next, classify("list the artifacts", err)
}

func artifacts(ctx context.Context, q querier, f ArtifactFilter, p Page) (all []api.Artifact, next string, err error) {
	after, err := p.parse(2)
	if err != nil {
		return nil, "", err
	}
	w := &where{}
	addEqual(w, "a.digest", f.Digest)
	addEqual(w, "a.driver", f.Driver)
	addEqual(w, "a.flavour", string(f.Flavour))
	addEqual(w, "a.state", string(f.State))
	if f.BuildID != "" || f.Board != "" {
		k := &where{args: w.args}
		addEqual(k, "build_id", f.BuildID)
		addEqual(k, "board", f.Board)
		w.args = k.args
		w.and("a.digest IN (SELECT digest FROM artifact_kernels" + k.String() + ")")
	}
	if after != nil {
		// The time is a text in the cursor, and a number in the table.
		w.and(
			"a.published_at <= CAST(? AS BIGINT) AND (a.published_at < CAST(? AS BIGINT) OR a.digest > ?)",
			after[0],
			after[0],
			after[1],
		)
	}
	chosen := ` FROM artifacts a` + w.String() + ` ORDER BY a.published_at DESC, a.digest` + w.limit(p.Limit)
	all, at := make([]api.Artifact, 0, p.Limit+1), make(map[string]int, p.Limit+1)
	err = query(ctx, q, func(row func(...any) error) error {
		a, err := scanArtifact(row)
		a.Kernels = make([]target.Kernel, 0, 4) // an artifact often fits some consecutive COS builds
		at[a.Digest] = len(all)
		all = append(all, a)
		return err
	}, `SELECT `+artifactColumns+chosen, w.args...)
	if err != nil {
		return nil, "", err
	}
	known := map[string]target.Kernel{} // each kernel's text occurs for many artifacts and is parsed once
	err = query(ctx, q, func(row func(...any) error) error {
		var digest, raw string
		if err := row(&digest, &raw); err != nil {
			return err
		}
		k, ok := known[raw]
		if !ok {
			if err := json.Unmarshal([]byte(raw), &k); err != nil {
				return err
			}
			known[raw] = k
		}
		if i, ok := at[digest]; ok { // if not ok, the artifact was stored between the two reads
			all[i].Kernels = append(all[i].Kernels, k)
		}
		return nil
	}, `SELECT k.digest, k.kernel FROM (SELECT a.digest`+chosen+
		`) c CROSS JOIN artifact_kernels k WHERE k.digest = c.digest`,
		w.args...)
	for _, a := range all {
		slices.SortFunc(a.Kernels, func(a, b target.Kernel) int {
			return cmp.Or(cmp.Compare(a.BuildID, b.BuildID), cmp.Compare(a.Board, b.Board))
		})
	}
	all, next = cut(all, p.Limit, func(a api.Artifact) []string {
		return []string{strconv.FormatInt(micros(a.PublishedAt), 10), a.Digest}
	})
	return all, next, err
}

// Published reports whether an artifact that is attested for the kernel is published.
func (tx *Tx) Published(ctx context.Context, buildID, board string) (bool, error) {
	var n int
	err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM artifacts a JOIN artifact_kernels t ON t.digest = a.digest
WHERE t.build_id = $1 AND t.board = $2 AND a.state = $3`, buildID, board, string(api.Published)).Scan(&n)
	return n > 0, classify("read the artifacts of "+buildID+"/"+board, err)
}

// Artifact reads one artifact.
func (s *Store) Artifact(ctx context.Context, digest string) (api.Artifact, error) {
	return artifact(ctx, s.readers, digest)
}

// Artifact reads one artifact inside the transaction.
func (tx *Tx) Artifact(ctx context.Context, digest string) (api.Artifact, error) {
	return artifact(ctx, tx, digest)
}

func artifact(ctx context.Context, q querier, digest string) (api.Artifact, error) {
	all, _, err := artifacts(ctx, q, ArtifactFilter{Digest: digest}, Page{Limit: 1})
	if err != nil {
		return api.Artifact{}, classify("read artifact "+digest, err)
	}
	if len(all) == 0 || digest == "" {
		return api.Artifact{}, fault.New(
			fault.NotFound,
			"artifact "+digest+" is not in the catalogue",
			"take the digest from the list of artifacts: server artifacts",
		)
	}
	return all[0], nil
}

// PutArtifact adds an artifact. If the artifact is stored already, PutArtifact only adds kernels.
func (tx *Tx) PutArtifact(ctx context.Context, a api.Artifact) error {
	err := func() error {
		_, err := tx.ExecContext(ctx, `
INSERT INTO artifacts (digest, repository, fingerprint, driver, flavour, arch, release, state, reason, published_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (digest) DO NOTHING`,
			a.Digest, a.Repository, string(a.Fingerprint), a.Driver.Version, string(a.Driver.Flavour), string(a.Arch),
			a.Release, string(a.State), a.Reason, micros(a.PublishedAt))
		if err != nil {
			return err
		}
		for _, k := range a.Kernels {
			raw, err := json.Marshal(k)
			if err != nil {
				return err
			}
			// The cached facts about other kernels with this fingerprint stay. They change only when a builder attests
			// the artifact for such a kernel.
			tx.touch(k.String())
			_, err = tx.ExecContext(ctx, `
INSERT INTO artifact_kernels (digest, build_id, board, kernel, attested_at) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (digest, build_id, board) DO UPDATE SET kernel = excluded.kernel`,
				a.Digest, k.BuildID, k.Board, string(raw), micros(a.PublishedAt))
			if err != nil {
				return err
			}
		}
		return nil
	}()
	return classify("store the artifact "+a.Digest, err)
}

// Withdrawn lists the given number of artifacts that were yanked or quarantined last, without their kernels.
func (s *Store) Withdrawn(ctx context.Context, n int) (all []api.Artifact, err error) {
	err = query(ctx, s.readers, func(row func(...any) error) error {
		a, err := scanArtifact(row)
		all = append(all, a)
		return err
	}, `SELECT `+artifactColumns+` FROM artifacts a WHERE a.state IN ('yanked', 'quarantined')
ORDER BY a.withdrawn_at DESC, a.digest LIMIT $1`, n)
	return all, classify("list the withdrawn artifacts", err)
}

// KernelGroup is the number of kernels of one board and milestone.
type KernelGroup struct {
	Board     string
	Milestone int // 0 means not known yet
	Kernels   int
}

// KernelGroups returns the number of kernels for each milestone and board, newest milestone first.
func (s *Store) KernelGroups(ctx context.Context) (all []KernelGroup, err error) {
	err = query(ctx, s.readers, func(row func(...any) error) error {
		var g KernelGroup
		err := row(&g.Board, &g.Milestone, &g.Kernels)
		all = append(all, g)
		return err
	}, `SELECT board, milestone, COUNT(*) FROM kernels GROUP BY board, milestone ORDER BY milestone DESC, board`)
	return all, classify("count the kernels", err)
}

// SetArtifactState sets an artifact's state and its reason, and removes the replacement. For a withdrawal, it stores
// the given time.
func (tx *Tx) SetArtifactState(
	ctx context.Context,
	digest string,
	state api.State,
	reason string,
	at time.Time,
) error {
	if !state.Withdrawn() {
		at = time.Time{}
	}
	tx.touch("") // all kernels that the artifact is attested for
	_, err := tx.ExecContext(
		ctx,
		`UPDATE artifacts SET state = $2, reason = $3, replacement = '', withdrawn_at = $4 WHERE digest = $1`,
		digest,
		string(state),
		reason,
		micros(at),
	)
	return classify("mark the artifact "+digest, err)
}

// SetRepository stores in which repository an artifact is.
func (tx *Tx) SetRepository(ctx context.Context, digest, repository string) error {
	tx.touch("") // all kernels that the artifact is attested for
	_, err := tx.ExecContext(ctx, `UPDATE artifacts SET repository = $2 WHERE digest = $1`, digest, repository)
	return classify("store the repository of "+digest, err)
}

// SetReplacement stores which artifact replaces a yanked one.
func (tx *Tx) SetReplacement(ctx context.Context, digest, replacement string) error {
	tx.touch("")
	_, err := tx.ExecContext(ctx, `UPDATE artifacts SET replacement = $2 WHERE digest = $1`, digest, replacement)
	return classify("store the replacement of "+digest, err)
}

// DropArtifact removes a published artifact whose manifest was deleted from the repository, and reports whether it
// removed one. A withdrawn artifact stays with its reason and reports: otherwise its cells would be built and published
// again.
func (tx *Tx) DropArtifact(ctx context.Context, repository, digest string) (dropped bool, err error) {
	tx.touch("")
	done, err := tx.ExecContext(ctx,
		`DELETE FROM artifacts WHERE digest = $1 AND repository = $2 AND state = 'published'`, digest, repository)
	if err != nil {
		return false, classify("remove artifact "+digest, err)
	}
	n, err := done.RowsAffected()
	return n > 0, classify("remove artifact "+digest, err)
}

// CountArtifacts counts artifacts by state.
func (s *Store) CountArtifacts(ctx context.Context) (map[api.State]int, error) {
	counts, err := s.count(ctx, "artifacts")
	return counts, classify("count the artifacts", err)
}

func (s *Store) count(ctx context.Context, from string) (map[api.State]int, error) {
	counts := map[api.State]int{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		var state api.State
		var n int
		err := row(&state, &n)
		counts[state] = n
		return err
	}, `SELECT state, COUNT(*) FROM `+from+` GROUP BY state`)
	return counts, err
}
