package store_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// testWarnings lets a build of an early-warning entry fail. The failure must be listed as a warning, and must not count
// as a failure. The warning must end when the cell is published, or when an entry without earlyWarning wants the cell.
func testWarnings(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	const milestone = 4343 // no other test uses this milestone
	k := kernelOf(id)
	k.Milestone = milestone
	d := target.Driver{Version: "997.1.1", Flavour: target.Open}
	cell := store.WantedCell{CellKey: store.CellKey{BuildID: id, Board: "lakitu", Driver: d}, Early: true}
	write := func(f func(tx *store.Tx) error) {
		t.Helper()
		if err := s.Write(ctx, f); err != nil {
			t.Fatal(err)
		}
	}
	set := func(list string, cells ...store.WantedCell) {
		t.Helper()
		if err := s.SetWanted(ctx, list, 1, cells); err != nil {
			t.Fatal(err)
		}
	}
	failures := func() int {
		t.Helper()
		n, err := s.CountFailures(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return n["check-failed"]
	}
	before := failures()
	end := func(state api.State, text string, at time.Time) api.Build {
		t.Helper()
		b, _, err := addBuild(ctx, s,
			api.Build{Kernel: k, Driver: d, State: api.Queued, CreatedAt: at, Priority: queue.PriorityWarning})
		if err != nil {
			t.Fatal(err)
		}
		if state == api.Queued {
			return b
		}
		b.State, b.FinishedAt = state, &at
		if state == api.Failed {
			b.Class, b.Error = "check-failed", text
		}
		write(func(tx *store.Tx) error { return tx.SetBuild(ctx, b) })
		return b
	}
	check := func(when string, counted int, covered bool, want ...api.Warning) {
		t.Helper()
		all, err := s.Warnings(ctx)
		all = slices.DeleteFunc(all, func(w api.Warning) bool { return w.Kernel.BuildID != id })
		if d := cmp.Diff(append([]api.Warning{}, want...), all); d != "" || err != nil {
			t.Errorf("%s: Warnings() %v (-want +got):\n%s", when, err, d)
		}
		if n := failures() - before; n != counted {
			t.Errorf("%s: CountFailures() has %d more; want %d", when, n, counted)
		}
		if c, err := s.Coverage(ctx); err != nil || (c[milestone] != nil) != covered {
			t.Errorf("%s: Coverage() of the milestone = %v, %v; want any: %t", when, c[milestone], err, covered)
		}
	}
	hour := func(n int) time.Time { return noon.Add(time.Duration(n) * time.Hour) }
	told := func(b api.Build, text string, since, last int) api.Warning {
		return api.Warning{Kernel: k, Driver: d, Class: "check-failed", Error: text, Build: b.ID, Since: hour(since),
			LastSeenAt: hour(last)}
	}
	write(func(tx *store.Tx) error {
		for _, list := range []string{"early" + id, "wanted" + id} {
			if err := tx.PutWishList(ctx, list, "x", 0, noon); err != nil {
				return err
			}
		}
		return tx.PutKernel(ctx, api.Kernel{Kernel: k, SeenAt: noon})
	})
	set("early"+id, cell)
	check("nothing built", 0, false)
	end(api.Failed, "nv.c:1: error: one\nand more", hour(0))
	end(api.Published, "", hour(1))
	check("published", 0, false)
	end(api.Failed, "nv.c:2: error: two", hour(2))
	b := end(api.Failed, "nv.c:3: error: three\nand more", hour(3))
	end(api.Cancelled, "", hour(4))
	check("failed twice", 0, false, told(b, "nv.c:3: error: three", 2, 3))
	open := end(api.Queued, "", hour(5))
	check("tried again", 0, false, told(b, "nv.c:3: error: three", 2, 3))
	open.State = api.Cancelled
	write(func(tx *store.Tx) error { return tx.SetBuild(ctx, open) })

	normal := cell
	normal.Early = false
	set("wanted"+id, normal)
	check("wanted for real by another list", 2, true)
	set("wanted" + id)
	check("no longer", 0, false, told(b, "nv.c:3: error: three", 2, 3))
	set("early"+id, normal)
	check("released", 2, true)
	set("early"+id, cell)
	write(func(tx *store.Tx) error {
		return tx.PutArtifact(ctx,
			api.Artifact{Digest: "sha256:e" + id, Driver: d, State: api.Published, Kernels: []target.Kernel{k}})
	})
	check("published by somebody else", 0, false)
	write(func(tx *store.Tx) error { return tx.DropWishList(ctx, "early"+id) })
	check("nobody wants it", 0, false)
}
