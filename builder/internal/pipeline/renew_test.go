package pipeline_test

import (
	"slices"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/trust"
)

// An artifact that is older than RebuildAfter is compiled again, even with a full cache, and gets a new provenance. A
// run that reuses the artifact claims no new build.
func TestRenew(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	first := must(t, cfg, request("17800.0.9"))
	provenances := func() int {
		t.Helper()
		repo, err := registry.Open(f.repo, registry.Options{})
		if err != nil {
			t.Fatal(err)
		}
		attached, err := repo.Attached(t.Context(), first.Digest, trust.ArtifactTypeBundle)
		if err != nil {
			t.Fatal(err)
		}
		return len(f.verifier(t).Statements(attached, first.Digest, trust.PredicateProvenance))
	}
	cfg.RebuildAfter = time.Hour
	if res := must(t, cfg, request("17800.0.9")); !res.Reused || provenances() != 1 {
		t.Errorf("a young artifact: reused %v, %d provenances; want it reused, and one", res.Reused, provenances())
	}
	cfg.RebuildAfter = time.Nanosecond
	res := must(t, cfg, request("17800.0.9"))
	if res.Reused || res.Digest != first.Digest || provenances() != 2 ||
		!slices.Equal(phases(res), whole) {
		t.Errorf("an old artifact: reused %v, digest %s, %d provenances; want %s made again, and two", res.Reused, res.Digest,
			provenances(), first.Digest)
	}
}
