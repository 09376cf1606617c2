// Package httpapi is the server's HTTP face: the route table with the access
// rule of each route, decoding, and the mapping of faults to problem+json. It
// refuses to decide anything about the catalogue, and holds no SQL.
package httpapi

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/auth"
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
		farmSource
	}
	Queue interface {
		checker
		depther
	}
	// Disk tells whether there is room to write; nil means not asked.
	Disk checker
	// Free tells the bytes that are left on the data folder's disk; nil means not asked.
	Free func() (uint64, error)
	// Registry serves /v2/; it has its own access rule.
	Registry http.Handler
	// Pages serves PageRoutes, and tells of pages that do not exist.
	Pages      http.Handler
	PageRoutes []string
	// Snapshot serves the files of a signed list below /snapshot/; nil means none.
	Snapshot http.Handler
	// Auth finds out who calls.
	Auth *auth.Authenticator
	// Access keeps tokens and the audit log.
	Access tokenStore
	// BuildsPerHour bounds the builds that a caller may add within an hour if asking is
	// all that it may do; 0 means 120.
	BuildsPerHour int
	// CallsPerMinute bounds the calls of each address; 0 means no bound.
	CallsPerMinute int
	// Stopping is closed when the server stops: who watches is let go. nil never is.
	Stopping <-chan struct{}
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

// defaultAsk is how many builds a caller that may only ask adds within an hour: the
// cells of some COS releases, and no whole matrix.
const defaultAsk = 120

// New returns the whole HTTP face.
func New(c Config) http.Handler {
	ownErrors()
	m := newMetrics(c)
	root := chi.NewRouter()
	// Every request sets its deadlines, refused ones too: those of the request
	// before would end the connection.
	root.Use(
		boundRequestID,
		middleware.RequestID,
		m.measure,
		audit(c),
		logRequests(c.Log),
		recoverPanics(c.Log),
		secureHeaders,
		deadline(shortCall),
		middleware.GetHead,
	)
	root.Group(func(r chi.Router) {
		r.Use(limitClients(c.CallsPerMinute), throttle(), etags)
		mountAPI(r, c)
		if c.Pages != nil {
			for _, page := range c.PageRoutes {
				r.Method(http.MethodGet, page, c.Pages)
			}
		}
	})
	root.Group(func(r chi.Router) {
		r.Get("/healthz", func(w http.ResponseWriter, _ *http.Request) { writeText(w, http.StatusOK, "ok\n") })
		r.Get("/readyz", ready(c))
		r.Method(http.MethodGet, "/metrics", m.handler())
	})
	root.Group(func(r chi.Router) {
		r.With(watchers()).Get("/v1/builds/{id}/events", events(c))
	})
	root.Group(func(r chi.Router) {
		r.Use(deadline(longCall))
		r.Get("/v1/builds/{id}/log", getLog(c))
		r.With(needScope(c, auth.Build)).Put("/v1/builds/{id}/log", putLog(c))
		r.With(needScope(c, auth.Build)).Patch("/v1/builds/{id}/log", appendLog(c))
		if c.Snapshot != nil {
			r.With(limitClients(c.CallsPerMinute)).Method(http.MethodGet, "/snapshot/*", c.Snapshot)
		}
		if c.Registry != nil {
			r.Handle("/v2", c.Registry)
			r.Handle("/v2/*", c.Registry)
		}
	})
	root.NotFound(notFound(c.Pages))
	root.MethodNotAllowed(methodNotAllowed(root))
	return root
}

func ready(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		for _, part := range []struct {
			name string
			checker
		}{{"catalogue", c.Store}, {"queue", c.Queue}, {"disk", c.Disk}} {
			if part.checker == nil {
				continue
			}
			if err := part.Ping(ctx); err != nil {
				c.Log.WarnContext(ctx, "not ready", "part", part.name, "err", err)
				writeText(w, http.StatusServiceUnavailable, part.name+": "+PublicText(fault.Of(err))+"\n")
				return
			}
		}
		writeText(w, http.StatusOK, "ok\n")
	}
}
