package api_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/page"
)

// TestListLink checks that a list ends where no Link header names a next page, and that a wrong or endless header is an
// error, not the end of the list.
func TestListLink(t *testing.T) {
	t.Parallel()
	next := func(target string) string { return "<" + target + `>; rel="next"` }
	for name, row := range map[string]struct {
		link string   // of the first page
		want []string // nil means an error
	}{
		"no link":              {"", []string{"1"}},
		"next":                 {next("/v1/drivers?after=1&limit=1000"), []string{"1", "2"}},
		"another link":         {`<?x>; rel="prev"`, []string{"1"}},
		"another form":         {`<?after=1>; title="x"; rel=next`, []string{"1", "2"}},
		"too long":             {next("/v1/drivers?after=1&x=" + strings.Repeat("x", page.MaxLink)), nil},
		"of another list":      {next("/v1/kernels?after=1"), nil},
		"of another server":    {next("http://other.example/v1/drivers?after=1"), nil},
		"behind another proxy": {next("/prebake/v1/drivers?after=1"), nil},
		"the same page":        {next("/v1/drivers?limit=1000"), nil},
		"of no form":           {`/v1/drivers?after=1; rel="next"`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				version := "2"
				if r.URL.Query().Get("after") == "" {
					version = "1"
					w.Header().Set("Link", row.link)
				}
				asked.Add(1)
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprintf(w, `[{"version":%q}]`, version)
			}))
			t.Cleanup(srv.Close)
			all, err := api.NewClient(srv.URL, "", nil).Drivers(t.Context())
			var got []string
			for _, d := range all {
				got = append(got, d.Version)
			}
			if diff := cmp.Diff(row.want, got); diff != "" || (err == nil) != (row.want != nil) {
				t.Errorf("Drivers = %.1000v (-want +got):\n%s", err, diff)
			}
			if row.want == nil && (!fault.Is(err, fault.Transient) || !strings.Contains(fault.Hint(err), "Link header") ||
				len(err.Error()) > 1<<10) {
				t.Errorf("Drivers = %.1000v (%v), hint %q; want a short transient error with the next step", err, fault.Of(err),
					fault.Hint(err))
			}
			if n := asked.Load(); n > 2 {
				t.Errorf("the server was asked %d times; want at most twice", n)
			}
		})
	}
}
