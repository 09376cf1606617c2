package store

import (
	"context"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// CellKey identifies a cell.
type CellKey struct {
	BuildID, Board string
	Driver         target.Driver
}

// Facts has everything that decides the state of a cell.
type Facts struct {
	// Artifacts are the driver's artifacts with the kernel's fingerprint. If the fingerprint is not known, they are the
	// artifacts that are attested for the kernel.
	Artifacts []Candidate
	// Newest is the newest build of the cell; nil means that there is none.
	Newest *api.Build
}

// Candidate is an artifact that may fit a kernel. Its list of kernels is empty.
type Candidate struct {
	api.Artifact
	// Attested is true if the artifact is attested for this kernel.
	Attested bool
	// AttestedAt is the time of the attestation, or zero if it is not known.
	AttestedAt time.Time
}

// Cells lists a page of kernels with the facts about all of their cells at one moment.
func (s *Store) Cells(ctx context.Context, f KernelFilter, p Page) (all []*KernelCells, next string, err error) {
	text, args, err := f.page("build_id, board, fingerprint", p)
	if err != nil {
		return nil, "", err
	}
	var found []api.Kernel
	var of map[string]map[target.Driver]Facts
	err = s.snapshot(ctx, func(q querier) error {
		if found, next, err = kernels(ctx, q, f, p); err != nil {
			return err
		}
		of, err = facts(ctx, q, text, args)
		return err
	})
	if err != nil {
		return nil, "", classify("read cells", err)
	}
	all = make([]*KernelCells, len(found))
	for i, k := range found {
		all[i] = NewKernelCells(k, of[k.String()])
	}
	return all, next, nil
}

// facts returns the facts about the cells of some kernels, by BUILD_ID/BOARD. The given query returns build_id, board
// and fingerprint of these kernels. Keep the CROSS JOINs: without statistics, SQLite would start with the wrong table.
func facts(ctx context.Context, q querier, from string, args []any) (map[string]map[target.Driver]Facts, error) {
	all := map[string]map[target.Driver]Facts{}
	of := func(k target.Kernel) map[target.Driver]Facts {
		if all[k.String()] == nil {
			all[k.String()] = map[target.Driver]Facts{}
		}
		return all[k.String()]
	}
	err := query(ctx, q, func(row func(...any) error) error {
		var k target.Kernel
		var attested bool
		var at int64
		a, err := scanArtifact(row, &k.BuildID, &k.Board, &attested, &at)
		f := of(k)[a.Driver]
		f.Artifacts = append(f.Artifacts, Candidate{a, attested, timeOf(at)})
		of(k)[a.Driver] = f
		return err
	}, `
SELECT `+artifactColumns+`, k.build_id, k.board, t.digest IS NOT NULL, COALESCE(t.attested_at, 0)
FROM (`+from+`) k CROSS JOIN artifacts a
LEFT JOIN artifact_kernels t ON t.digest = a.digest AND t.build_id = k.build_id AND t.board = k.board
WHERE k.fingerprint <> '' AND a.fingerprint = k.fingerprint
UNION ALL
SELECT `+artifactColumns+`, k.build_id, k.board, TRUE, t.attested_at
FROM (`+from+`) k CROSS JOIN artifact_kernels t CROSS JOIN artifacts a
WHERE k.fingerprint = '' AND t.build_id = k.build_id AND t.board = k.board AND a.digest = t.digest
ORDER BY 10 DESC, 1`, args...)
	if err != nil {
		return nil, err
	}
	err = query(ctx, q, func(row func(...any) error) error {
		b, err := scanBuild(row)
		f := of(b.Kernel)[b.Driver]
		f.Newest = &b
		of(b.Kernel)[b.Driver] = f
		return err
	}, `
SELECT `+withPrefix("b", buildColumns)+` FROM (`+from+`) k CROSS JOIN builds b
WHERE b.build_id = k.build_id AND b.board = k.board AND b.id = (SELECT MAX(n.id) FROM builds n
    WHERE n.build_id = b.build_id AND n.board = b.board AND n.driver = b.driver AND n.flavour = b.flavour)`, args...)
	return all, err
}
