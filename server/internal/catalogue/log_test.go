package catalogue_test

import (
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestNoLog asks for the logs of builds that have none. The error must say whether a log will come, or why there is
// none.
func TestNoLog(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	ctx := t.Context()
	check := func(b api.Build, text, hint string) {
		t.Helper()
		log, _, err := c.OpenLog(ctx, b.ID)
		if log != nil || !fault.Is(err, fault.NotFound) || !strings.Contains(err.Error(), text) ||
			!strings.Contains(fault.Hint(err), hint) {
			t.Errorf("OpenLog(%s build) = %v; hint: %s\nwant not-found, %q and %q", b.State, err, fault.Hint(err), text, hint)
		}
	}
	b := request(t, c, first, v261, "open")
	check(b, "has no log yet", "wait")
	b = update(t, c, b.ID, api.BuildUpdate{State: api.Building, Worker: "builder-1", Attempt: 1})
	check(b, "has no log yet", "wait")
	b = update(t, c, b.ID, api.BuildUpdate{State: api.Failed, Class: "internal"})
	check(b, "has no log: its builder sent no log to this server", "builder-1")

	b = request(t, c, first, v261, "proprietary")
	b, err := c.Cancel(ctx, b.ID)
	if err != nil {
		t.Fatal(err)
	}
	check(b, "has no log: no builder worked on this build when the build ended", "server build 2")

	b = request(t, c, second, v261, "proprietary")
	update(t, c, b.ID, api.BuildUpdate{State: api.Building, Worker: "builder-1", Attempt: 1})
	b = update(t, c, b.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
	check(b, "has no log: its builder sent no log to this server", "server artifact "+digest("1"))
	a := api.NewArtifact{Digest: digest("2"), Fingerprint: fingerB, Driver: b.Driver,
		Kernels: []target.Kernel{{BuildID: other, Board: "lakitu"}}}
	if _, err := c.AddArtifact(ctx, a); err != nil {
		t.Fatal(err)
	}
	b = request(t, c, other, v261, "proprietary")
	check(b, "has no log: no builder ran, because the artifact was there already", "server artifact "+digest("2"))
}
