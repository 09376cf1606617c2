// Package httpapi is the server's HTTP face: the route table with the access
// rule of each route, decoding, and the mapping of faults to problem+json. It
// refuses to decide anything about the catalogue, and holds no SQL.
package httpapi

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humachi"
	"github.com/go-chi/chi/v5"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/catalogue"
)

// checker is a part that readiness depends on.
type checker interface {
	Ping(ctx context.Context) error
}

// counter gives the numbers behind the metrics.
type counter interface {
	CountBuilds(ctx context.Context) (map[api.State]int, error)
	CountArtifacts(ctx context.Context) (map[api.State]int, error)
}

// depther tells how full the queue is.
type depther interface {
	Depth(ctx context.Context) (map[string]int, error)
}

// Config is what the handler is made of.
type Config struct {
	Catalogue *catalogue.Catalogue
	// Store and Queue are asked by readiness and metrics.
	Store interface {
		checker
		counter
	}
	Queue interface {
		checker
		depther
	}
	// Registry serves /v2/; it has its own access rule.
	Registry http.Handler
	// Pages serves /, /builds/{id} and /assets/.
	Pages http.Handler
	// Token opens the write routes.
	Token string
	// Port is the one that the server listens on; see relative.
	Port string
	// Version is told in the API's description.
	Version string
	Log     *slog.Logger
}

// Time bounds of one request. Blobs and logs may be large and links slow; all
// else is small.
const (
	shortCall = 30 * time.Second
	longCall  = 30 * time.Minute
)

// New returns the whole HTTP face.
func New(c Config) http.Handler {
	m := newMetrics(c)
	root := chi.NewRouter()
	// Every request sets its deadlines, refused ones too: those of the request
	// before would end the connection.
	root.Use(m.measure, recoverPanics(c.Log), secureHeaders, deadline(shortCall))
	root.Group(func(r chi.Router) {
		mountAPI(r, c)
		r.Get("/healthz", func(w http.ResponseWriter, _ *http.Request) { writeText(w, http.StatusOK, "ok\n") })
		r.Get("/readyz", ready(c))
		r.Method(http.MethodGet, "/metrics", m.handler())
		if c.Pages != nil {
			for _, page := range []string{"/", "/builds/{id}", "/assets/*"} {
				r.Method(http.MethodGet, page, c.Pages)
				r.Method(http.MethodHead, page, c.Pages)
			}
		}
	})
	root.Group(func(r chi.Router) {
		r.Use(deadline(longCall))
		r.Get("/v1/builds/{id}/log", getLog(c))
		r.With(needToken(c.Token)).Put("/v1/builds/{id}/log", putLog(c))
		if c.Registry != nil {
			r.Handle("/v2", c.Registry)
			r.Handle("/v2/*", c.Registry)
		}
	})
	root.NotFound(func(w http.ResponseWriter, _ *http.Request) {
		writeProblem(w, api.Problem{Title: "Not Found", Status: http.StatusNotFound, Kind: fault.Usage, Hint: "the routes are listed in /openapi.json"})
	})
	root.MethodNotAllowed(func(w http.ResponseWriter, _ *http.Request) {
		writeProblem(w, api.Problem{Title: "Method Not Allowed", Status: http.StatusMethodNotAllowed, Kind: fault.Usage, Hint: "the routes are listed in /openapi.json"})
	})
	return root
}

func ready(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		for _, part := range []checker{c.Store, c.Queue} {
			if err := part.Ping(ctx); err != nil {
				writeText(w, http.StatusServiceUnavailable, err.Error()+"\n")
				return
			}
		}
		writeText(w, http.StatusOK, "ok\n")
	}
}

// body wraps what a route answers, as the router's generics want it.
type body[T any] struct{ Body T }

func answer[T any](v T, err error) (*body[T], error) {
	if err != nil {
		return nil, asProblem(err)
	}
	return &body[T]{v}, nil
}

// BuildPath names a build. It and DigestPath are exported because the router fills embedded
// structs by reflection and passes over others in silence.
type BuildPath struct {
	ID int64 `path:"id" minimum:"1" doc:"number of the build"`
}

// DigestPath names an artifact.
type DigestPath struct {
	Digest string `path:"digest" doc:"digest of the artifact, sha256:…"`
}

// Asked learns the name by which a client reached the server.
type Asked struct{ host string }

// Resolve is the router's hook for what is not a parameter.
func (a *Asked) Resolve(ctx huma.Context) []error {
	a.host = ctx.Host()
	return nil
}

// relative takes the host from a repository that is on this server, since
// others reach the server by other names: a builder beside it says 127.0.0.1,
// which means something else on a node.
func relative(repository, asked, port string) string {
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

// mountAPI is the route table. A route with Security needs the token.
func mountAPI(r chi.Router, c Config) {
	cat := c.Catalogue
	a := humachi.New(r, apiConfig(c.Version, c.Log))
	a.UseMiddleware(checkSecurity(a, c.Token))
	read := func(id, path, what string) huma.Operation {
		return huma.Operation{OperationID: id, Method: http.MethodGet, Path: path, Summary: what}
	}
	write := func(id, method, path, what string, status int) huma.Operation {
		return huma.Operation{OperationID: id, Method: method, Path: path, Summary: what, DefaultStatus: status,
			MaxBodyBytes: 1 << 20, Security: []map[string][]string{{"token": {}}}}
	}
	huma.Register(a, read("list-kernels", "/v1/kernels", "List kernels"), func(ctx context.Context, _ *struct{}) (*body[[]api.Kernel], error) {
		return answer(cat.Kernels(ctx))
	})
	huma.Register(a, read("list-drivers", "/v1/drivers", "List driver versions"), func(ctx context.Context, _ *struct{}) (*body[[]api.DriverRelease], error) {
		return answer(cat.Drivers(ctx))
	})
	huma.Register(a, read("list-artifacts", "/v1/artifacts", "List artifacts"), func(ctx context.Context, _ *struct{}) (*body[[]api.Artifact], error) {
		return answer(cat.Artifacts(ctx))
	})
	huma.Register(a, read("resolve", "/v1/resolve", "Ask what a node should run"), func(ctx context.Context, in *struct {
		BuildID string `query:"buildId" doc:"BUILD_ID of /etc/os-release"`
		Board   string `query:"board" doc:"CHROMEOS_RELEASE_BOARD of /etc/lsb-release"`
		Driver  string `query:"driver" doc:"default (the default), latest, a branch or a version"`
		Flavour string `query:"flavour" doc:"auto (the default), proprietary or open"`
		Release string `query:"release" doc:"uname -r of the node; used only to refuse"`
	}) (*body[api.Resolution], error) {
		return answer(cat.Resolve(ctx, in.BuildID, in.Board, in.Driver, in.Flavour, in.Release))
	})
	huma.Register(a, read("list-builds", "/v1/builds", "List builds, newest first"), func(ctx context.Context, in *struct {
		State string `query:"state" doc:"only builds in this state"`
	}) (*body[[]api.Build], error) {
		return answer(cat.Builds(ctx, api.State(in.State)))
	})
	huma.Register(a, read("read-build", "/v1/builds/{id}", "Read a build"), func(ctx context.Context, in *BuildPath) (*body[api.Build], error) {
		return answer(cat.Build(ctx, in.ID))
	})
	huma.Register(a, write("request-build", http.MethodPost, "/v1/builds", "Ask for a build", http.StatusAccepted),
		func(ctx context.Context, in *body[api.BuildRequest]) (*body[api.Build], error) {
			return answer(cat.Request(ctx, in.Body))
		})
	huma.Register(a, write("update-build", http.MethodPatch, "/v1/builds/{id}", "Report a build's progress", http.StatusOK),
		func(ctx context.Context, in *struct {
			BuildPath
			Asked
			Body api.BuildUpdate
		}) (*body[api.Build], error) {
			in.Body.Repository = relative(in.Body.Repository, in.host, c.Port)
			return answer(cat.Update(ctx, in.ID, in.Body))
		})
	huma.Register(a, write("add-artifact", http.MethodPost, "/v1/artifacts", "Record a published artifact", http.StatusOK),
		func(ctx context.Context, in *struct {
			Asked
			Body api.Artifact
		}) (*body[api.Artifact], error) {
			in.Body.Repository = relative(in.Body.Repository, in.host, c.Port)
			return answer(cat.AddArtifact(ctx, in.Body))
		})
	huma.Register(a, write("yank", http.MethodPost, "/v1/artifacts/{digest}/yank", "Mark an artifact as not to be used", http.StatusOK),
		func(ctx context.Context, in *struct {
			DigestPath
			Body api.YankRequest
		}) (*body[api.Artifact], error) {
			return answer(cat.Yank(ctx, in.Digest, in.Body.Reason))
		})
	huma.Register(a, write("unyank", http.MethodPost, "/v1/artifacts/{digest}/unyank", "Take a yank back", http.StatusOK),
		func(ctx context.Context, in *DigestPath) (*body[api.Artifact], error) {
			return answer(cat.Unyank(ctx, in.Digest))
		})
}
