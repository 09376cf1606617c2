package plan_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/plan"
)

func TestParseGKE(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"1.33.5-gke.1080000": "1.33.5-gke.1080000", "v1.33.5-gke.1080000": "1.33.5-gke.1080000", // kubelets print the v
		"1.33": "", "1.33.5": "", "1.33.5-gke.": "", "1.33.5-gke.1%": "", "vv1.33.5-gke.1": "", "1.33.5-gke.1\n": "", "": "",
	} {
		if got, err := plan.ParseGKE(in); got != want || (err == nil) != (want != "") {
			t.Errorf("ParseGKE(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestCompareGKE(t *testing.T) {
	t.Parallel()
	want := []string{"1.9.9-gke.9", "1.33.5-gke.200", "1.33.5-gke.1080000", "1.33.10-gke.1"}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, plan.CompareGKE)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sorted by CompareGKE (-want +got):\n%s", diff)
	}
}
