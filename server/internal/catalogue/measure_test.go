package catalogue_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

// TestCoverageIsWhatResolveSays checks that Coverage, which counts the states of all cells in the database, agrees with
// Resolve, which computes the state of one cell.
func TestCoverageIsWhatResolveSays(t *testing.T) {
	t.Parallel()
	c, _ := open(t)
	ctx := t.Context()
	ids := map[string]target.Fingerprint{"17800.0.1": fingerA, "17800.0.2": fingerA, "17800.0.3": "", "17800.0.4": fingerB}
	for id, f := range ids {
		k := api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "lakitu", Milestone: 109}, Fingerprint: f, Default: "535.1"}
		if err := c.RecordKernel(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	drivers := []string{"535.1", "535.2", "535.3", "535.4", "535.5", "535.6", "620.1"}
	text := fmt.Sprintf("version: 1\nkernels:\n  - {milestone: 109, latest: 9}\ndrivers: [%q, %q, %q, %q, %q, %q, "+
		"%q]\nflavours: [open, proprietary]\n",
		drivers[0], drivers[1], drivers[2], drivers[3], drivers[4], drivers[5], drivers[6])
	if _, err := c.PutWishList(ctx, "all", text, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Plan(ctx); err != nil {
		t.Fatal(err)
	}
	if l, err := c.WishList(ctx, "all"); err != nil || len(l.Problems) > 0 {
		t.Fatalf("WishList() = %+v, %v; want no problem", l, err)
	}
	n := 0
	for id, f := range ids {
		for i, state := range []api.State{api.Published, api.Building, api.Failed, api.Unsupported, api.Cancelled,
			api.Yanked} {
			b := request(t, c, id, drivers[i], "open")
			u := api.BuildUpdate{State: state}
			switch state {
			case api.Published, api.Yanked:
				n++
				u = api.BuildUpdate{State: api.Published, Digest: fmt.Sprintf("sha256:%064d", n), Fingerprint: f}
				if f == "" {
					continue
				}
			case api.Failed, api.Unsupported:
				u.State, u.Class = api.Failed, map[api.State]string{api.Failed: "api-break", api.Unsupported: "unsupported"}[state]
			}
			update(t, c, b.ID, u)
			if state == api.Yanked {
				if _, err := c.Yank(ctx, u.Digest, api.YankRequest{Reason: "x"}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	// The server does not know the fingerprint of the first artifact's kernel. The fingerprint of the second artifact's
	// kernel changes afterwards, so that artifact does not fit any more.
	publish(t, c, digest("e"), "17800.0.3", fingerA, target.Driver{Version: "535.6", Flavour: target.Proprietary})
	publish(t, c, digest("f"), "17800.0.4", fingerB, target.Driver{Version: "535.5", Flavour: target.Proprietary})
	if err := c.RecordKernel(ctx,
		api.Kernel{Kernel: target.Kernel{BuildID: "17800.0.4", Board: "lakitu"}, Fingerprint: fingerA}); err != nil {
		t.Fatal(err)
	}
	want := api.CoverageCounts{}
	for id := range ids {
		for _, d := range drivers {
			for _, f := range []string{"open", "proprietary"} {
				r, err := c.Resolve(ctx, id, "lakitu", d, f, "")
				if err != nil {
					t.Fatal(err)
				}
				if d == "620.1" && f == "proprietary" { // R620 and later have open modules only
					continue
				}
				want.Wanted++
				*map[api.State]*int{
					api.Published: &want.Published, api.Building: &want.Building, api.Queued: &want.Queued, api.Failed: &want.Failed,
					api.Yanked: &want.Withdrawn, api.Unsupported: &want.Unsupported, api.Cancelled: &want.Missing,
					api.Unknown: &want.Missing,
				}[r.State]++
			}
		}
	}
	if err := c.Measure(ctx); err != nil {
		t.Fatal(err)
	}
	got, err := c.Coverage(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got.Total); d != "" || want.Withdrawn == 0 || want.Unsupported == 0 || want.Missing == 0 {
		t.Errorf("Coverage() (-counted with Resolve +got):\n%s", d)
	}
	if d := cmp.Diff([]api.MilestoneCoverage{{Milestone: 109, CoverageCounts: want}}, got.Milestones); d != "" {
		t.Errorf("Coverage() by milestone (-want +got):\n%s", d)
	}
}

// withClock returns a catalogue and the time that its clock shows. A test may change this time.
func withClock(t *testing.T) (*catalogue.Catalogue, *time.Time) {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
	if err != nil {
		t.Fatal(err)
	}
	logs, err := store.OpenLogs(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), logs.Close()); err != nil {
			t.Error(err)
		}
	})
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	return catalogue.New(catalogue.Config{Store: s, Logs: logs, Queue: &fakeQueue{}, Repository: "/prebake/driver",
		Now: func() time.Time { return now }}), &now
}

func TestPositionAndETA(t *testing.T) {
	t.Parallel()
	c, now := withClock(t)
	ctx := t.Context()
	resolve := func(driver string) api.Resolution {
		t.Helper()
		if err := c.Measure(ctx); err != nil {
			t.Fatal(err)
		}
		r, err := c.Resolve(ctx, first, "lakitu", driver, "open", "")
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	ask := func(driver string) int64 { return request(t, c, first, driver, "open").ID }
	waits := ask("535.9")
	if r := resolve("535.9"); r.Position != 1 || r.ETA != nil {
		t.Errorf("before anything was built: position %d, ETA %v; want 1 and none", r.Position, r.ETA)
	}
	update(t, c, waits, api.BuildUpdate{State: api.Cancelled})
	// The median of 1, 2 and 9 minutes is 2 minutes.
	for i, minutes := range []time.Duration{1, 9, 2} {
		id := ask(fmt.Sprintf("535.1%d", i))
		update(t, c, id, api.BuildUpdate{State: api.Building, Worker: fmt.Sprintf("w%d", i), Attempt: 1})
		*now = now.Add(minutes * time.Minute)
		update(t, c, id, api.BuildUpdate{State: api.Published, Digest: digest(fmt.Sprint(i)), Fingerprint: fingerA})
	}
	*now = now.Add(time.Hour) // by now, the server does not count these builders any more
	running := ask("535.20")
	for i := range 4 {
		ask(fmt.Sprintf("535.3%d", i))
	}
	if r := resolve("535.33"); r.Position != 5 || r.ETA != nil {
		t.Errorf("without a builder: position %d, ETA %v; want 5 and none", r.Position, r.ETA)
	}
	update(t, c, running, api.BuildUpdate{State: api.Building, Worker: "w9", Attempt: 1})
	*now = now.Add(time.Minute)
	update(t, c, running, api.BuildUpdate{Worker: "w9", Attempt: 1})
	at := func(d time.Duration) time.Time { return now.Add(d) }
	for _, row := range []struct {
		driver   string
		position int
		eta      time.Time
	}{
		{"535.20", 0, at(time.Minute)},
		{"535.30", 1, at(time.Minute + 2*time.Minute)},
		{"535.33", 4, at(time.Minute + 4*2*time.Minute)},
	} {
		if r := resolve(row.driver); r.Position != row.position || r.ETA == nil || !r.ETA.Equal(row.eta) {
			t.Errorf("Resolve(%s) = position %d, ETA %v; want %d, %v", row.driver, r.Position, r.ETA, row.position, row.eta)
		}
	}
	// A second builder halves the wait. There is no estimate for a build that takes longer than usual.
	second := ask("535.21")
	update(t, c, second, api.BuildUpdate{State: api.Building, Worker: "w8", Attempt: 1})
	*now = now.Add(2 * time.Minute)
	update(t, c, second, api.BuildUpdate{Worker: "w8", Attempt: 1})
	update(t, c, running, api.BuildUpdate{Worker: "w9", Attempt: 1})
	if r := resolve("535.33"); r.ETA == nil || !r.ETA.Equal(at(3*time.Minute+2*time.Minute)) {
		t.Errorf("with two builders: ETA %v; want %v", r.ETA, at(5*time.Minute))
	}
	if r := resolve("535.20"); r.ETA != nil || r.State != api.Building {
		t.Errorf("late: %s, ETA %v; want none", r.State, r.ETA)
	}
	if r := resolve("535.11"); r.State != api.Published || r.Position != 0 || r.ETA != nil {
		t.Errorf("published: %+v; want no position and no ETA", r)
	}
	if _, err := c.Resolve(ctx, "x", "", "", "", ""); !fault.Is(err, fault.Usage) {
		t.Errorf("Resolve(x) = %v; want usage", err)
	}
}
