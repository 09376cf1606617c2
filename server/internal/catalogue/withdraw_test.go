package catalogue_test

import (
	"context"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
)

// publish records an artifact of a driver for a kernel of [world].
func publish(t *testing.T, c *catalogue.Catalogue, digest, buildID string, f target.Fingerprint, d target.Driver) {
	t.Helper()
	_, err := c.AddArtifact(t.Context(), api.NewArtifact{Digest: digest, Fingerprint: f, Driver: d,
		Kernels: []target.Kernel{{BuildID: buildID, Board: "lakitu"}}})
	if err != nil {
		t.Fatal(err)
	}
}

func TestYankWithReplacement(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	open := func(version string) target.Driver { return target.Driver{Version: version, Flavour: target.Open} }
	publish(t, c, digest("1"), first, fingerA, open(v261))
	publish(t, c, digest("2"), first, fingerA, open(v309))
	publish(t, c, digest("3"), other, fingerB, open(v309))
	publish(t, c, digest("4"), first, fingerA, open("470.1"))
	publish(t, c, digest("5"), first, fingerA, target.Driver{Version: v261, Flavour: target.Proprietary})
	publish(t, c, digest("6"), first, fingerA, open("535.400"))
	publish(t, c, digest("7"), second, fingerA, open(v261))
	if _, err := c.Yank(t.Context(), digest("6"), api.YankRequest{Reason: "x"}); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		replacement string
		want        fault.Kind
	}{
		"itself": {digest("1"), fault.Mismatch}, "another fingerprint": {digest("3"), fault.Mismatch},
		"an older driver": {digest("4"), fault.Mismatch}, "the other flavour": {digest("5"), fault.Mismatch},
		"a yanked one": {digest("6"), fault.Mismatch}, "none that is known": {digest("9"), fault.NotFound},
		"no digest": {"latest", fault.Usage},
	} {
		_, err := c.Yank(t.Context(), digest("1"), api.YankRequest{Reason: "panics", Replacement: row.replacement})
		if !fault.Is(err, row.want) {
			t.Errorf("Yank(replaced by %s) = %v; want %v", name, err, row.want)
		}
	}
	if a, err := c.Artifact(t.Context(), digest("1")); err != nil || a.State != api.Published {
		t.Fatalf("after refusals the artifact is %s, %v; want published", a.State, err)
	}
	for _, replacement := range []string{digest("2"), digest("7")} { // a newer driver; the same driver, built again
		a, err := c.Yank(t.Context(), digest("1"), api.YankRequest{Reason: "panics", Replacement: replacement})
		if err != nil || a.Replacement != replacement || a.State != api.Yanked {
			t.Errorf("Yank(replaced by %s) = %+v, %v", replacement, a, err)
		}
		r, err := c.Resolve(t.Context(), first, "lakitu", v261, "open", "")
		if err != nil || r.State != api.Yanked || r.Replacement != replacement ||
			r.Reason != "panics; artifact "+replacement+" replaces it" || !strings.Contains(r.Hint, replacement) {
			t.Errorf("Resolve() = %+v, %v; want yanked, and the replacement", r, err)
		}
	}
	if a, err := c.Unyank(t.Context(), digest("1")); err != nil || a.Replacement != "" || a.State != api.Published {
		t.Errorf("Unyank() = %+v, %v; want published without a replacement", a, err)
	}
	r, err := c.Resolve(t.Context(), first, "lakitu", v261, "open", "")
	if err != nil || r.State != api.Published || r.Replacement != "" {
		t.Errorf("Resolve() after Unyank = %+v, %v", r, err)
	}
}

// TestDeletedWithdrawn deletes the manifest of a yanked artifact. The yank must stay: the planner must not queue the
// cell, and the artifact must still be yanked when it is published again. If the yank is undone while there is no
// manifest, the artifact must leave the catalogue.
func TestDeletedWithdrawn(t *testing.T) {
	t.Parallel()
	c, q := world(t)
	ctx := t.Context()
	there := true
	c.HasManifest = func(context.Context, string, string) (bool, error) { return there, nil }
	d := target.Driver{Version: v261, Flavour: target.Open}
	list := "version: 1\nkernels: [{build: " + first + "}]\ndrivers: [" + v261 + "]\nflavours: [open]\n"
	if _, err := c.PutWishList(ctx, "production", list, 0); err != nil {
		t.Fatal(err)
	}
	built := request(t, c, first, v261, "open")
	update(t, c, built.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
	resolve := func(want api.State, reason string) {
		t.Helper()
		r, err := c.Resolve(ctx, first, "lakitu", v261, "open", "")
		if err != nil || r.State != want || reason != "" && r.Reason != reason {
			t.Errorf("Resolve() = %s %q, %v; want %s %q", r.State, r.Reason, err, want, reason)
		}
	}
	if _, err := c.Yank(ctx, digest("1"), api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}
	there = false
	if err := c.Forget(ctx, "prebake/driver", digest("1")); err != nil {
		t.Fatal(err)
	}
	resolve(api.Yanked, "panics")
	if n, err := c.Plan(ctx); err != nil || n != 0 || len(q.jobs) != 1 {
		t.Errorf("Plan() = %d, %v with %d jobs; want no new one for a yanked cell", n, err, len(q.jobs))
	}
	there = true
	publish(t, c, digest("1"), first, fingerA, d)
	resolve(api.Yanked, "panics")
	if a, err := c.Unyank(ctx, digest("1")); err != nil || a.State != api.Published {
		t.Errorf("Unyank(published again) = %+v, %v; want published", a, err)
	}
	resolve(api.Published, "")
	if _, err := c.Yank(ctx, digest("1"), api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}
	there = false
	if a, err := c.Unyank(ctx, digest("1")); err != nil || a.State != api.Unknown || a.WithdrawnAt != nil {
		t.Errorf("Unyank(without a manifest) = %+v, %v; want unknown", a, err)
	}
	resolve(api.Unknown, "")
	for i, want := range []int{1, 0} {
		if n, err := c.Plan(ctx); err != nil || n != want || len(q.jobs) != 2 {
			t.Errorf("Plan() %d after the cell is allowed again = %d, %v with %d jobs; want %d and 2 jobs", i, n, err,
				len(q.jobs), want)
		}
	}
}
