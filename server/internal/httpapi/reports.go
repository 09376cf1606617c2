package httpapi

import (
	"context"

	"github.com/danielgtaylor/huma/v2"

	"github.com/prebake/prebake/pkg/api"
)

func (t table) coverage() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("read-coverage", "/v1/coverage", "Read how much of what wish lists want is there"),
		func(ctx context.Context, _ *struct{}) (*body[api.Coverage], error) {
			return answer(cat.Coverage(ctx))
		},
	)
}
