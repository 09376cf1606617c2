package resolve_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
)

// TestServerRequest checks that a node asks the server for a build only if the server does not know the build yet.
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
		{"unknown", unknown, queued, nil, 1, api.Queued, "this node asked for the build"},
		{
			"the farm refuses",
			unknown,
			api.Build{},
			fault.New(fault.Usage, "no such token", "give the server's token"),
			1,
			api.Unknown,
			"no such token",
		},
		{
			"it failed before",
			api.Resolution{State: api.Failed, Reason: "does not compile"},
			queued,
			nil,
			0,
			api.Failed,
			"does not compile",
		},
		{"it was yanked", api.Resolution{State: api.Yanked}, queued, nil, 0, api.Yanked, ""},
		{"it is on its way", api.Resolution{State: api.Building}, queued, nil, 0, api.Building, ""},
		{"it will never be", api.Resolution{State: api.Unsupported}, queued, nil, 0, api.Unsupported, ""},
	}
	for _, row := range rows {
		var asked []api.BuildRequest
		s := resolve.Server{
			Client: &server{answers: []any{row.answer}},
			Request: func(_ context.Context, r api.BuildRequest) (api.Build, error) {
				asked = append(asked, r)
				return row.build, row.err
			},
		}
		a, err := resolve.Chain{s, resolve.NoSource{}}.Find(t.Context(), question)
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

// TestServerRequestFlavour checks that a node asks for a build with proprietary modules if its GPU needs them, even if
// open modules are published.
func TestServerRequestFlavour(t *testing.T) {
	t.Parallel()
	volta, turing := gpulist.GPU{Device: "0x1db1"}, gpulist.GPU{Device: "0x1eb8"}
	l := gpulist.List{
		Version: driver.Version,
		Chips:   []gpulist.Chip{{Device: "0x1eb8"}, {Device: "0x27b8", Features: []string{"kernelopen"}}},
	}
	lists := func(context.Context, string, string, target.Driver, target.Kernel) (*gpulist.List, error) {
		return &l, nil
	}
	unknown := api.Resolution{State: api.Unknown}
	for name, tc := range map[string]struct {
		gpu     gpulist.GPU
		answers []any
	}{
		"nothing is published":             {volta, []any{unknown}},
		"the open modules do not drive it": {turing, []any{published(func(*api.Resolution) {}), unknown}},
	} {
		var asked []string
		s := resolve.Server{
			Client: &server{answers: tc.answers},
			GPUs:   lists,
			Request: func(_ context.Context, r api.BuildRequest) (api.Build, error) {
				asked = append(asked, r.Flavour)
				return api.Build{
					ID:     3,
					State:  api.Queued,
					Driver: target.Driver{Version: driver.Version, Flavour: target.Flavour(r.Flavour)},
				}, nil
			},
		}
		q := question
		q.GPUs = []gpulist.GPU{tc.gpu}
		a, err := resolve.Chain{s}.Find(t.Context(), q)
		if err != nil || a.State != api.Queued || !slices.Equal(asked, []string{"proprietary"}) {
			t.Errorf("%s: Find = %+v, %v; asked for %q; want proprietary", name, a, err, asked)
		}
	}
}

// away is a finder whose server does not answer.
type away struct{}

func (away) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	return resolve.Answer{}, fault.New(fault.Transient, "nobody answers", "")
}

func TestServerRequestBesideOthers(t *testing.T) {
	t.Parallel()
	asked := 0
	s := resolve.Server{
		Client: &server{answers: []any{api.Resolution{State: api.Unknown}}},
		Request: func(context.Context, api.BuildRequest) (api.Build, error) {
			asked++
			return api.Build{ID: 3, State: api.Queued}, nil
		},
	}
	if a, err := (resolve.Chain{s, away{}}).Find(t.Context(), question); err != nil || a.State != api.Queued ||
		asked != 1 {
		t.Errorf("with a registry that is away: %+v, %v, asked %d times; want queued", a, err, asked)
	}
	has := &resolve.Registry{
		Ref:     "r.example/x",
		Resolve: func(context.Context, string) (string, error) { return digest, nil },
	}
	q := question
	q.Wish, q.Flavour = "535.261.03", "open"
	if a, err := (resolve.Chain{s, *has}).Find(t.Context(), q); err != nil || a.State != api.Published || asked != 1 {
		t.Errorf("with a registry that has it: %+v, %v, asked %d times; want published and no request", a, err, asked)
	}
}
