package store_test

import (
	"context"
	"database/sql"
	"path/filepath"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// TestSkipBuilds checks the numbers of new builds in an empty database and in one that has builds.
func TestSkipBuilds(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]func(*testing.T) string{
		"sqlite":   func(t *testing.T) string { return "sqlite://" + filepath.Join(t.TempDir(), "catalogue.db") },
		"postgres": func(t *testing.T) string { return newPostgres(t, "skip") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := open(t, url(t))
			for _, step := range []struct {
				skip    int64
				skipped bool
				next    int64
			}{{7, true, 8}, {3, false, 9}, {9, false, 10}, {20, true, 21}, {20, false, 22}} {
				skipped, err := s.SkipBuilds(t.Context(), step.skip)
				if err != nil || skipped != step.skipped {
					t.Errorf("SkipBuilds(%d) = %v, %v; want %v", step.skip, skipped, err, step.skipped)
				}
				var b api.Build
				err = s.Write(t.Context(), func(tx *store.Tx) (err error) {
					b, _, err = tx.AddBuild(t.Context(), api.Build{Kernel: target.Kernel{BuildID: "17800.1.0", Board: "lakitu"},
						Driver: target.Driver{Version: "535.261.03", Flavour: target.Open}, State: api.Failed})
					return err
				})
				if err != nil || b.ID != step.next {
					t.Errorf("AddBuild() after SkipBuilds(%d) = build %d, %v; want %d", step.skip, b.ID, err, step.next)
				}
			}
		})
	}
}

// TestSkipBuildsBesideWriter checks that SkipBuilds does not wait for a writer if it has nothing to change.
func TestSkipBuildsBesideWriter(t *testing.T) {
	t.Parallel()
	url := newPostgres(t, "skipping")
	s := open(t, url)
	if _, err := s.SkipBuilds(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback() }()
	if _, err := tx.ExecContext(t.Context(), `LOCK TABLE builds IN ROW EXCLUSIVE MODE`); err != nil { // as an insert does
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	if skipped, err := s.SkipBuilds(ctx, 7); err != nil || skipped {
		t.Errorf("SkipBuilds(7) beside a writer = %v, %v; want nothing to skip, without waiting", skipped, err)
	}
}
