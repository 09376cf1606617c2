package web_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// TestMatrixIsOnePage checks that the page with the matrix shows at most 20 kernels, and leads to the next ones.
func TestMatrixIsOnePage(t *testing.T) {
	t.Parallel()
	cat, pages := farm(t)
	ctx := t.Context()
	for i := range 150 {
		k := api.Kernel{Kernel: target.Kernel{BuildID: fmt.Sprintf("17800.1.%d", i), Board: "lakitu", Milestone: 109}}
		check(t, cat.RecordKernel(ctx, k))
		_, err := cat.Request(ctx,
			api.BuildRequest{BuildID: k.BuildID, Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
		check(t, err)
	}
	seen := 0
	for path, steps := "/", 0; path != ""; steps++ {
		_, page := get(t, pages, path)
		rows := strings.Count(page, `<th scope="row">17800.1.`)
		if seen += rows; rows == 0 || rows > 20 || steps > 20 {
			t.Fatalf("GET %s has %d kernels, %d so far; want 1 to 20", path, rows, seen)
		}
		_, link, more := strings.Cut(page, `href="/?after=`)
		if path = ""; more {
			after, _, _ := strings.Cut(link, `"`)
			path = "/?after=" + after
		}
	}
	if seen != 150 {
		t.Errorf("all pages have %d kernels; want 150", seen)
	}
}
