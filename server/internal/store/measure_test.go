package store_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// testWantedCells checks the number of wanted cells. A cell in two lists must count once, and a cell of a removed list
// must not count.
func testWantedCells(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	const milestone = 4242 // no other test uses this milestone
	k := kernelOf(id)
	k.Milestone = milestone
	var cells []store.WantedCell
	for i := range 2500 { // more than one transaction writes
		d := target.Driver{Version: "996." + time.Duration(i).String(), Flavour: target.Open}
		cells = append(cells, store.WantedCell{CellKey: store.CellKey{BuildID: id, Board: "lakitu", Driver: d}})
	}
	write := func(f func(tx *store.Tx) error) {
		t.Helper()
		if err := s.Write(ctx, f); err != nil {
			t.Fatal(err)
		}
	}
	want := func(cells []store.WantedCell, list string, counts map[api.State]int) {
		t.Helper()
		if err := s.SetWanted(ctx, list, 1, cells); err != nil {
			t.Fatal(err)
		}
		all, err := s.Coverage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(counts, all[milestone]); d != "" {
			t.Errorf("Coverage() after %d cells of %s (-want +got):\n%s", len(cells), list, d)
		}
	}
	write(func(tx *store.Tx) error {
		if err := tx.PutWishList(ctx, "a"+id, "x", 0, noon); err != nil {
			return err
		}
		return tx.PutKernel(ctx, api.Kernel{Kernel: k, SeenAt: noon})
	})
	want(cells, "a"+id, map[api.State]int{api.Unknown: 2500})
	want(cells[:10], "a"+id, map[api.State]int{api.Unknown: 10})
	want(cells[5:12], "removed meanwhile", map[api.State]int{api.Unknown: 10})
	write(func(tx *store.Tx) error { return tx.PutWishList(ctx, "b"+id, "x", 0, noon) })
	want(cells[5:12], "b"+id, map[api.State]int{api.Unknown: 12})

	var waits, runs, ends api.Build
	before := s.Changes()
	write(func(tx *store.Tx) (err error) {
		for i, b := range []*api.Build{&waits, &runs, &ends} {
			*b, _, err = tx.AddBuild(ctx,
				api.Build{Kernel: k, Driver: cells[i].Driver, State: api.Queued, CreatedAt: noon, Priority: 3})
			if err != nil {
				return err
			}
		}
		at := noon.Add(time.Minute)
		runs.State, runs.Worker, runs.StartedAt, runs.HeartbeatAt = api.Building, "w"+id, &noon, &at
		ends.State, ends.Worker, ends.StartedAt, ends.FinishedAt = api.Published, "w"+id, &noon, &at
		if err := tx.SetBuild(ctx, runs); err != nil {
			return err
		}
		if err := tx.SetBuild(ctx, ends); err != nil {
			return err
		}
		return tx.PutArtifact(ctx, api.Artifact{Digest: "sha256:m" + id, Driver: ends.Driver, State: api.Published,
			Kernels: []target.Kernel{k}})
	})
	if s.Changes() == before {
		t.Error("Changes() is the same after a write")
	}
	want(cells[5:12], "b"+id, map[api.State]int{api.Queued: 1, api.Building: 1, api.Published: 1, api.Unknown: 9})
	waiting, err := s.WaitingBuilds(ctx)
	if err != nil || len(waiting) == 0 ||
		waiting[len(waiting)-1] != (store.Waiting{ID: waits.ID, Priority: 3, Flavour: target.Open}) {
		t.Errorf("WaitingBuilds() = %+v, %v; want build %d at the end", waiting, err, waits.ID)
	}
	running, err := s.RunningBuilds(ctx)
	working := store.Working{Worker: "w" + id, Flavour: target.Open, StartedAt: noon, HeartbeatAt: noon.Add(time.Minute)}
	if err != nil || len(running) == 0 || running[len(running)-1] != working {
		t.Errorf("RunningBuilds() = %+v, %v; want %+v at the end", running, err, working)
	}
	working.HeartbeatAt, working.FinishedAt = time.Time{}, noon.Add(time.Minute)
	if ended, err := s.PublishedBuilds(ctx, target.Open, 1); err != nil || len(ended) != 1 || ended[0] != working {
		t.Errorf("PublishedBuilds() = %+v, %v; want %+v", ended, err, working)
	}

	write(func(tx *store.Tx) error { return tx.DropWishList(ctx, "a"+id) })
	want(cells[5:12], "b"+id, map[api.State]int{api.Unknown: 7})
	// A plan for an earlier version of the list must not replace the cells of the present version.
	write(func(tx *store.Tx) error { return tx.PutWishList(ctx, "b"+id, "y", 1, noon) })
	want(cells[20:23], "b"+id, map[api.State]int{api.Unknown: 7})
	if err := s.SetWanted(ctx, "b"+id, 2, cells[20:23]); err != nil {
		t.Fatal(err)
	}
	if all, err := s.Coverage(ctx); err != nil || all[milestone][api.Unknown] != 3 {
		t.Errorf("Coverage() after the plan of version 2 = %v, %v; want 3 cells", all[milestone], err)
	}
}

// testWishListGuard replaces the same version of a wish list many times at once. Only one of the callers may succeed.
func testWishListGuard(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	put := func(text string, version int64, begun func()) error {
		return s.Write(ctx, func(tx *store.Tx) error {
			begun()
			return tx.PutWishList(ctx, "g"+id, text, version, noon)
		})
	}
	if err := put("first", 0, func() {}); err != nil {
		t.Fatal(err)
	}
	errs := make([]error, 8)
	var wait, begun sync.WaitGroup
	begun.Add(len(errs))
	for i := range errs {
		wait.Go(func() {
			errs[i] = put(fmt.Sprint(i), 1, func() {
				begun.Done()
				if strings.HasSuffix(t.Name(), "postgres/guarded") { // with SQLite, only one transaction can write at a time
					begun.Wait()
				}
			})
		})
	}
	wait.Wait()
	stored := 0
	for i, err := range errs {
		switch {
		case err == nil:
			stored++
		case !fault.Is(err, fault.Busy):
			t.Errorf("caller %d: %v; want busy", i, err)
		}
	}
	if l, err := s.WishList(ctx, "g"+id); err != nil || stored != 1 || l.Version != 2 {
		t.Errorf("%d callers replaced version 1, and the list has version %d, %v; want one caller, and version 2", stored,
			l.Version, err)
	}
}
