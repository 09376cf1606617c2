package catalogue_test

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// TestReleasesByPage reads three COS builds with two boards page by page. No COS build may be split between pages.
func TestReleasesByPage(t *testing.T) {
	t.Parallel()
	c, _ := open(t)
	ctx := t.Context()
	for i := range 3 {
		for _, board := range []string{"lakitu", "lakitu-arm64"} {
			k := target.Kernel{BuildID: fmt.Sprintf("17800.0.%d", i), Board: board, Milestone: 109}
			if err := c.RecordKernel(ctx, api.Kernel{Kernel: k}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, row := range []struct {
		limit int
		want  []string // the BUILD_IDs on each page
	}{
		{6, []string{"17800.0.2 17800.0.1 17800.0.0 "}},
		{5, []string{"17800.0.2 17800.0.1 ", "17800.0.0 "}},
		{4, []string{"17800.0.2 ", "17800.0.1 17800.0.0 "}},
		{3, []string{"17800.0.2 ", "17800.0.1 ", "17800.0.0 "}},
	} {
		var got []string
		p := store.Page{Limit: row.limit}
		for len(got) < 10 {
			all, next, err := c.Releases(ctx, store.KernelFilter{}, p)
			if err != nil {
				t.Fatal(err)
			}
			page := ""
			for _, r := range all {
				page += r.BuildID + " "
				if len(r.Boards) != 2 || r.Milestone != 109 || r.SeenAt.IsZero() {
					t.Errorf("Releases(limit %d) has %+v; want both boards", row.limit, r)
				}
			}
			got = append(got, page)
			if p.After = next; next == "" {
				break
			}
		}
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("Releases(limit %d), page by page (-want +got):\n%s", row.limit, diff)
		}
	}
}
