package store_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// testReports stores reports of nodes, counts them and removes them.
func testReports(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	const day = 24 * time.Hour
	digest, k := "sha256:said"+id, kernelOf(id)
	write := func(f func(tx *store.Tx) error) error { return s.Write(ctx, f) }
	put := func(node int, outcome api.Outcome, class, source string, at time.Time) error {
		r := api.NodeReport{BuildID: id, Board: "lakitu", Digest: digest, Outcome: outcome, Class: class,
			Node: fmt.Sprint(node)}
		return write(func(tx *store.Tx) error { return tx.PutReport(ctx, r, source, at, at.Add(-day)) })
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := put(1, api.Loaded, "", "a", noon); err == nil {
		t.Error("PutReport(of no artifact) = nil; want an error")
	}
	check(write(func(tx *store.Tx) error {
		return tx.PutArtifact(ctx,
			api.Artifact{Digest: digest, Repository: "/said", State: api.Published, Kernels: []target.Kernel{k}})
	}))
	check(put(1, api.NotLoad, "rejected", "a", noon))
	check(put(2, api.NotLoad, "rejected", "a", noon))
	check(put(3, api.FellBack, "unusable", "b", noon.Add(time.Hour)))
	check(put(2, api.Loaded, "", "a", noon.Add(2*time.Hour))) // replaces the former report of this node
	said := func(since time.Time) (all []store.OutcomeCount) {
		t.Helper()
		check(write(func(tx *store.Tx) (err error) { all, err = tx.OutcomeCounts(ctx, digest, since, noon); return err }))
		return all
	}
	want := []store.OutcomeCount{{"a", api.NotLoad, "rejected", 1, 0}, {"a", api.Loaded, "", 1, 1},
		{"b", api.FellBack, "unusable", 1, 1}}
	if d := cmp.Diff(want, said(noon.Add(-1))); d != "" {
		t.Errorf("OutcomeCounts() (-want +got):\n%s", d)
	}
	if d := cmp.Diff(want[1:], said(noon)); d != "" {
		t.Errorf("OutcomeCounts(after the first) (-want +got):\n%s", d)
	}
	check(write(func(tx *store.Tx) error { return tx.IgnoreFailuresBefore(ctx, digest, noon.Add(2*time.Hour)) }))
	if d := cmp.Diff(want[1:2], said(noon.Add(-1))); d != "" {
		t.Errorf("OutcomeCounts(judged from two o'clock) (-want +got):\n%s", d)
	}
	counts := []api.ReportCounts{{BuildID: id, Board: "lakitu", Digest: digest, Loaded: 1, Failed: 1, FellBack: 1,
		LastAt: noon.Add(2 * time.Hour)}}
	for _, ask := range [][3]string{{digest, "", ""}, {"", id, ""}, {"", id, "lakitu"}} {
		got, err := s.Reports(ctx, ask[0], ask[1], ask[2], 10)
		check(err)
		if d := cmp.Diff(counts, got); d != "" {
			t.Errorf("Reports(%v) (-want +got):\n%s", ask, d)
		}
	}
	// A client may invent nodes. Its reports must not fill the disk, and reports from other networks must still be stored.
	check(write(func(tx *store.Tx) error {
		for i := range store.MaxReports - 2 {
			r := api.NodeReport{BuildID: id, Board: "lakitu", Digest: digest, Outcome: api.Loaded,
				Node: fmt.Sprint("made up ", i)}
			if err := tx.PutReport(ctx, r, "a", noon, noon.Add(-day)); err != nil {
				return err
			}
		}
		return nil
	}))
	if err := put(5, api.Loaded, "", "a", noon); !fault.Is(err, fault.TooMany) {
		t.Errorf("PutReport(beyond the bound) = %v; want too-many", err)
	}
	check(put(7, api.Loaded, "", "a", noon.Add(day+time.Hour))) // a day later, this network may report a new node again
	check(put(7, api.Loaded, "", "c", noon.Add(2*time.Hour)))
	check(put(2, api.Loaded, "", "a", noon.Add(3*time.Hour))) // from a node that has reported before
	check(put(6, api.Loaded, "", "c", noon.Add(3*time.Hour)))

	check(s.ForgetReports(ctx, noon.Add(3*time.Hour)))
	counts[0] = api.ReportCounts{BuildID: id, Board: "lakitu", Digest: digest, Loaded: 2, LastAt: noon.Add(3 * time.Hour)}
	got, err := s.Reports(ctx, digest, "", "", 10)
	check(err)
	if d := cmp.Diff(counts, got); d != "" {
		t.Errorf("Reports() after the old ones are forgotten (-want +got):\n%s", d)
	}
	check(write(func(tx *store.Tx) error { _, err := tx.DropArtifact(ctx, "/said", digest); return err }))
	if got, err := s.Reports(ctx, digest, "", "", 10); err != nil || len(got) != 0 {
		t.Errorf("Reports() of an artifact that is gone = %v, %v; want none", got, err)
	}
}
