package catalogue_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const wishes = `version: 1
kernels:
  - {milestone: 109, latest: 2}
drivers: [default]
flavours: [open]
`

// jobs returns one text for each queued job, in the order of the queue. The number of "!" is the priority.
func jobs(q *fakeQueue) []string {
	var all []string
	for i, j := range q.jobs {
		all = append(all, j.BuildID+" "+j.Driver+" "+j.Flavour+" "+strings.Repeat("!", q.priorities[i]))
	}
	return all
}

// TestPlan checks that the server queues the cells that a wish list wants, for each new COS build: without a request,
// only once, and the newest COS build first.
func TestPlan(t *testing.T) {
	t.Parallel()
	c, q := open(t)
	ctx := t.Context()
	see := func(id string) {
		t.Helper()
		k := api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "lakitu", Milestone: 109}, Default: v261}
		if err := c.RecordKernel(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	plan := func(want ...string) {
		t.Helper()
		q.jobs, q.priorities = nil, nil
		if n, err := c.Plan(ctx); err != nil || n != len(want) {
			t.Fatalf("Plan() = %d, %v; want %d", n, err, len(want))
		}
		if d := cmp.Diff(want, jobs(q)); d != "" {
			t.Errorf("queued (-want +got):\n%s", d)
		}
	}
	see("17800.0.1")
	see("17800.0.2")
	see("17800.0.10")
	plan() // without a wish list, nothing is wanted
	if _, err := c.PutWishList(ctx, "production", wishes, 0); err != nil {
		t.Fatal(err)
	}
	plan("17800.0.10 "+v261+" open !!", "17800.0.2 "+v261+" open !!")
	plan()
	see("17800.0.11")
	plan("17800.0.11 " + v261 + " open !!")

	// If an operator requests a cell that is already queued for a wish list, the build gets a higher priority.
	b := request(t, c, "17800.0.2", v261, "open")
	if b.Priority != 1 || !cmp.Equal(q.raised, []string{"2 to 1"}) {
		t.Errorf("Request(planned cell) = priority %d, raised %v; want 1, and build 2 raised", b.Priority, q.raised)
	}

	l, err := c.WishList(ctx, "production")
	if err != nil || l.Version != 1 || l.Cells != 2 || l.PlannedAt == nil || len(l.Problems) != 0 {
		t.Errorf("WishList() = %+v, %v; want version 1 with 2 cells, planned", l, err)
	}
	// A wish that no driver can meet is listed as a problem. The other wishes are still planned.
	text := strings.Replace(wishes, "[default]", "[default, R999]", 1)
	if l, err = c.PutWishList(ctx, "production", text, 1); err != nil || l.Version != 2 {
		t.Fatalf("PutWishList() = %+v, %v; want version 2", l, err)
	}
	plan()
	if l, err = c.WishList(ctx, "production"); err != nil || len(l.Problems) == 0 ||
		!strings.Contains(l.Problems[0], "R999") {
		t.Errorf("WishList().Problems = %q, %v; want R999", l.Problems, err)
	}
	for name, err := range map[string]error{
		"usage of a text that is wrong":  errOf(c.PutWishList(ctx, "production", "kernels: 7", 0)),
		"usage of a name that is a path": errOf(c.PutWishList(ctx, "../x", wishes, 0)),
		"usage of a file on the server":  errOf(c.PutWishList(ctx, "local", "imageMap: ftp://x/map.json\n"+wishes, 0)),
		"busy for an older version":      errOf(c.PutWishList(ctx, "production", wishes, 1)),
		"not-found for an absent list":   errOf(c.WishList(ctx, "absent")),
	} {
		if want, _, _ := strings.Cut(name, " "); fault.Of(err).String() != want || err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.DropWishList(ctx, "production"); err != nil {
		t.Error(err)
	}
	if err := c.DropWishList(ctx, "production"); !fault.Is(err, fault.NotFound) {
		t.Errorf("DropWishList(absent) = %v; want not-found", err)
	}
}

func errOf[T any](_ T, err error) error { return err }

// TestAnnounce announces a COS build. The server must look up the build, queue its cells, and later say how long they
// took. Cells of other COS builds must not delay the answer.
func TestAnnounce(t *testing.T) {
	t.Parallel()
	c, q := open(t)
	ctx := t.Context()
	noon := c.Now()
	at := noon
	c.Now = func() time.Time { return at }
	if _, err := c.Announce(ctx, "19216.104.25"); !fault.Is(err, fault.Unsupported) {
		t.Errorf("Announce() without a mirror = %v; want unsupported", err)
	}
	c.Mirror = &upstream{}
	if _, err := c.PutWishList(ctx, "all", strings.Replace(wishes, "milestone: 109, ", "", 1), 0); err != nil {
		t.Fatal(err)
	}
	older := target.Kernel{BuildID: "19216.104.20", Board: "lakitu", Arch: target.AMD64}
	if err := c.RecordKernel(ctx, api.Kernel{Kernel: older, Default: v261}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second announcement must change nothing
		r, err := c.Announce(ctx, "19216.104.25")
		if err != nil || r.Open != 1 || r.Ready != 0 || len(q.jobs) != 1 {
			t.Fatalf("Announce() = %+v, %v with %d jobs; want one open cell", r, err, len(q.jobs))
		}
	}
	if _, err := c.Announce(ctx, "1.2.3"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Announce(absent) = %v; want input-missing", err)
	}
	if n, err := c.Plan(ctx); err != nil || n != 1 || q.jobs[1].BuildID != older.BuildID {
		t.Errorf("Plan() = %d, %v with the jobs %+v; want a second job, for %s", n, err, q.jobs, older)
	}
	at = noon.Add(90 * time.Second)
	update(t, c, q.jobs[0].Build, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
	r, err := c.Release(ctx, "19216.104.25")
	if err != nil || r.Ready != 1 || r.Times != (api.ReadyDuration{Count: 1, P50: 90, P90: 90, P99: 90, Max: 90}) {
		t.Errorf("Release() = %+v, %v; want ready after 90 s", r, err)
	}
	if d, err := c.ReadyTimes(ctx, 1); err != nil || d != r.Times {
		t.Errorf("ReadyTimes() = %+v, %v; want the times of Release()", d, err)
	}
	if _, err := c.Release(ctx, "9.9.9"); !fault.Is(err, fault.NotFound) {
		t.Errorf("Release(absent) = %v; want not-found", err)
	}
	pools := []api.Pool{{Name: "a", BuildID: "19216.104.25", Board: "lakitu"},
		{Name: "b", BuildID: "19216.104.25", Board: "lakitu", Driver: v309}}
	if p, err := c.Preflight(ctx, api.PreflightRequest{Pools: pools[:1]}); err != nil || !p.May {
		t.Errorf("Preflight(published) = %+v, %v; want yes", p, err)
	}
	p, err := c.Preflight(ctx, api.PreflightRequest{Pools: pools})
	if err != nil || p.May || !p.Pools[0].May || p.Pools[1].May || p.Pools[1].Resolution.Reason == "" {
		t.Errorf("Preflight(one missing) = %+v, %v; want no, and why", p, err)
	}
}

// TestPlanFailedCells lets a wanted cell fail with each error class. If the cause may be temporary, the planner must
// queue the cell again, behind all other builds: after an hour, then after six hours, then once a day.
func TestPlanFailedCells(t *testing.T) {
	t.Parallel()
	c, q := open(t)
	ctx := t.Context()
	at := c.Now()
	c.Now = func() time.Time { return at }
	k := api.Kernel{Kernel: target.Kernel{BuildID: first, Board: "lakitu", Milestone: 109}, Default: v261}
	if err := c.RecordKernel(ctx, k); err != nil {
		t.Fatal(err)
	}
	if _, err := c.PutWishList(ctx, "production", wishes, 0); err != nil {
		t.Fatal(err)
	}
	plan := func() (queued []string) {
		t.Helper()
		q.jobs, q.priorities = nil, nil
		if n, err := c.Plan(ctx); err != nil || n != len(q.jobs) {
			t.Fatalf("Plan() = %d, %v with %d jobs", n, err, len(q.jobs))
		}
		return jobs(q)
	}
	fail := func(class string) {
		t.Helper()
		update(t, c, q.jobs[0].Build, api.BuildUpdate{State: api.Failed, Class: class, Error: "x"})
	}
	if got := plan(); len(got) != 1 {
		t.Fatalf("Plan() queued %q; want one build", got)
	}
	last := ""
	for _, row := range []struct {
		class      string
		early, due time.Duration // after early, nothing must be queued; after due, the cell must be
	}{
		{"transient", time.Hour - time.Second, time.Hour},
		{"input-missing", 6*time.Hour - time.Second, 6 * time.Hour},
		{"internal", 6*time.Hour - time.Second, 30 * time.Hour},
		{"disk-full", 6*time.Hour - time.Second, 30 * time.Hour},
	} {
		fail(row.class)
		failed := at
		at = failed.Add(row.early)
		if got := plan(); got != nil {
			t.Errorf("Plan() %s after %s queued %q; want nothing yet", row.early, row.class, got)
		}
		at = failed.Add(row.due)
		got := plan()
		if d := cmp.Diff([]string{first + " " + v261 + " open !!!!"}, got); d != "" {
			t.Fatalf("Plan() %s after %s (-want +got):\n%s", row.due, row.class, d)
		}
		last = row.class
	}
	for _, class := range []string{"api-break", "check-failed", "unsupported", "load-test-failed", "unverified"} {
		fail(class)
		at = at.Add(365 * 24 * time.Hour)
		if got := plan(); got != nil {
			t.Errorf("Plan() after %s, then %s queued %q; want nothing", last, class, got)
		}
		request(t, c, first, v261, "open")
	}
}

// TestRetriesAreSpread simulates an outage in which twelve cells fail for days. The planner must queue each cell once a
// day, but not all cells in the same hour.
func TestRetriesAreSpread(t *testing.T) {
	t.Parallel()
	c, q := open(t)
	ctx := t.Context()
	at := c.Now()
	c.Now = func() time.Time { return at }
	const kernels = 12
	for i := range kernels {
		k := api.Kernel{Kernel: target.Kernel{BuildID: fmt.Sprintf("17800.0.%d", i), Board: "lakitu", Milestone: 109}}
		if err := c.RecordKernel(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	list := "version: 1\nkernels: [{milestone: 109, latest: 12}]\ndrivers: [" + v261 + "]\nflavours: [open]\n"
	if _, err := c.PutWishList(ctx, "production", list, 0); err != nil {
		t.Fatal(err)
	}
	// Each cell fails for the third time in hour 7.
	const start, days = 7 + 30, 3
	times, most := map[string]int{}, 0
	for hour := range start + days*24 {
		q.jobs = nil
		if _, err := c.Plan(ctx); err != nil {
			t.Fatal(err)
		}
		for _, j := range q.jobs {
			update(t, c, j.Build, api.BuildUpdate{State: api.Failed, Class: "transient", Error: "the mirror is away"})
			if hour >= start {
				times[j.BuildID]++
			}
		}
		if hour >= start {
			most = max(most, len(q.jobs))
		}
		at = at.Add(time.Hour)
	}
	for id, n := range times {
		if n != days {
			t.Errorf("COS build %s was queued %d times in %d days; want once a day", id, n, days)
		}
	}
	if len(times) != kernels || most > kernels/2 {
		t.Errorf("%d of %d cells were queued, %d of them in one hour; want all, at different hours", len(times), kernels,
			most)
	}
}
