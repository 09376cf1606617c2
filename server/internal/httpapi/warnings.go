package httpapi

import (
	"context"

	"github.com/danielgtaylor/huma/v2"

	"github.com/prebake/prebake/pkg/api"
)

func (t table) warnings() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("list-warnings", "/v1/warnings", "List the failures that early-warning entries of wish lists found"),
		func(ctx context.Context, _ *struct{}) (*body[[]api.Warning], error) {
			return answer(cat.Warnings(ctx))
		},
	)
}
