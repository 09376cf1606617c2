package trust_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/trust"
)

// TestLabels checks the labels of a provenance. A client finds the newest provenance by its time label.
func TestLabels(t *testing.T) {
	t.Parallel()
	for predicate, want := range map[string]map[string]string{
		`{"runDetails":{"metadata":{"finishedOn":"2026-11-30T03:04:05.6+02:00"}}}`: {
			trust.LabelContent: "dsse-envelope", trust.LabelPredicate: trust.PredicateProvenance,
			trust.LabelCreated: "2026-11-30T01:04:05Z",
		},
		`{}`: {trust.LabelContent: "dsse-envelope", trust.LabelPredicate: trust.PredicateProvenance},
	} {
		got := trust.Labels(&trust.Statement{PredicateType: trust.PredicateProvenance, Predicate: []byte(predicate)})
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("Labels(%s) (-want +got):\n%s", predicate, diff)
		}
	}
}
