package store_test

import (
	"database/sql"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/server/internal/store"
)

// TestTriesOfOldBuilds opens a catalogue that was written before builds had tries. Each failed build must get its
// number since the last published one.
func TestTriesOfOldBuilds(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "catalogue.db")
	s, err := store.Open(t.Context(), "sqlite://"+file)
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range []api.State{api.Failed, api.Failed, api.Published, api.Failed, api.Cancelled, api.Failed} {
		b := add(t, s, "1.2.3")
		if _, err := changeBuild(t.Context(), s, b.ID, func(b *api.Build) error { b.State = state; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(t.Context(),
		`ALTER TABLE builds DROP COLUMN tries; DELETE FROM goose_db_version WHERE version_id = 11`)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	all, _, err := open(t, "sqlite://"+file).Builds(t.Context(), store.BuildFilter{}, page)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for _, b := range all {
		got = append(got, b.Tries)
	}
	if d := cmp.Diff([]int{2, 1, 1, 1, 2, 1}, got); d != "" { // the newest comes first
		t.Errorf("tries (-want +got):\n%s", d)
	}
}
