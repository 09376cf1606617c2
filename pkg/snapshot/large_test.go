package snapshot_test

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/snapshot/maker"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

// TestLargeFarm checks that the list of a large farm needs at most half of the allowed sizes, and that a client accepts
// it.
func TestLargeFarm(t *testing.T) {
	t.Parallel()
	all := make([]snapshot.Artifact, 60_000)
	for i := range all {
		a := snapshot.Artifact{Digest: fmt.Sprintf("sha256:%064x", uint64(i)*0x9e3779b97f4a7c15), State: snapshot.Published,
			Driver:      target.Driver{Version: "535.261." + strconv.Itoa(i%100), Flavour: target.Open},
			Fingerprint: target.Fingerprint(digest("a"))}
		for k := range 10 {
			a.Kernels = append(a.Kernels,
				snapshot.Kernel{BuildID: fmt.Sprintf("%d.%d.%d", 17000+i%900, k, i%77), Board: "lakitu"})
		}
		all[i] = a
	}
	file, err := maker.Encode(snapshot.Catalogue{Schema: snapshot.Schema, MadeAt: start, Artifacts: all})
	check(t, err)
	t.Logf("%d bytes", len(file))
	if len(file) > snapshot.MaxFile/2 {
		t.Errorf("Encode of 60,000 artifacts = %d bytes; want at most half of %d", len(file), snapshot.MaxFile)
	}
	f := snapshots.New(t, start)
	f.Publish(t, start, all...)
	n := newNode(t, f)
	if s, err := n.client(t, f.Dir).Refresh(t.Context()); err != nil || len(s.Artifacts) != len(all) {
		t.Fatalf("Refresh = %v", err)
	}
	if last, err := n.client(t, "/nowhere").Last(); err != nil || len(last.Artifacts) != len(all) {
		t.Errorf("Last = %v", err)
	}
}
