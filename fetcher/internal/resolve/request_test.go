package resolve_test

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestServerRequest has a node ask for what nobody asked for yet, and for nothing else.
func TestServerRequest(t *testing.T) {
	t.Parallel()
	unknown := api.Resolution{State: api.Unknown, Reason: "nobody asked for it"}
	queued := api.Build{ID: 9, State: api.Queued, Driver: driver}
	rows := []struct {
		name   string
		answer api.Resolution
		build  api.Build
		err    error
		asks   int
		state  api.State
		reason string
	}{
		{"unknown", unknown, queued, nil, 1, api.Queued, "this node asked for it"},
		{"the farm refuses", unknown, api.Build{}, fault.New(fault.Usage, "no such token", "give the server's token"), 1, api.Unknown, "no such token"},
		{"it failed before", api.Resolution{State: api.Failed, Reason: "does not compile"}, queued, nil, 0, api.Failed, "does not compile"},
		{"it was yanked", api.Resolution{State: api.Yanked}, queued, nil, 0, api.Yanked, ""},
		{"it is on its way", api.Resolution{State: api.Building}, queued, nil, 0, api.Building, ""},
		{"it will never be", api.Resolution{State: api.Unsupported}, queued, nil, 0, api.Unsupported, ""},
	}
	for _, row := range rows {
		var asked []api.BuildRequest
		s := resolve.Server{Client: &server{answers: []any{row.answer}}, Request: func(_ context.Context, r api.BuildRequest) (api.Build, error) {
			asked = append(asked, r)
			return row.build, row.err
		}}
		a, err := resolve.Chain{s, resolve.Nobody{}}.Find(t.Context(), question)
		if err != nil || a.State != row.state || !strings.Contains(a.Reason, row.reason) {
			t.Errorf("%s: Find = %+v, %v; want %s with %q", row.name, a, err, row.state, row.reason)
		}
		if row.err != nil && fault.Hint(a.Err()) != fault.Hint(row.err) {
			t.Errorf("%s: hint %q", row.name, fault.Hint(a.Err()))
		}
		var want []api.BuildRequest
		for range row.asks {
			want = append(want, api.BuildRequest{BuildID: "1.2.3", Board: "lakitu", Driver: "R535", Flavour: "auto"})
		}
		if diff := cmp.Diff(want, asked); diff != "" {
			t.Errorf("%s: asked for (-want +got):\n%s", row.name, diff)
		}
	}
}
