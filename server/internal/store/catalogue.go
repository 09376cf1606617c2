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
)

const kernelColumns = `build_id, board, milestone, commit_id, release, version, arch, fingerprint, default_driver, latest_driver, branches, seen_at`

func scanKernel(row func(...any) error) (api.Kernel, error) {
	var k api.Kernel
	var branches string
	var seen int64
	err := row(&k.BuildID, &k.Board, &k.Milestone, &k.Commit, &k.Release, &k.Version, &k.Arch,
		&k.Fingerprint, &k.Default, &k.Latest, &branches, &seen)
	if err != nil {
		return k, err
	}
	k.SeenAt = timeOf(seen)
	if branches != "{}" {
		err = json.Unmarshal([]byte(branches), &k.Branches)
	}
	return k, err
}

// Kernels lists all kernels, newest milestone and BUILD_ID text first; callers
// that show them sort by number.
func (s *Store) Kernels(ctx context.Context) ([]api.Kernel, error) {
	all := []api.Kernel{}
	err := s.query(ctx, func(row func(...any) error) error {
		k, err := scanKernel(row)
		all = append(all, k)
		return err
	}, `SELECT `+kernelColumns+` FROM kernels ORDER BY milestone DESC, build_id DESC, board`)
	return all, trouble("list kernels", err)
}

// Kernel reads one kernel; known is false when the catalogue lacks it.
func (s *Store) Kernel(ctx context.Context, buildID, board string) (k api.Kernel, known bool, err error) {
	k, err = scanKernel(s.db.QueryRowContext(ctx,
		`SELECT `+kernelColumns+` FROM kernels WHERE build_id = $1 AND board = $2`, buildID, board).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return api.Kernel{}, false, nil
	}
	return k, err == nil, trouble("read kernel "+buildID+"/"+board, err)
}

// PutKernel adds a kernel or what is new about it: empty fields leave what is
// stored as it is.
func (s *Store) PutKernel(ctx context.Context, k api.Kernel) error {
	branches, err := json.Marshal(k.Branches)
	if err != nil {
		return fmt.Errorf("encode branches of %s: %w", k, err)
	}
	if len(k.Branches) == 0 {
		branches = []byte("{}")
	}
	_, err = s.db.ExecContext(ctx, `
INSERT INTO kernels (`+kernelColumns+`) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
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
    seen_at        = excluded.seen_at`,
		k.BuildID, k.Board, k.Milestone, k.Commit, k.Release, k.Version, string(k.Arch), string(k.Fingerprint),
		k.Default, k.Latest, string(branches), micros(k.SeenAt))
	return trouble("store kernel "+k.String(), err)
}

// Drivers lists all driver versions in no order that people would like.
func (s *Store) Drivers(ctx context.Context) ([]api.DriverRelease, error) {
	all := []api.DriverRelease{}
	err := s.query(ctx, func(row func(...any) error) error {
		var d api.DriverRelease
		var flavours string
		var seen int64
		if err := row(&d.Version, &flavours, &seen); err != nil {
			return err
		}
		d.Branch, d.SeenAt = target.Branch(d.Version), timeOf(seen)
		all = append(all, d)
		return json.Unmarshal([]byte(flavours), &all[len(all)-1].Flavours)
	}, `SELECT version, flavours, seen_at FROM drivers ORDER BY version`)
	return all, trouble("list drivers", err)
}

// PutDriver adds a driver version, or what is new about it.
func (s *Store) PutDriver(ctx context.Context, d api.DriverRelease) error {
	flavours, err := json.Marshal(append([]target.Flavour{}, d.Flavours...))
	if err != nil {
		return fmt.Errorf("encode flavours of %s: %w", d.Version, err)
	}
	_, err = s.db.ExecContext(ctx, `
INSERT INTO drivers (version, flavours, seen_at) VALUES ($1, $2, $3)
ON CONFLICT (version) DO UPDATE SET
    flavours = CASE WHEN excluded.flavours = '[]' THEN drivers.flavours ELSE excluded.flavours END,
    seen_at  = excluded.seen_at`,
		d.Version, string(flavours), micros(d.SeenAt))
	return trouble("store driver "+d.Version, err)
}

// Artifacts lists artifacts of a driver, or all for the zero driver, newest
// first, with the kernels that each is attested for.
func (s *Store) Artifacts(ctx context.Context, d target.Driver) ([]api.Artifact, error) {
	return s.artifacts(ctx, `$1 = '' OR (driver = $1 AND flavour = $2)`, d.Version, string(d.Flavour))
}

// Artifact reads one artifact.
func (s *Store) Artifact(ctx context.Context, digest string) (api.Artifact, error) {
	all, err := s.artifacts(ctx, `digest = $1`, digest)
	if err != nil {
		return api.Artifact{}, err
	}
	if len(all) == 0 {
		return api.Artifact{}, fault.New(fault.NoArtifact, "artifact "+digest+" is not in the catalogue", "list what is there: server artifacts")
	}
	return all[0], nil
}

func (s *Store) artifacts(ctx context.Context, where string, args ...any) ([]api.Artifact, error) {
	all, at := []api.Artifact{}, map[string]int{}
	err := s.query(ctx, func(row func(...any) error) error {
		var a api.Artifact
		var published int64
		err := row(&a.Digest, &a.Repository, &a.Fingerprint, &a.Driver.Version, &a.Driver.Flavour, &a.Arch,
			&a.Release, &a.State, &a.Reason, &published)
		a.PublishedAt, a.Kernels = timeOf(published), []target.Kernel{}
		at[a.Digest] = len(all)
		all = append(all, a)
		return err
	}, `SELECT digest, repository, fingerprint, driver, flavour, arch, release, state, reason, published_at
        FROM artifacts WHERE `+where+` ORDER BY published_at DESC, digest`, args...)
	if err != nil {
		return nil, trouble("list artifacts", err)
	}
	err = s.query(ctx, func(row func(...any) error) error {
		var digest, raw string
		var k target.Kernel
		if err := row(&digest, &raw); err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(raw), &k); err != nil {
			return err
		}
		if i, ok := at[digest]; ok { // absent: stored between the two reads
			all[i].Kernels = append(all[i].Kernels, k)
		}
		return nil
	}, `SELECT digest, kernel FROM artifact_kernels WHERE digest IN (SELECT digest FROM artifacts WHERE `+where+`)
        ORDER BY digest, build_id, board`, args...)
	return all, trouble("list artifacts", err)
}

// PutArtifact adds an artifact, or adds kernels to one that is there. Digest,
// driver and fingerprint of a stored artifact never change, nor does its
// yanked state: that is SetArtifactState's.
func (s *Store) PutArtifact(ctx context.Context, a api.Artifact) error {
	err := s.inTx(ctx, func(tx *sql.Tx) error {
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
			_, err = tx.ExecContext(ctx, `
INSERT INTO artifact_kernels (digest, build_id, board, kernel) VALUES ($1, $2, $3, $4)
ON CONFLICT (digest, build_id, board) DO UPDATE SET kernel = excluded.kernel`, a.Digest, k.BuildID, k.Board, string(raw))
			if err != nil {
				return err
			}
		}
		return nil
	})
	return trouble("store artifact "+a.Digest, err)
}

// SetArtifactState yanks or unyanks.
func (s *Store) SetArtifactState(ctx context.Context, digest string, state api.State, reason string) error {
	_, err := s.db.ExecContext(ctx, `UPDATE artifacts SET state = $2, reason = $3 WHERE digest = $1`, digest, string(state), reason)
	return trouble("mark artifact "+digest, err)
}
