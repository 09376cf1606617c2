package store_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// testPages reads each list page by page. Each entry must be on exactly one page.
func testPages(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	major, _, _ := strings.Cut(id, ".")
	board := "pages" + major
	err := s.Write(ctx, func(tx *store.Tx) error {
		for _, n := range []int{2, 10, 1, 9, 100} { // numeric order differs from text order
			k := api.Kernel{Kernel: target.Kernel{BuildID: fmt.Sprintf("%s.%d.0", major, n), Board: board}, SeenAt: noon}
			if err := tx.PutKernel(ctx, k); err != nil {
				return err
			}
			a := api.Artifact{Digest: fmt.Sprintf("sha256:page%s.%d", major, n), Driver: driver, State: api.Published,
				PublishedAt: noon,
				Kernels:     []target.Kernel{k.Kernel}}
			if err := tx.PutArtifact(ctx, a); err != nil {
				return err
			}
			if _, _, err := tx.AddBuild(ctx,
				api.Build{Kernel: k.Kernel, Driver: driver, State: api.Queued, CreatedAt: noon}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	lists := map[string]func(p store.Page) (names []string, next string, err error){
		"kernels": func(p store.Page) (names []string, next string, err error) {
			all, next, err := s.Kernels(ctx, store.KernelFilter{Board: board}, p)
			for _, k := range all {
				names = append(names, k.BuildID)
			}
			return names, next, err
		},
		"cells": func(p store.Page) (names []string, next string, err error) {
			all, next, err := s.Cells(ctx, store.KernelFilter{Board: board}, p)
			for _, c := range all {
				if f := c.Facts(driver); f.Newest != nil && len(f.Artifacts) == 1 {
					names = append(names, c.Kernel.BuildID)
				}
			}
			return names, next, err
		},
		"remembered cells": func(p store.Page) (names []string, next string, err error) {
			all, next, err := s.RememberedCells(ctx, store.KernelFilter{Board: board}, p)
			for _, c := range all {
				if f := c.Facts(driver); f.Newest != nil && len(f.Artifacts) == 1 {
					names = append(names, c.Kernel.BuildID)
				}
			}
			return names, next, err
		},
		"artifacts": func(p store.Page) (names []string, next string, err error) {
			all, next, err := s.Artifacts(ctx, store.ArtifactFilter{Board: board}, p)
			for _, a := range all {
				names = append(names, a.Kernels[0].BuildID)
			}
			return names, next, err
		},
		"builds": func(p store.Page) (names []string, next string, err error) {
			all, next, err := s.Builds(ctx, store.BuildFilter{Board: board}, p)
			for _, b := range all {
				names = append(names, b.Kernel.BuildID)
			}
			return names, next, err
		},
	}
	newest := []string{major + ".100.0", major + ".10.0", major + ".9.0", major + ".2.0", major + ".1.0"}
	for name, list := range lists {
		for limit := 1; limit <= 6; limit++ {
			var got []string
			steps := 0
			for after := ""; ; steps++ {
				some, next, err := list(store.Page{After: after, Limit: limit})
				if err != nil || steps > 6 {
					t.Fatalf("%s by %d: %v after %d pages", name, limit, err, steps)
				}
				got = append(got, some...)
				if after = next; after == "" {
					break
				}
			}
			want := newest
			if name == "builds" || name == "artifacts" { // ordered by the build's number, or the digest
				want = slices.Sorted(slices.Values(newest))
				slices.Sort(got)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%s in pages of %d (-want +got):\n%s", name, limit, d)
			}
		}
		if _, _, err := list(store.Page{After: "bm90IG91cnM", Limit: 1}); !fault.Is(err, fault.Usage) {
			t.Errorf("%s after a cursor that is none = %v; want usage", name, err)
		}
	}
}

// testCells checks the facts from which the state of one cell is computed.
func testCells(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	known, sibling := kernelOf(id), kernelOf(id+"1")
	finger := target.Fingerprint("sha256:" + strings.Repeat("c", 64-len(id)) + strings.ReplaceAll(id, ".", "0"))
	d := target.Driver{Version: "998." + strings.ReplaceAll(id, ".", ""), Flavour: target.Open}
	artifact := func(n string, k target.Kernel, at time.Time) api.Artifact {
		return api.Artifact{Digest: "sha256:" + n + id, Fingerprint: finger, Driver: d, State: api.Published, PublishedAt: at,
			Kernels: []target.Kernel{k}}
	}
	var newest api.Build
	err := s.Write(ctx, func(tx *store.Tx) error {
		old, _, err := tx.AddBuild(ctx, api.Build{Kernel: known, Driver: d, State: api.Published, CreatedAt: noon})
		if err != nil {
			return err
		}
		if newest, _, err = tx.AddBuild(ctx,
			api.Build{Kernel: known, Driver: d, State: api.Queued, CreatedAt: noon}); err != nil || newest.ID == old.ID {
			return fmt.Errorf("second build: %d, %w", newest.ID, err)
		}
		for _, a := range []api.Artifact{artifact("a", known, noon), artifact("b", sibling, noon.Add(time.Hour))} {
			if err := tx.PutArtifact(ctx, a); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name        string
		fingerprint target.Fingerprint
		want        []string // the letters after "sha256:", with ! if the artifact is attested for this kernel
	}{
		{"fingerprint unknown: what is attested", "", []string{"a!"}},
		{"fingerprint known: all of it, newest first", finger, []string{"b", "a!"}},
		{"another fingerprint: nothing", "sha256:other", nil},
	}
	for _, row := range rows {
		if err := s.Write(ctx, func(tx *store.Tx) error {
			return tx.PutKernel(ctx, api.Kernel{Kernel: known, Fingerprint: row.fingerprint})
		}); err != nil {
			t.Fatal(err)
		}
		cells, err := s.KernelCells(ctx, id, "lakitu")
		if err != nil {
			t.Fatal(err)
		}
		f := cells.Facts(d)
		var got []string
		for _, a := range f.Artifacts {
			name := a.Digest[7:8]
			if a.Attested {
				name += "!"
			}
			got = append(got, name)
		}
		if diff := cmp.Diff(row.want, got); diff != "" || f.Newest == nil || f.Newest.ID != newest.ID {
			t.Errorf("%s: Facts() has build %v, artifacts (-want +got):\n%s", row.name, f.Newest, diff)
		}
	}
	if cells, err := s.KernelCells(ctx, id, "unknown"); err != nil || cells != nil {
		t.Errorf("KernelCells(unknown) = %v, %v; want none", cells, err)
	}
}

// testCache changes the catalogue in every possible way. With PostgreSQL, another Store makes the changes, as another
// server would. A reader must see each change, although it has a cache.
func testCache(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	other := s
	if second := os.Getenv("PREBAKE_TEST_POSTGRES"); second != "" && strings.HasSuffix(t.Name(), "postgres/remembered") {
		other = open(t, second)
	}
	k := kernelOf(id)
	d := target.Driver{Version: "997." + strings.ReplaceAll(id, ".", ""), Flavour: target.Open}
	artifact := api.Artifact{Digest: "sha256:r" + id, Fingerprint: "sha256:r", Driver: d, State: api.Published,
		Repository: "/r", Kernels: []target.Kernel{k}}
	var b api.Build
	describe := func(cells *store.KernelCells) (text string) {
		text = cells.Kernel.Default
		f := cells.Facts(d)
		for _, a := range f.Artifacts {
			text += " " + string(a.State)
		}
		if f.Newest != nil {
			text += " build " + string(f.Newest.State)
		}
		return text
	}
	state := func(listFirst bool) string { // the second call may use the cache of the first one
		var cells *store.KernelCells
		var page []*store.KernelCells
		one := func() (err error) { cells, err = s.KernelCells(ctx, id, "lakitu"); return err }
		list := func() (err error) {
			page, _, err = s.RememberedCells(ctx, store.KernelFilter{BuildID: id, Board: "lakitu"}, store.Page{Limit: 1})
			return err
		}
		calls := []func() error{one, list}
		if listFirst {
			slices.Reverse(calls)
		}
		for _, call := range calls {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		}
		if cells == nil || len(page) == 0 {
			return "unknown"
		}
		if alone, listed := describe(cells), describe(page[0]); alone != listed {
			return alone + ", but in a list " + listed
		}
		return describe(cells)
	}
	drop := func(tx *store.Tx) error { _, err := tx.DropArtifact(ctx, "/r", artifact.Digest); return err }
	for i, step := range []struct {
		want  string
		write func(tx *store.Tx) error
	}{
		{"unknown", func(*store.Tx) error { return nil }},
		{"1.2", func(tx *store.Tx) error { return tx.PutKernel(ctx, api.Kernel{Kernel: k, Default: "1.2"}) }},
		{"1.3", func(tx *store.Tx) error { return tx.PutKernel(ctx, api.Kernel{Kernel: k, Default: "1.3"}) }},
		{"1.3 build queued", func(tx *store.Tx) (err error) {
			b, _, err = tx.AddBuild(ctx, api.Build{Kernel: k, Driver: d, State: api.Queued})
			return err
		}},
		{"1.3 build failed", func(tx *store.Tx) error { b.State = api.Failed; return tx.SetBuild(ctx, b) }},
		{"1.3 published build failed", func(tx *store.Tx) error { return tx.PutArtifact(ctx, artifact) }},
		{"1.3 yanked build failed", func(tx *store.Tx) error {
			return tx.SetArtifactState(ctx, artifact.Digest, api.Yanked, "x", time.Now())
		}},
		{"1.3 yanked build failed", drop}, // a yanked artifact stays
		{"1.3 published build failed", func(tx *store.Tx) error {
			return tx.SetArtifactState(ctx, artifact.Digest, api.Published, "", time.Now())
		}},
		{"1.3 build failed", drop},
	} {
		state(i%2 == 0) // fills the cache
		if err := other.Write(ctx, step.write); err != nil {
			t.Fatal(err)
		}
		got := state(i%2 == 0)
		for end := time.Now().Add(5 * time.Second); got != step.want && other != s &&
			time.Now().Before(end); got = state(i%2 == 0) {
			time.Sleep(time.Millisecond) // until the notification has arrived
		}
		if got != step.want {
			t.Errorf("after a write, the answer is %q; want %q", got, step.want)
		}
	}
}
