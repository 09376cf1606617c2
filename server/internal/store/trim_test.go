package store_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/server/internal/store"
)

// testTrim removes the old builds of a cell. The newest builds, the newest of each state, the first failure since the
// last success, and young builds must stay.
func testTrim(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	var ids []int64
	build := func(state api.State, ended time.Time) {
		t.Helper()
		b := add(t, s, id)
		_, err := changeBuild(ctx, s, b.ID, func(b *api.Build) error {
			b.State = state
			if state != api.Queued {
				b.FinishedAt = &ended
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, b.ID)
	}
	build(api.Failed, noon)
	build(api.Published, noon)
	build(api.Cancelled, noon)
	build(api.Failed, noon) // the first failure since the last success
	build(api.Failed, noon)
	build(api.Failed, noon.Add(2*time.Hour)) // young
	for len(ids) < 10+store.KeptBuilds-1 {
		build(api.Failed, noon)
	}
	build(api.Queued, noon)
	n, err := s.TrimBuilds(ctx, noon.Add(time.Hour))
	if err != nil || n < 6 { // other tests may have old builds
		t.Errorf("TrimBuilds() = %d, %v; want 6 or more", n, err)
	}
	all, _, err := s.Builds(ctx, store.BuildFilter{BuildID: id}, page)
	if err != nil {
		t.Fatal(err)
	}
	var got []int64
	for _, b := range all {
		got = append(got, b.ID)
	}
	want := slices.Concat(ids[1:4], ids[5:6], ids[10:])
	slices.Reverse(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("builds that stay (-want +got):\n%s", d)
	}
	if n, err := s.TrimBuilds(ctx, noon.Add(time.Hour)); err != nil || n != 0 {
		t.Errorf("TrimBuilds() again = %d, %v; want 0", n, err)
	}
}

func TestTrimLogs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs, err := store.OpenLogs(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	for name, age := range map[string]time.Duration{
		"1.log": time.Hour, "2.log": time.Hour, "3.log": -time.Hour, "4.live": time.Hour, "notes.txt": time.Hour,
	} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, noon, noon.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	n, err := logs.Trim(noon, func(build int64) (bool, error) { return build != 2, nil })
	if err != nil || n != 2 {
		t.Errorf("Trim() = %d, %v; want 2", n, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if got, want := strings.Join(left, " "), "2.log 3.log notes.txt"; got != want {
		t.Errorf("after Trim(), the folder has %s; want %s", got, want)
	}
}
