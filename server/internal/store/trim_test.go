package store_test

import (
	"fmt"
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

// testTrim removes old builds of a cell. These builds must stay: the newest ones, the newest one of each state, the
// first failure since the last success, and builds that ended only lately.
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
	build(api.Failed, noon.Add(2*time.Hour)) // ended only lately
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

// testOldLogs marks the builds whose logs may be removed, in several cells. In each cell, the first and the last
// failure since the last success must keep their logs.
func testOldLogs(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	old, now := noon.Add(time.Hour), noon.Add(2*time.Hour)
	var ids, want []int64
	for i, cell := range []string{"F F", "F F* F* F", "F* P*", "F* F* P* F", "F* P* F F* F", "P* F", "F C*",
		"P*", "C*", "F y", "F F* y", "F Q", "Y F", "F C* F C*", "F C* F* C* F", "Y F F", "y F* F"} {
		buildID := fmt.Sprintf("%s%d", id, i)
		for _, letter := range strings.ReplaceAll(cell, " ", "") {
			if letter == '*' { // the build before the asterisk must be marked
				want = append(want, ids[len(ids)-1])
				continue
			}
			state := map[rune]api.State{'F': api.Failed, 'y': api.Failed, 'P': api.Published, 'Y': api.Published,
				'C': api.Cancelled, 'Q': api.Queued}[letter]
			ended := noon
			if letter == 'y' || letter == 'Y' { // ended only lately
				ended = now
			}
			b := add(t, s, buildID)
			_, err := changeBuild(ctx, s, b.ID, func(b *api.Build) error {
				b.State, b.FinishedAt = state, &ended
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, b.ID)
		}
	}
	const absent = 1 << 40
	got, err := s.MarkOldLogs(ctx, append(slices.Clone(ids), absent), old, now)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("MarkOldLogs() (-want +got):\n%s", d)
	}
	for _, id := range ids {
		b, err := s.Build(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if marked := b.LogRemovedAt != nil && b.LogRemovedAt.Equal(now); marked != slices.Contains(want, id) {
			t.Errorf("the log of build %d was removed at %v; want %s: %t", id, b.LogRemovedAt, now, !marked)
		}
	}
	got, err = s.AbsentBuilds(ctx, append(slices.Clone(ids), absent))
	if err != nil || len(got) != 1 || got[0] != absent {
		t.Errorf("AbsentBuilds() = %v, %v; want %d", got, err, int64(absent))
	}
}

// TestOldLogsKeepFacts marks the old logs of 60 kernels. Usually, a transaction that changes so many kernels makes the
// servers drop their whole cache of facts. Here the server must keep its cache until ForgetFacts, and must then show
// that the logs were removed.
func TestOldLogsKeepFacts(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s := open(t, "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
	var ids []int64
	for i := range 60 {
		id := fmt.Sprintf("1.%d.0", i)
		if err := s.Write(ctx, func(tx *store.Tx) error {
			return tx.PutKernel(ctx, api.Kernel{Kernel: kernelOf(id), SeenAt: noon})
		}); err != nil {
			t.Fatal(err)
		}
		b := add(t, s, id)
		_, err := changeBuild(ctx, s, b.ID, func(b *api.Build) error {
			b.State, b.FinishedAt = api.Published, &noon
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, b.ID)
	}
	facts := func() *store.KernelCells {
		t.Helper()
		cells, err := s.KernelCells(ctx, "1.7.0", "lakitu")
		if err != nil || cells == nil {
			t.Fatalf("KernelCells() = %v, %v", cells, err)
		}
		return cells
	}
	before, now := facts(), noon.Add(2*time.Hour)
	if marked, err := s.MarkOldLogs(ctx, ids, noon.Add(time.Hour), now); err != nil || len(marked) != len(ids) {
		t.Fatalf("MarkOldLogs() = %d builds, %v; want %d", len(marked), err, len(ids))
	}
	if facts() != before {
		t.Error("MarkOldLogs() made the server read the facts about a kernel again; want the remembered ones")
	}
	if err := s.ForgetFacts(ctx); err != nil {
		t.Fatal(err)
	}
	if at := facts().Facts(driver).Newest.LogRemovedAt; at == nil || !at.Equal(now) {
		t.Errorf("after ForgetFacts(), the log was removed at %v; want %s", at, now)
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
	n, err := logs.Trim(noon, func(builds []int64) ([]int64, error) {
		if d := cmp.Diff([]int64{1, 2, 4}, slices.Sorted(slices.Values(builds))); d != "" {
			t.Errorf("builds with old logs (-want +got):\n%s", d)
		}
		return []int64{1, 4}, nil
	})
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
