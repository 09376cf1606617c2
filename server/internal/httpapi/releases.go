package httpapi

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/store"
)

func (t table) releases() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.write(
			"announce-release", auth.Announce,
			http.MethodPost,
			"/v1/releases",
			"Announce a COS build: the server looks it up and queues builds for it at once",
			http.StatusOK,
		),
		func(ctx context.Context, in *body[api.ReleaseNote]) (*body[api.Release], error) {
			return answer(cat.Announce(ctx, in.Body.BuildID))
		},
	)
	huma.Register(
		t,
		t.read("list-releases", "/v1/releases", "List COS builds with the states of their cells, newest first"),
		func(ctx context.Context, in *struct {
			PageQuery
			Board     string `query:"board" doc:"only kernels of this board"`
			Milestone int    `query:"milestone" minimum:"0" doc:"COS milestone, such as 109"`
		}) (*list[api.ReleaseSummary], error) {
			all, next, err := cat.Releases(ctx, store.KernelFilter{Board: in.Board, Milestone: in.Milestone}, in.page())
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
	huma.Register(
		t,
		t.read("read-release", "/v1/releases/{buildId}", "Read the states of a COS build's cells"),
		func(ctx context.Context, in *struct {
			BuildID string `path:"buildId" doc:"BUILD_ID of /etc/os-release"`
		}) (*body[api.Release], error) {
			return answer(cat.Release(ctx, in.BuildID))
		},
	)
	huma.Register(
		t,
		t.read(
			"read-ready-times",
			"/v1/ready-times",
			"Read how long cells took from the discovery of their COS build until they were ready",
		),
		func(ctx context.Context, in *struct {
			Days int `query:"days" minimum:"1" maximum:"3660" default:"30" doc:"only cells that became ready within this number of days"`
		}) (*body[api.ReadyDuration], error) {
			return answer(cat.ReadyTimes(ctx, in.Days))
		},
	)
	// Preflight is a POST, because its input is in the body. It changes nothing and needs no token.
	ask := t.read("preflight", "/v1/preflight", "Ask whether node pools may move to COS builds")
	ask.Method, ask.MaxBodyBytes = http.MethodPost, 1<<20
	huma.Register(t, ask, func(ctx context.Context, in *body[api.PreflightRequest]) (*body[api.Preflight], error) {
		return answer(cat.Preflight(ctx, in.Body))
	})
}
