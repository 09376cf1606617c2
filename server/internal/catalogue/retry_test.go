package catalogue_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
)

// retries is a catalogue with a clock. Its wish list wants one cell.
type retries struct {
	*catalogue.Catalogue
	t  *testing.T
	q  *fakeQueue
	at time.Time
}

func newRetries(t *testing.T) *retries {
	t.Helper()
	c, q := open(t)
	r := &retries{Catalogue: c, t: t, q: q, at: c.Now()}
	c.Now = func() time.Time { return r.at }
	k := api.Kernel{Kernel: target.Kernel{BuildID: first, Board: "lakitu", Milestone: 109}, Default: v261}
	if err := c.RecordKernel(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if _, err := c.PutWishList(t.Context(), "production", wishes, 0); err != nil {
		t.Fatal(err)
	}
	return r
}

// plan advances the clock by the pause, runs the planner, and returns the number of builds that it queued.
func (r *retries) plan(pause time.Duration) int {
	r.t.Helper()
	r.at = r.at.Add(pause)
	n, err := r.Plan(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// fail reports that the newest build failed for a temporary reason, and returns the build.
func (r *retries) fail() api.Build {
	r.t.Helper()
	return update(r.t, r.Catalogue, r.q.jobs[len(r.q.jobs)-1].Build,
		api.BuildUpdate{State: api.Failed, Class: "transient", Error: "the mirror is away"})
}

// TestTriesBeginAgain lets a cell fail three times, after which the planner waits for a day. After a success or a
// request, earlier failures must not count: after the next failure, the planner must wait only for an hour.
func TestTriesBeginAgain(t *testing.T) {
	t.Parallel()
	r := newRetries(t)
	thrice := func(pauses ...time.Duration) {
		t.Helper()
		var got []int
		for _, pause := range pauses {
			if n := r.plan(pause); n != 1 {
				t.Fatalf("Plan() after %s and failures %v queued %d builds; want 1", pause, got, n)
			}
			got = append(got, r.fail().Tries)
		}
		if d := cmp.Diff([]int{1, 2, 3}, got); d != "" {
			t.Errorf("tries of the failed builds (-want +got):\n%s", d)
		}
	}
	thrice(0, time.Hour, 6*time.Hour)
	if n := r.plan(time.Hour); n != 0 {
		t.Errorf("Plan() an hour after three failures queued %d builds; want none", n)
	}
	if b := request(t, r.Catalogue, first, v261, "open"); b.Tries != 1 {
		t.Errorf("a requested build has tries %d; want 1", b.Tries)
	}
	update(t, r.Catalogue, r.q.jobs[len(r.q.jobs)-1].Build,
		api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
	if err := r.Forget(t.Context(), "prebake/driver", digest("1")); err != nil {
		t.Fatal(err)
	}
	thrice(0, time.Hour, 6*time.Hour)
	if n := r.plan(30 * time.Hour); n != 1 {
		t.Fatalf("Plan() 30 hours after three failures queued %d builds; want 1", n)
	}
	if b := request(t, r.Catalogue, first, v261, "open"); b.Tries != 1 || b.Priority != 1 {
		t.Errorf("a request for the queued build leaves tries %d and priority %d; want 1 and 1", b.Tries, b.Priority)
	}
	r.fail()
	if n := r.plan(time.Hour); n != 1 {
		t.Errorf("Plan() an hour after the requested build failed queued %d builds; want 1", n)
	}
}

// TestTriesEnd lets a wanted cell fail each time. After 30 builds, the server must stop and say so. After a request, it
// must start to count again. Earlier releases queued such a cell each day for ever.
func TestTriesEnd(t *testing.T) {
	t.Parallel()
	r := newRetries(t)
	cell := func() api.Resolution {
		t.Helper()
		got, err := r.Resolve(t.Context(), first, "lakitu", v261, "open", "")
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	const text, command = "no more automatic tries after 30 builds", "server request --build-id " + first
	builds := 0
	for range 60 { // rounds of 30 hours
		if r.plan(30*time.Hour) == 0 {
			continue
		}
		b := r.fail()
		if builds++; b.Tries != builds {
			t.Fatalf("build %d has tries %d", builds, b.Tries)
		}
		if got := cell(); builds < 30 && strings.Contains(got.Reason, text) {
			t.Errorf("the reason after build %d is %q", builds, got.Reason)
		}
	}
	if got := cell(); builds != 30 || got.State != api.Failed || !strings.Contains(got.Reason, text) ||
		!strings.Contains(got.Hint, command) {
		t.Errorf("after %d builds, the cell is %s, %q, %q; want 30, failed, with %q and %q", builds, got.State, got.Reason,
			got.Hint, text, command)
	}
	request(t, r.Catalogue, first, v261, "open")
	update(t, r.Catalogue, r.q.jobs[len(r.q.jobs)-1].Build,
		api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "x"})
	if got := cell(); strings.Contains(got.Reason, text) {
		t.Errorf("the reason of a failure that lasts is %q", got.Reason)
	}
	request(t, r.Catalogue, first, v261, "open")
	r.fail()
	if n := r.plan(time.Hour); n != 1 {
		t.Errorf("Plan() an hour after a requested build failed queued %d builds; want 1", n)
	}
}

// TestUnknownClass lets a wanted cell fail with an error class that this server does not know, as a newer builder may
// report it. The server must keep the class, and must not queue the cell again. Earlier releases refused such a report.
func TestUnknownClass(t *testing.T) {
	t.Parallel()
	r := newRetries(t)
	if n := r.plan(0); n != 1 {
		t.Fatalf("Plan() queued %d builds; want 1", n)
	}
	id := r.q.jobs[len(r.q.jobs)-1].Build
	classes := []string{"new-trouble"}
	for _, k := range fault.Kinds() {
		classes = append(classes, k.String())
	}
	for _, class := range classes {
		if b := update(t, r.Catalogue, id, api.BuildUpdate{State: api.Queued, Class: class}); b.Class != class {
			t.Errorf("a build that was put back has class %q; want %q", b.Class, class)
		}
	}
	update(t, r.Catalogue, id, api.BuildUpdate{State: api.Failed, Class: "new-trouble", Error: "odd page", Hint: "log in"})
	got, err := r.Resolve(t.Context(), first, "lakitu", v261, "open", "")
	if err != nil || got.State != api.Failed || got.Build.Class != "new-trouble" ||
		got.Reason != "new-trouble: odd page; this server does not know the class, and makes no automatic tries" ||
		!strings.HasPrefix(got.Hint, "log in; then upgrade the server, or request a build: server request --build-id ") {
		t.Errorf("Resolve() = %s %+v, %q, %q, %v; want failed with the class, and why there are no tries", got.State,
			got.Build, got.Reason, got.Hint, err)
	}
	for range 3 {
		if n := r.plan(30 * time.Hour); n != 0 {
			t.Errorf("Plan() after a failure of an unknown class queued %d builds; want none", n)
		}
	}
	if b := request(t, r.Catalogue, first, v261, "open"); b.ID == id || b.State != api.Queued {
		t.Errorf("Request() = %+v; want another build", b)
	}
}
