package httpapi

import (
	"context"
	"net/http"
	"net/netip"

	"github.com/danielgtaylor/huma/v2"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/catalogue"
)

func (t table) coverage() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("read-coverage", "/v1/coverage", "Read how much of the desired matrix is published"),
		func(ctx context.Context, _ *struct{}) (*body[api.Coverage], error) {
			return answer(cat.Coverage(ctx))
		},
	)
}

// From is the network of the client.
type From struct{ network string }

// Resolve reads the network from the request. The router calls it, because the network is not a parameter.
func (f *From) Resolve(ctx huma.Context) []error {
	at, _ := netip.ParseAddrPort(ctx.RemoteAddr()) // on an error, the network is unknown
	f.network = catalogue.Network(at.Addr())
	return nil
}

func (t table) reports() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.write(
			"report",
			auth.Ask,
			http.MethodPost,
			"/v1/reports",
			"Report what happened to an artifact on a node",
			http.StatusNoContent,
		),
		func(ctx context.Context, in *struct {
			From
			Body api.NodeReport
		}) (*struct{}, error) {
			if err := cat.Report(ctx, in.Body, in.network); err != nil {
				return nil, asProblem(err)
			}
			return nil, nil
		},
	)
	huma.Register(
		t,
		t.read("read-reports", "/v1/reports", "Count the nodes' reports; filter them by artifact, BUILD_ID or board"),
		func(ctx context.Context, in *struct {
			Digest  string `query:"digest" doc:"only reports about this artifact, sha256:…"`
			BuildID string `query:"buildId" doc:"only reports of nodes with this BUILD_ID"`
			Board   string `query:"board" doc:"only reports of nodes with this board"`
		}) (*body[[]api.ReportCounts], error) {
			return answer(cat.Reports(ctx, in.Digest, in.BuildID, in.Board))
		},
	)
	huma.Register(
		t,
		t.read("list-quarantine", "/v1/quarantine", "List the artifacts in quarantine, newest first"),
		func(ctx context.Context, in *struct{ PageQuery }) (*list[api.Quarantine], error) {
			all, next, err := cat.Quarantined(ctx, in.page())
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
	huma.Register(
		t,
		t.write(
			"lift",
			auth.Operate,
			http.MethodPost,
			"/v1/artifacts/{digest}/lift",
			"Make an artifact in quarantine usable again",
			http.StatusOK,
		),
		func(ctx context.Context, in *DigestPath) (*body[api.Artifact], error) {
			return answer(cat.Lift(ctx, in.Digest))
		},
	)
}
