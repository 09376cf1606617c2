package catalogue_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

var openDriver = target.Driver{Version: v261, Flavour: target.Open}

// reportOf returns a report of one node about an attempt to load the artifact.
func reportOf(node int, outcome api.Outcome, class fault.Kind) api.NodeReport {
	r := api.NodeReport{BuildID: first, Board: "lakitu", Driver: openDriver, Digest: digest("1"), Outcome: outcome,
		Node: fmt.Sprintf("%064x", node)}
	if outcome != api.Loaded {
		r.Class, r.Message = class.String(), "unknown symbol"
	}
	return r
}

func report(t *testing.T, c *catalogue.Catalogue, from string, all ...api.NodeReport) {
	t.Helper()
	for _, r := range all {
		if err := c.Report(t.Context(), r, from); err != nil {
			t.Fatalf("Report(%+v) = %v", r, err)
		}
	}
}

// withArtifact returns a catalogue with one artifact, and the time that its clock shows. If the artifact fails on n
// nodes, it goes into quarantine.
func withArtifact(t *testing.T, n int) (*catalogue.Catalogue, *time.Time) {
	t.Helper()
	c, now := withClock(t)
	c.Quarantine = n
	publish(t, c, digest("1"), first, fingerA, openDriver)
	return c, now
}

func TestQuarantine(t *testing.T) {
	t.Parallel()
	const fell, failed = api.FellBack, api.NotLoad
	type step struct {
		from    string
		node    int
		outcome api.Outcome
		class   fault.Kind
		later   time.Duration // time since the former step
	}
	fails := []step{{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0},
		{"c", 3, failed, fault.Rejected, 0}}
	// loads returns reports of this many nodes of one network, each of which loaded the artifact. The steps in next follow
	// after the given time.
	loads := func(nodes int, then time.Duration, next ...step) (all []step) {
		for n := range nodes {
			all = append(all, step{"d", 100 + n, api.Loaded, 0, 0})
		}
		next = slices.Clone(next)
		next[0].later = then
		return append(all, next...)
	}
	rows := []struct {
		name  string
		limit int
		steps []step
		want  api.State
	}{
		{"three nodes of two networks", 3,
			[]step{{"a", 1, failed, fault.Rejected, 0}, {"a", 2, fell, fault.Unusable, 0}, {"b", 3, failed, fault.Mismatch, 0}},
			api.Quarantined},
		{"two nodes are too few", 3, []step{{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0}},
			api.Published},
		{"one node that says it again", 3,
			[]step{{"a", 1, failed, fault.Rejected, 0}, {"b", 1, failed, fault.Rejected, 0},
				{"c", 1, failed, fault.Rejected, 0}}, api.Published},
		{"one network that makes up nodes", 3,
			[]step{{"a", 1, failed, fault.Rejected, 0}, {"a", 2, failed, fault.Rejected, 0}, {"a", 3, failed, fault.Rejected, 0},
				{"a", 4, failed, fault.Rejected, 0}}, api.Published},
		{"what is the node's fault", 3,
			[]step{{"a", 1, failed, fault.Busy, 0}, {"b", 2, failed, fault.DiskFull, 0}, {"c", 3, failed, fault.NoDevice, 0}},
			api.Published},
		{"as many successes", 3, []step{{"a", 4, api.Loaded, 0, 0}, {"a", 5, api.Loaded, 0, 0}, {"a", 6, api.Loaded, 0, 0},
			{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0}, {"c", 3, failed, fault.Rejected, 0}},
			api.Published},
		{"more failures than successes", 3, []step{{"a", 4, api.Loaded, 0, 0}, {"a", 5, api.Loaded, 0, 0},
			{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0}, {"c", 3, failed, fault.Rejected, 0}},
			api.Quarantined},
		{"good last week", 3, loads(3, 7*24*time.Hour, fails...), api.Published},
		{"good two months ago", 3, loads(3, 60*24*time.Hour, fails...), api.Quarantined},
		{"one network that makes up successes", 3, loads(40, 0, append(slices.Clone(fails),
			func() (more []step) {
				for n := range 20 {
					more = append(more, step{fmt.Sprint("e", n/2), 200 + n, failed, fault.Rejected, 0})
				}
				return more
			}()...)...), api.Quarantined},
		{"broken GPUs", 3, []step{{"a", 1, failed, fault.Unusable, 0}, {"b", 2, failed, fault.Unusable, 0},
			{"c", 3, failed, fault.Unusable, 0}}, api.Published},
		{"the former driver could use the GPUs", 3, []step{{"a", 1, fell, fault.Unusable, 0},
			{"b", 2, fell, fault.Unusable, 0}, {"c", 3, fell, fault.Unusable, 0}}, api.Quarantined},
		{"longer than a day", 3, []step{{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0},
			{"c", 3, failed, fault.Rejected, 25 * time.Hour}}, api.Published},
		{"a node that came round", 3,
			[]step{{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0}, {"a", 1, api.Loaded, 0, 0},
				{"c", 3, failed, fault.Rejected, 0}}, api.Published},
		{"turned off", 0, []step{{"a", 1, failed, fault.Rejected, 0}, {"b", 2, failed, fault.Rejected, 0},
			{"c", 3, failed, fault.Rejected, 0}}, api.Published},
		{"one is enough", 1, []step{{"a", 1, failed, fault.Rejected, 0}}, api.Quarantined},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			c, now := withArtifact(t, row.limit)
			for _, s := range row.steps {
				*now = now.Add(s.later)
				report(t, c, s.from, reportOf(s.node, s.outcome, s.class))
			}
			r, err := c.Resolve(t.Context(), first, "lakitu", v261, "open", "")
			if err != nil || r.State != row.want {
				t.Errorf("Resolve() = %s %q, %v; want %s", r.State, r.Reason, err, row.want)
			}
		})
	}
}

// TestLift checks that nodes do not get a quarantined artifact, but get it again after an operator has lifted the
// quarantine. Failures from before the lift must not count any more.
func TestLift(t *testing.T) {
	t.Parallel()
	c, now := withArtifact(t, 3)
	ctx := t.Context()
	fails := func() {
		t.Helper()
		for i, from := range []string{"a", "b", "c"} {
			report(t, c, from, reportOf(i, api.FellBack, fault.Rejected))
		}
	}
	if _, err := c.Lift(ctx, digest("1")); !fault.Is(err, fault.Mismatch) {
		t.Errorf("Lift(published) = %v; want mismatch", err)
	}
	report(t, c, "a", reportOf(9, api.Loaded, 0))
	fails()
	r, err := c.Resolve(ctx, first, "lakitu", v261, "open", "")
	want := "the artifact did not load on 3 counted nodes within a day, and on 3 of 4 within 30 days; " +
		"the last report says: unknown symbol"
	if err != nil || r.State != api.Quarantined || r.Reason != want || r.Digest != "" ||
		!strings.Contains(r.Hint, "server lift "+digest("1")) {
		t.Errorf("Resolve() = %+v, %v; want quarantined, %q", r, err, want)
	}
	if _, err := c.Request(ctx,
		api.BuildRequest{BuildID: first, Board: "lakitu", Driver: v261, Flavour: "open"}); !fault.Is(err, fault.Unsupported) {
		t.Errorf("Request(quarantined) = %v; want unsupported", err)
	}
	all, _, err := c.Quarantined(ctx, store.Page{})
	if err != nil || len(all) != 1 || all[0].Artifact.Digest != digest("1") {
		t.Fatalf("Quarantined() = %+v, %v; want the artifact", all, err)
	}
	counts := []api.ReportCounts{{BuildID: first, Board: "lakitu", Digest: digest("1"), Loaded: 1, FellBack: 3,
		LastAt: *now}}
	if d := cmp.Diff(counts, all[0].Reports); d != "" {
		t.Errorf("Quarantined() counts (-want +got):\n%s", d)
	}
	for _, state := range []api.State{api.Published, api.Quarantined} {
		some, _, err := c.Artifacts(ctx, store.ArtifactFilter{State: state}, store.Page{})
		if err != nil || (len(some) == 1) != (state == api.Quarantined) {
			t.Errorf("Artifacts(%s) = %d, %v", state, len(some), err)
		}
	}
	if _, err := c.Unyank(ctx, digest("1")); !fault.Is(err, fault.Mismatch) {
		t.Errorf("Unyank(quarantined) = %v; want mismatch", err)
	}
	*now = now.Add(time.Minute)
	if a, err := c.Lift(ctx, digest("1")); err != nil || a.State != api.Published || a.Reason != "" {
		t.Errorf("Lift() = %+v, %v; want published", a, err)
	}
	*now = now.Add(time.Minute)
	report(t, c, "d", reportOf(4, api.FellBack, fault.Rejected))
	if r, err := c.Resolve(ctx, first, "lakitu", v261, "open", ""); err != nil || r.State != api.Published {
		t.Errorf("Resolve() after one more failure = %s, %v; want published", r.State, err)
	}
	fails()
	if r, err := c.Resolve(ctx, first, "lakitu", v261, "open", ""); err != nil || r.State != api.Quarantined {
		t.Errorf("Resolve() after all failed again = %s, %v; want quarantined", r.State, err)
	}
	if a, err := c.Yank(ctx, digest("1"), api.YankRequest{Reason: "no symbol"}); err != nil || a.State != api.Yanked {
		t.Errorf("Yank(quarantined) = %+v, %v", a, err)
	}
}

func TestReportIsChecked(t *testing.T) {
	t.Parallel()
	c, _ := withArtifact(t, 3)
	publish(t, c, digest("2"), other, fingerB, openDriver)
	rows := map[string]struct {
		change func(r *api.NodeReport)
		want   fault.Kind
	}{
		"no node":          {func(r *api.NodeReport) { r.Node = "gke-pool-1-node-7" }, fault.Usage},
		"no outcome":       {func(r *api.NodeReport) { r.Outcome = "fine" }, fault.Usage},
		"no class":         {func(r *api.NodeReport) { r.Class = "" }, fault.Usage},
		"odd class":        {func(r *api.NodeReport) { r.Class = "New trouble" }, fault.Usage},
		"no digest":        {func(r *api.NodeReport) { r.Digest = "latest" }, fault.Usage},
		"no kernel":        {func(r *api.NodeReport) { r.BuildID = "x" }, fault.Usage},
		"no driver":        {func(r *api.NodeReport) { r.Driver.Version = "new" }, fault.Usage},
		"control letters":  {func(r *api.NodeReport) { r.Message = "a\x1b[2J" }, fault.Usage},
		"unknown artifact": {func(r *api.NodeReport) { r.Digest = digest("9") }, fault.NotFound},
		"another driver":   {func(r *api.NodeReport) { r.Driver.Version = v309 }, fault.Mismatch},
		"another kernel":   {func(r *api.NodeReport) { r.Digest = digest("2") }, fault.Mismatch},
	}
	for name, row := range rows {
		r := reportOf(1, api.NotLoad, fault.Rejected)
		row.change(&r)
		if err := c.Report(t.Context(), r, "a"); !fault.Is(err, row.want) {
			t.Errorf("Report(%s) = %v; want %v", name, err, row.want)
		}
	}
	long := reportOf(1, api.NotLoad, fault.Rejected)
	long.Message = strings.Repeat("ä", 4000) + "\nsecond line"
	report(t, c, "a", long)
	if all, err := c.Reports(t.Context(), digest("1"), "", ""); err != nil || len(all) != 1 || all[0].Failed != 1 {
		t.Errorf("Reports() = %+v, %v; want one failure", all, err)
	}
	if _, err := c.Reports(t.Context(), "", "", ""); !fault.Is(err, fault.Usage) {
		t.Errorf("Reports(of nothing) = %v; want usage", err)
	}
}

// TestUnknownClassOfNodes reports failures with an error class that this server does not know, as newer nodes may do.
// The reports must count as failures. They must not put the artifact into quarantine, because the artifact may not be
// the cause.
func TestUnknownClassOfNodes(t *testing.T) {
	t.Parallel()
	c, _ := withArtifact(t, 2)
	for node := range 6 {
		r := reportOf(node, api.NotLoad, fault.Rejected)
		r.Class = "new-trouble"
		report(t, c, fmt.Sprint("network ", node), r)
	}
	all, err := c.Reports(t.Context(), digest("1"), "", "")
	if err != nil || len(all) != 1 || all[0].Failed != 6 {
		t.Errorf("Reports() = %+v, %v; want 6 failures", all, err)
	}
	if a, err := c.Artifact(t.Context(), digest("1")); err != nil || a.State != api.Published {
		t.Errorf("Artifact() = %s, %v; want published", a.State, err)
	}
}

func TestNetwork(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"10.1.2.3": "10.1.2.0/24", "::ffff:10.1.2.3": "10.1.2.0/24", "2001:db8:1:2:3::4": "2001:db8:1:2::/64",
		"fe80::1%eth0": "fe80::/64",
	} {
		if got := catalogue.Network(netip.MustParseAddr(in)); got != want {
			t.Errorf("Network(%s) = %s; want %s", in, got, want)
		}
	}
	if got := catalogue.Network(netip.Addr{}); got != "unknown" {
		t.Errorf("Network(none) = %s", got)
	}
}
