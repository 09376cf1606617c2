package httpapi

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
	"github.com/go-chi/chi/v5"
	"golang.org/x/time/rate"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/store"
)

// Types that inputs embed must be exported: the router ignores unexported embedded structs silently.

// body is a response or an input with the body T, in the form that the router needs.
type body[T any] struct{ Body T }

func answer[T any](v T, err error) (*body[T], error) {
	if err != nil {
		return nil, asProblem(err)
	}
	return &body[T]{v}, nil
}

// list is a response with a page of a list.
type list[T any] struct {
	Link string `header:"Link" doc:"link to the next page (rel=next), if there is one (RFC 8288)"`
	Body []T
}

// PageQuery is the input that says which page of a list to return.
type PageQuery struct {
	Limit int    `query:"limit" minimum:"0" maximum:"1000" doc:"maximum number of entries of the page (of kernels, for cells and matrices); 0 means 100"`
	After string `query:"after" maxLength:"1024" doc:"cursor from the Link header of the previous page"`

	at url.URL
}

// Resolve reads the URL of the request. The router calls it, because the URL is not a parameter.
func (p *PageQuery) Resolve(ctx huma.Context) []error {
	p.at = ctx.URL()
	return nil
}

func (p *PageQuery) page() store.Page { return store.Page{After: p.After, Limit: p.Limit} }

// pageAnswer returns a page of a list, with a link to the next page.
func pageAnswer[T any](p *PageQuery, all []T, next string, err error) (*list[T], error) {
	if err != nil {
		return nil, asProblem(err)
	}
	out := &list[T]{Body: all}
	if next != "" {
		query := p.at.Query()
		query.Set("after", next)
		out.Link = fmt.Sprintf("<%s?%s>; rel=\"next\"", p.at.EscapedPath(), query.Encode())
	}
	return out, nil
}

// KernelQuery is the input that says which kernels to return.
type KernelQuery struct {
	BuildID   string `query:"buildId" doc:"BUILD_ID of /etc/os-release"`
	Board     string `query:"board" doc:"CHROMEOS_RELEASE_BOARD of /etc/lsb-release"`
	Milestone int    `query:"milestone" minimum:"0" doc:"COS milestone, such as 109"`
}

func (k *KernelQuery) filter() store.KernelFilter {
	return store.KernelFilter{BuildID: k.BuildID, Board: k.Board, Milestone: k.Milestone}
}

// GKEQuery is a [KernelQuery] that can also choose kernels by the GKE version whose nodes boot them.
type GKEQuery struct {
	KernelQuery
	GKE string `query:"gke" doc:"version of GKE whose nodes boot the kernel, or the beginning of a version: 1.33"`
}

func (k *GKEQuery) filter() store.KernelFilter {
	f := k.KernelQuery.filter()
	f.GKE = k.GKE
	return f
}

// BuildPath is the input of routes with the number of a build in their path.
type BuildPath struct {
	ID int64 `path:"id" minimum:"1" doc:"number of the build"`
}

// DigestPath is the input of routes with the digest of an artifact in their path.
type DigestPath struct {
	Digest string `path:"digest" doc:"digest of the artifact, sha256:…"`
}

// Asked has the host name by which the client reached the server.
type Asked struct{ host string }

// Resolve reads the host name from the request. The router calls it, because the host name is not a parameter.
func (a *Asked) Resolve(ctx huma.Context) []error {
	a.host = ctx.Host()
	return nil
}

// withoutOwnHost removes this server's host from a repository: the name that the client used, or a loopback address.
// For a node, a builder's 127.0.0.1 would be the node itself.
func withoutOwnHost(repository, asked, port string) string {
	host, rest, ok := strings.Cut(repository, "/")
	if !ok || host == "" {
		return repository
	}
	name, at, err := net.SplitHostPort(host)
	loopback := err == nil && at == port && (name == "localhost" || net.ParseIP(name).IsLoopback())
	if host == asked || loopback {
		return "/" + rest
	}
	return repository
}

// table is the route table. Its methods register routes.
type table struct {
	huma.API
	Config
	callers *callers
}

func (table) read(id, path, what string) huma.Operation {
	return huma.Operation{
		OperationID: id,
		Method:      http.MethodGet,
		Path:        path,
		Summary:     what,
		Errors:      []int{http.StatusBadRequest},
	}
}

// adminRead returns an operation that reads and that needs the scope admin.
func (t table) adminRead(id, path, what string) huma.Operation {
	op := t.read(id, path, what)
	op.Security = []map[string][]string{{schemeName: {string(auth.Admin)}}}
	op.Errors = append(op.Errors, http.StatusUnauthorized, http.StatusForbidden)
	return op
}

// write returns an operation that changes something and needs a scope.
func (table) write(id string, scope auth.Scope, method, path, what string, status int) huma.Operation {
	return huma.Operation{OperationID: id, Method: method, Path: path, Summary: what, DefaultStatus: status,
		MaxBodyBytes: 1 << 20, Security: []map[string][]string{{schemeName: {string(scope)}}},
		Errors: []int{
			http.StatusBadRequest,
			http.StatusUnauthorized,
			http.StatusForbidden,
			http.StatusNotFound,
			http.StatusConflict,
			http.StatusRequestEntityTooLarge,
		}}
}

// mountAPI registers all routes of the API.
func mountAPI(r chi.Router, c Config) {
	t := table{
		humachi.New(r, apiConfig(c.Version, c.Log)),
		c,
		&callers{perHour: cmp.Or(c.BuildsPerHour, defaultAsk), of: map[string]*rate.Limiter{}},
	}
	t.UseMiddleware(checkSecurity(t, c), refuseUnknown(t))
	t.lists()
	t.cells()
	t.builds()
	t.artifacts()
	t.releases()
	t.wishLists()
	t.access()
	t.eventRoutes()
	t.coverage()
	t.warnings()
	t.reports()
}

func (t table) lists() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("list-kernels", "/v1/kernels", "List kernels, newest first"),
		func(ctx context.Context, in *struct {
			PageQuery
			GKEQuery
		}) (*list[api.Kernel], error) {
			all, next, err := cat.Kernels(ctx, in.filter(), in.page())
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
	huma.Register(
		t,
		t.read("list-drivers", "/v1/drivers", "List driver versions, newest first"),
		func(ctx context.Context, in *struct {
			PageQuery
		}) (*list[api.DriverRelease], error) {
			all, next, err := cat.Drivers(ctx, in.page())
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
	huma.Register(
		t,
		t.read("list-builds", "/v1/builds", "List builds, newest first"),
		func(ctx context.Context, in *struct {
			PageQuery
			KernelQuery
			State   string `query:"state" doc:"only builds in this state: queued, building, published, failed or cancelled"`
			Driver  string `query:"driver" doc:"only of this driver version"`
			Flavour string `query:"flavour" enum:"proprietary,open" doc:"only of this flavour"`
		}) (*list[api.Build], error) {
			all, next, err := cat.Builds(ctx, store.BuildFilter{State: api.State(in.State), BuildID: in.BuildID, Board: in.Board,
				Milestone: in.Milestone, Driver: in.Driver, Flavour: target.Flavour(in.Flavour)}, in.page())
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
	huma.Register(
		t,
		t.read("list-artifacts", "/v1/artifacts", "List artifacts, newest first"),
		func(ctx context.Context, in *struct {
			PageQuery
			BuildID string `query:"buildId" doc:"only those attested for this BUILD_ID"`
			Board   string `query:"board" doc:"only those attested for this board"`
			State   string `query:"state" doc:"only those in this state: published, yanked or quarantined"`
			Driver  string `query:"driver" doc:"only of this driver version"`
			Flavour string `query:"flavour" enum:"proprietary,open" doc:"only of this flavour"`
		}) (*list[api.Artifact], error) {
			all, next, err := cat.Artifacts(
				ctx,
				store.ArtifactFilter{State: api.State(in.State), BuildID: in.BuildID, Board: in.Board,
					Driver: in.Driver, Flavour: target.Flavour(in.Flavour)},
				in.page(),
			)
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
}

func (t table) cells() {
	cat := t.Catalogue
	huma.Register(t, t.read("resolve", "/v1/resolve", "Ask for a node's artifact"), func(ctx context.Context, in *struct {
		BuildID string `query:"buildId" doc:"BUILD_ID of /etc/os-release"`
		Board   string `query:"board" doc:"CHROMEOS_RELEASE_BOARD of /etc/lsb-release"`
		Driver  string `query:"driver" doc:"default (the default), latest or a branch, each also for a type of GPU as in default@NVIDIA_L4; or a version"`
		Flavour string `query:"flavour" doc:"auto (the default), proprietary or open"`
		Release string `query:"release" doc:"uname -r of the node; a release other than the kernel's is refused"`
	}) (*body[api.Resolution], error) {
		return answer(cat.Resolve(ctx, in.BuildID, in.Board, in.Driver, in.Flavour, in.Release))
	})
	huma.Register(
		t,
		t.read("list-cells", "/v1/cells", "List the states of the cells of a page of kernels"),
		func(ctx context.Context, in *struct {
			PageQuery
			GKEQuery
			State  string `query:"state" doc:"only cells in this state: building, queued, failed, yanked, quarantined or cancelled"`
			Driver string `query:"driver" doc:"only of this driver version"`
		}) (*list[api.Resolution], error) {
			f := in.filter()
			f.State = api.State(in.State)
			all, next, err := cat.Cells(ctx, f, in.Driver, in.page())
			return pageAnswer(&in.PageQuery, all, next, err)
		},
	)
}

func (t table) builds() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("read-build", "/v1/builds/{id}", "Read a build"),
		func(ctx context.Context, in *BuildPath) (*body[api.Build], error) {
			return answer(cat.Build(ctx, in.ID))
		},
	)
	huma.Register(
		t,
		t.write("request-build", auth.Ask, http.MethodPost, "/v1/builds", "Ask for a build", http.StatusAccepted),
		func(ctx context.Context, in *body[api.BuildRequest]) (*body[api.Build], error) {
			return answer(cat.RequestAs(ctx, in.Body, t.callers.caller(ctx)))
		},
	)
	huma.Register(
		t,
		t.write("update-build", auth.Build, http.MethodPatch, "/v1/builds/{id}", "Report a build's progress", http.StatusOK),
		func(ctx context.Context, in *struct {
			BuildPath
			Asked
			Body api.BuildUpdate
		}) (*body[api.Build], error) {
			in.Body.Repository = withoutOwnHost(in.Body.Repository, in.host, t.Port)
			return answer(cat.Update(ctx, in.ID, in.Body))
		},
	)
	huma.Register(
		t,
		t.write("cancel-build", auth.Operate, http.MethodPost, "/v1/builds/{id}/cancel", "Cancel a build", http.StatusOK),
		func(ctx context.Context, in *BuildPath) (*body[api.Build], error) {
			return answer(cat.Cancel(ctx, in.ID))
		},
	)
	// These routes are only described here. [New] registers their handlers, because the router cannot stream logs.
	text := map[string]*huma.MediaType{"text/plain": {Schema: &huma.Schema{Type: huma.TypeString}}}
	id := &huma.Param{
		Name:        "id",
		In:          "path",
		Required:    true,
		Description: "number of the build",
		Schema:      &huma.Schema{Type: huma.TypeInteger, Format: "int64"},
	}
	t.describeEvents(id)
	read := t.read(
		"read-log",
		"/v1/builds/{id}/log",
		"Read a build's log, or the log so far if the build runs; range requests work",
	)
	read.Parameters = []*huma.Param{id}
	read.Responses = map[string]*huma.Response{
		strconv.Itoa(http.StatusOK): {Description: "the log", Content: text},
		strconv.Itoa(http.StatusPartialContent): {
			Description: "the requested range of the log",
			Content:     text,
		},
		strconv.Itoa(http.StatusRequestedRangeNotSatisfiable): {Description: "the log has no such range", Content: text},
	}
	t.OpenAPI().AddOperation(&read)
	write := t.write(
		"put-log", auth.Build,
		http.MethodPut,
		"/v1/builds/{id}/log",
		"Store a build's log, in place of an earlier log",
		http.StatusNoContent,
	)
	write.Parameters = read.Parameters
	write.RequestBody = &huma.RequestBody{Required: true, Content: text}
	write.Responses = map[string]*huma.Response{strconv.Itoa(http.StatusNoContent): {Description: "stored"}}
	t.OpenAPI().AddOperation(&write)
	more := t.write(
		"append-log", auth.Build,
		http.MethodPatch,
		"/v1/builds/{id}/log",
		"Append to the log of a running build",
		http.StatusNoContent,
	)
	more.Parameters = []*huma.Param{id, {
		Name:        "offset",
		In:          "query",
		Required:    true,
		Description: "offset of the text in the log, in bytes; 0 starts the log again",
		Schema:      &huma.Schema{Type: huma.TypeInteger, Format: "int64"},
	}}
	more.RequestBody, more.Responses = write.RequestBody, map[string]*huma.Response{
		strconv.Itoa(http.StatusNoContent): {Description: "stored"},
	}
	t.OpenAPI().AddOperation(&more)
}

func (t table) artifacts() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("read-artifact", "/v1/artifacts/{digest}", "Read an artifact"),
		func(ctx context.Context, in *DigestPath) (*body[api.Artifact], error) {
			return answer(cat.Artifact(ctx, in.Digest))
		},
	)
	huma.Register(
		t,
		t.write("add-artifact", auth.Build, http.MethodPost, "/v1/artifacts", "Record a published artifact", http.StatusOK),
		func(ctx context.Context, in *struct {
			Asked
			Body api.NewArtifact
		}) (*body[api.Artifact], error) {
			in.Body.Repository = withoutOwnHost(in.Body.Repository, in.host, t.Port)
			return answer(cat.AddArtifact(ctx, in.Body))
		},
	)
	huma.Register(
		t,
		t.write("forget-artifact", auth.Operate, http.MethodDelete, "/v1/artifacts/{digest}",
			"Forget a published artifact that the server's registry lacks", http.StatusNoContent),
		func(ctx context.Context, in *DigestPath) (*struct{}, error) {
			if err := cat.ForgetAbsent(ctx, in.Digest); err != nil {
				return nil, asProblem(err)
			}
			return nil, nil
		},
	)
	huma.Register(
		t,
		t.write(
			"yank",
			auth.Operate,
			http.MethodPost,
			"/v1/artifacts/{digest}/yank",
			"Yank an artifact: no node gets it any more",
			http.StatusOK,
		),
		func(ctx context.Context, in *struct {
			DigestPath
			Body api.YankRequest
		}) (*body[api.Artifact], error) {
			return answer(cat.Yank(ctx, in.Digest, in.Body))
		},
	)
	huma.Register(
		t,
		t.write("unyank", auth.Operate, http.MethodPost, "/v1/artifacts/{digest}/unyank", "Undo a yank", http.StatusOK),
		func(ctx context.Context, in *DigestPath) (*body[api.Artifact], error) {
			return answer(cat.Unyank(ctx, in.Digest))
		},
	)
	huma.Register(
		t,
		t.write("free-tags", auth.Operate, http.MethodPost, "/v1/artifacts/{digest}/free-tags",
			"Allow other content for the tags of an artifact that was deleted from the server's registry", http.StatusOK),
		func(ctx context.Context, in *DigestPath) (*body[api.FreedTags], error) {
			return answer(cat.FreeTags(ctx, in.Digest))
		},
	)
}

// WishListPath is the input of routes with the name of a wish list in their path.
type WishListPath struct {
	Name string `path:"name" doc:"name of the wish list"`
}

func (t table) wishLists() {
	cat := t.Catalogue
	huma.Register(
		t,
		t.read("list-wish-lists", "/v1/wish-lists", "List wish lists"),
		func(ctx context.Context, _ *struct{}) (*body[[]api.WishList], error) {
			return answer(cat.WishLists(ctx))
		},
	)
	huma.Register(
		t,
		t.read("read-wish-list", "/v1/wish-lists/{name}", "Read a wish list"),
		func(ctx context.Context, in *WishListPath) (*body[api.WishList], error) {
			return answer(cat.WishList(ctx, in.Name))
		},
	)
	huma.Register(
		t,
		t.write("put-wish-list", auth.Operate, http.MethodPut, "/v1/wish-lists/{name}", "Store a wish list", http.StatusOK),
		func(ctx context.Context, in *struct {
			WishListPath
			Body api.NewWishList
		}) (*body[api.WishList], error) {
			return answer(cat.PutWishList(ctx, in.Name, in.Body.Text, in.Body.Version))
		},
	)
	huma.Register(
		t,
		t.write(
			"drop-wish-list", auth.Operate,
			http.MethodDelete,
			"/v1/wish-lists/{name}",
			"Remove a wish list; artifacts that were built for it stay",
			http.StatusNoContent,
		),
		func(ctx context.Context, in *WishListPath) (*struct{}, error) {
			if err := cat.DropWishList(ctx, in.Name); err != nil {
				return nil, asProblem(err)
			}
			return nil, nil
		},
	)
}
