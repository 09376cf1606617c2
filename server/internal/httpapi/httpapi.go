// Package httpapi is the server's HTTP interface: the route table with scopes, the decoding of requests, and errors as
// problem+json. It decides nothing about the catalogue and has no SQL.
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

// checker is a part of the server that the readiness check pings.
type checker interface {
	Ping(ctx context.Context) error
}

// counter returns the numbers of builds and artifacts for each state.
type counter interface {
	CountBuilds(ctx context.Context) (map[api.State]int, error)
	CountArtifacts(ctx context.Context) (map[api.State]int, error)
}

// depther returns the number of jobs in the queue for each state.
type depther interface {
	Depth(ctx context.Context) (map[string]int, error)
}

// Config has the parts and settings of the handler.
type Config struct {
	Catalogue *catalogue.Catalogue
	// Store and Queue are used by the readiness check and the metrics.
	Store interface {
		checker
		counter
		farmSource
	}
	Queue interface {
		checker
		depther
	}
	// Disk reports whether there is room to write. nil skips the check.
	Disk checker
	// Free returns the free bytes of the data folder's disk. nil leaves out the metric.
	Free func() (uint64, error)
	// Damaged returns the number of damaged, lost and unreadable blobs of the registry. nil leaves out the metric.
	Damaged func() int
	// Registry serves /v2/ and checks access itself.
	Registry http.Handler
	// Pages serves the paths in PageRoutes, and the page for unknown addresses.
	Pages      http.Handler
	PageRoutes []string
	// Snapshot serves the files of a signed list, with paths below /snapshot/. nil means that there is no such list.
	Snapshot http.Handler
	// Auth identifies the caller.
	Auth *auth.Authenticator
	// Access stores the tokens and the audit log.
	Access tokenStore
	// BuildsPerHour is the maximum number of builds that a caller with only the scope ask may add within an hour; 0
	// means 120.
	BuildsPerHour int
	// CallsPerMinute is the maximum number of calls of each address in a minute; 0 means no limit.
	CallsPerMinute int
	// Stopping is closed when the server stops. Streams of watched builds then end. nil means never.
	Stopping <-chan struct{}
	// Port is the port that the server listens on; see [withoutOwnHost].
	Port string
	// Version appears in the API's description.
	Version string
	Log     *slog.Logger
}

// shortCall and longCall are time limits of one request. longCall is for blobs and logs.
const (
	shortCall = 30 * time.Second
	longCall  = 30 * time.Minute
)

// defaultAsk is the default of BuildsPerHour. It is enough for some COS builds, but not for a whole matrix.
const defaultAsk = 120

// New returns the handler of the whole HTTP interface.
func New(c Config) http.Handler {
	ownErrors()
	m := newMetrics(c)
	root := chi.NewRouter()
	// Each request sets new deadlines for its connection, even a refused one. Otherwise the former request's deadlines
	// would end the connection.
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

// readyTime is the time limit of a readiness check, and pingTime that of a part that nodes do not need.
const (
	readyTime = 5 * time.Second
	pingTime  = 2 * time.Second
)

// ready returns the handler of the readiness check: whether the server can serve nodes. Nodes need only the catalogue:
// without the queue or free space, the server still resolves and serves artifacts. With ?for=write, every part counts.
// The body names the parts that do not work.
func ready(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), readyTime)
		defer cancel()
		status, text := http.StatusOK, ""
		for _, part := range []struct {
			name   string
			needed bool
			limit  time.Duration
			checker
		}{
			{"catalogue", true, readyTime, c.Store},
			{"queue", r.URL.Query().Get("for") == "write", pingTime, c.Queue},
			{"disk", r.URL.Query().Get("for") == "write", pingTime, c.Disk},
		} {
			if part.checker == nil {
				continue
			}
			ctx, cancel := context.WithTimeout(ctx, part.limit)
			err := part.Ping(ctx)
			cancel()
			if err == nil {
				continue
			}
			c.Log.WarnContext(r.Context(), "part not ready", "part", part.name, "err", err)
			text += part.name + ": " + PublicText(fault.Of(err)) + "\n"
			if part.needed {
				status = http.StatusServiceUnavailable
			}
		}
		if text == "" {
			text = "ok\n"
		}
		writeText(w, status, text)
	}
}
