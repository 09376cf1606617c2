package store_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// testFilters searches for kernels as the page with the matrix does. It uses its own boards, because other tests share
// the database.
func testFilters(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	d := target.Driver{Version: "999.1", Flavour: target.Open}
	digest := "sha256:" + id
	build := func(tx *store.Tx, board string, states ...api.State) error {
		for _, state := range states {
			b, _, err := tx.AddBuild(ctx,
				api.Build{Kernel: target.Kernel{BuildID: id, Board: board}, Driver: d, State: api.Queued, Priority: 1,
					CreatedAt: noon})
			if err != nil {
				return err
			}
			if b.State = state; state != api.Queued {
				if err := tx.SetBuild(ctx, b); err != nil {
					return err
				}
			}
		}
		return nil
	}
	err := s.Write(ctx, func(tx *store.Tx) error {
		for _, board := range []string{"f-fails", "f-mended", "f-waits", "f-yanked"} {
			k := target.Kernel{BuildID: id, Board: board, Milestone: 777, Release: "6.1.58+"}
			if board == "f-waits" {
				k.Release = "5.15.120+"
			}
			if err := tx.PutKernel(ctx, api.Kernel{Kernel: k, SeenAt: noon}); err != nil {
				return err
			}
		}
		for board, states := range map[string][]api.State{
			"f-fails": {api.Cancelled, api.Failed}, "f-mended": {api.Failed, api.Published}, "f-waits": {api.Queued},
		} {
			if err := build(tx, board, states...); err != nil {
				return err
			}
		}
		a := api.Artifact{Digest: digest, Repository: "/r", Fingerprint: "sha256:f", Driver: d, Arch: target.AMD64,
			State:   api.Published,
			Kernels: []target.Kernel{{BuildID: id, Board: "f-yanked"}}, PublishedAt: noon}
		if err := tx.PutArtifact(ctx, a); err != nil {
			return err
		}
		return tx.SetArtifactState(ctx, digest, api.Yanked, "x", noon)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		f    store.KernelFilter
		want []string
	}{
		{store.KernelFilter{BuildID: id}, []string{"f-fails", "f-mended", "f-waits", "f-yanked"}},
		{store.KernelFilter{Milestone: 777, Text: id[:4]}, []string{"f-fails", "f-mended", "f-waits", "f-yanked"}},
		{store.KernelFilter{BuildID: id, Text: "5.15"}, []string{"f-waits"}},
		{store.KernelFilter{BuildID: id, Text: "15.5"}, []string{}},
		{store.KernelFilter{BuildID: id, State: api.Failed}, []string{"f-fails"}},
		{store.KernelFilter{BuildID: id, State: api.Cancelled}, []string{}},
		{store.KernelFilter{BuildID: id, State: api.Queued}, []string{"f-waits"}},
		{store.KernelFilter{BuildID: id, State: api.Yanked}, []string{"f-yanked"}},
		{store.KernelFilter{BuildID: id, State: api.Quarantined}, []string{}},
	} {
		cells, _, err := s.RememberedCells(ctx, row.f, store.Page{Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		got := []string{}
		for _, c := range cells {
			got = append(got, c.Kernel.Board)
		}
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("RememberedCells(%+v) (-want +got):\n%s", row.f, diff)
		}
	}
	next, err := s.NextBuilds(ctx, 1000)
	if err != nil {
		t.Fatal(err)
	}
	inOrder := func(a, b api.Build) int { return min(1, max(-1, (a.Priority-b.Priority)*1_000_000+int(a.ID-b.ID))) }
	if !slices.IsSortedFunc(next, inOrder) ||
		!slices.ContainsFunc(next, func(b api.Build) bool { return b.Kernel.BuildID == id }) {
		t.Errorf("NextBuilds() = %+v; want those that wait, in the order of the queue", next)
	}
	groups, err := s.KernelGroups(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(groups, store.KernelGroup{Board: "f-fails", Milestone: 777, Kernels: 1}) {
		t.Errorf("KernelGroups() = %+v; want one kernel of f-fails", groups)
	}
}
