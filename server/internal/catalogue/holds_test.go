package catalogue_test

import (
	"context"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// TestNamesOnlyWhatTheRegistryHas checks that the catalogue refuses an artifact whose manifest the server's registry
// lacks, and forgets an artifact whose manifest was deleted.
func TestNamesOnlyWhatTheRegistryHas(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	ctx := t.Context()
	there := map[string]bool{digest("1"): true}
	c.HasManifest = func(_ context.Context, repository, d string) (bool, error) {
		return repository == "prebake/driver" && there[d], nil
	}
	d := target.Driver{Version: v261, Flavour: target.Open}
	add := func(digest, repository string) error {
		_, err := c.AddArtifact(ctx, api.NewArtifact{Digest: digest, Fingerprint: fingerA, Driver: d, Repository: repository,
			Kernels: []target.Kernel{{BuildID: first, Board: "lakitu"}}})
		return err
	}
	if err := add(digest("2"), "/prebake/driver"); !fault.Is(err, fault.Mismatch) || fault.Hint(err) == "" {
		t.Errorf("AddArtifact(digest that is nowhere) = %v; want mismatch with a hint", err)
	}
	b := request(t, c, first, v261, "open")
	_, err := c.Update(ctx, b.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Update(ctx, b.ID, api.BuildUpdate{State: api.Published, Digest: digest("2"), Fingerprint: fingerA})
	if !fault.Is(err, fault.Mismatch) {
		t.Errorf("Update(published, digest that is nowhere) = %v; want mismatch", err)
	}
	if err := add(digest("1"), ""); err != nil {
		t.Fatal(err)
	}
	state := func() api.State {
		r, err := c.Resolve(ctx, first, "lakitu", v261, "open", "")
		if err != nil {
			t.Fatal(err)
		}
		return r.State
	}
	if s := state(); s != api.Published {
		t.Fatalf("state = %s; want published", s)
	}
	if err := c.Forget(ctx, "other/driver", digest("1")); err != nil || state() != api.Published {
		t.Errorf("Forget(another repository) = %v, state %s; want it still published", err, state())
	}
	if err := c.Forget(ctx, "prebake/driver", digest("1")); err != nil || state() == api.Published {
		t.Errorf("Forget() = %v, state %s; want it no longer published", err, state())
	}
	all, _, err := c.Artifacts(ctx, store.ArtifactFilter{Digest: digest("1")}, store.Page{})
	if err != nil || len(all) != 0 {
		t.Errorf("Artifacts() = %v, %v; want none", all, err)
	}
}
