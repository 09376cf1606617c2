package httpapi

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/auth"
)

// deadline returns a middleware that sets a connection's read and write deadlines. Without them, a client could block a
// handler for ever.
func deadline(d time.Duration) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			control, until := http.NewResponseController(w), time.Now().Add(d)
			// The errors are ignored: only the recorder of a test has no deadlines.
			_ = control.SetReadDeadline(until)
			_ = control.SetWriteDeadline(until)
			next.ServeHTTP(w, r)
		})
	}
}

func recoverPanics(log *slog.Logger) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() {
				cause := recover()
				if cause == nil {
					return
				}
				if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
					panic(cause)
				}
				log.ErrorContext(
					r.Context(),
					"request panicked",
					"method",
					r.Method,
					"path",
					r.URL.Path,
					"err",
					fmt.Sprint(cause),
					"stack",
					string(debug.Stack()),
				)
				writeProblem(w, problemOf(fault.Errorf(fault.Internal, "panic")))
			}()
			next.ServeHTTP(w, r)
		})
	}
}

// secureHeaders sets headers for browsers.
func secureHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set(
			"Content-Security-Policy",
			"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; "+
				"frame-ancestors 'none'; base-uri 'none'",
		)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		next.ServeHTTP(w, r)
	})
}

// boundRequestID is a middleware that removes a client's request id if it is too long or not one word. chi then makes a
// new id.
func boundRequestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !requestIDPattern.MatchString(r.Header.Get(middleware.RequestIDHeader)) {
			r.Header.Del(middleware.RequestIDHeader)
		}
		next.ServeHTTP(w, r)
	})
}

var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9_./-]{1,64}$`)

// logRequests returns a middleware that logs each request after its response: changes at level info, others at debug.
// It adds the request id to the response.
func logRequests(log *slog.Logger) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id := middleware.GetReqID(r.Context())
			w.Header().Set(middleware.RequestIDHeader, id)
			level := slog.LevelInfo
			if r.Method == http.MethodGet || r.Method == http.MethodHead {
				level = slog.LevelDebug
			}
			if !log.Enabled(r.Context(), level) {
				next.ServeHTTP(w, r)
				return
			}
			begin, seen := time.Now(), middleware.NewWrapResponseWriter(w, r.ProtoMajor)
			next.ServeHTTP(seen, r)
			log.Log(
				r.Context(),
				level,
				"request answered",
				"request",
				id,
				"method",
				r.Method,
				"path",
				r.URL.Path,
				"status",
				seen.Status(),
				"bytes",
				seen.BytesWritten(),
				"took",
				time.Since(begin),
				"from",
				r.RemoteAddr,
				"actor",
				auth.Noted(r.Context()).Name,
			)
		})
	}
}

// These are limits for requests that are served at the same time, and for those that wait. A page of a list takes some
// milliseconds of a core, and the response to a node much less. Clients that read large pages must not delay the nodes.
const (
	listsAtOnce, listsWaiting = 32, 256 // includes pages that clients read slowly
	callsAtOnce, callsWaiting = 64, 8192
	// Without a report in time, a builder counts as dead. So reports do not wait for other calls.
	reportsAtOnce, reportsWaiting = 16, 1024
	longestWait                   = 10 * time.Second
)

// listsMade is the maximum number of pages that the server makes at the same time: half of the cores, at least one. The
// other cores answer the nodes' requests.
func listsMade() int { return max(1, runtime.GOMAXPROCS(0)/2) }

// throttle returns a middleware that limits how many requests are served at the same time. If too many requests wait,
// it responds with status 503 and the Retry-After header. A page is made completely before it is sent, so that a slow
// reader does not delay the next page.
func throttle() func(http.Handler) http.Handler {
	of := func(limit, backlog int) func(http.Handler) http.Handler {
		return middleware.ThrottleWithOpts(middleware.ThrottleOpts{
			Limit: limit, BacklogLimit: backlog, BacklogTimeout: longestWait, StatusCode: http.StatusServiceUnavailable,
			RetryAfterFn: func(bool) time.Duration { return 5 * time.Second },
		})
	}
	lists, calls, making := of(listsAtOnce, listsWaiting), of(callsAtOnce, callsWaiting), of(listsMade(), listsAtOnce)
	reports := of(reportsAtOnce, reportsWaiting)
	return func(next http.Handler) http.Handler {
		large, small, report := lists(bufferResponse(making(next))), calls(next), reports(next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case isList(r):
				large.ServeHTTP(w, r)
			case r.Method == http.MethodPatch && strings.HasPrefix(r.URL.Path, "/v1/builds/"):
				report.ServeHTTP(w, r)
			default:
				small.ServeHTTP(w, r)
			}
		})
	}
}

// isList reports whether a request is for a page of a list, or for a web page that costs as much.
func isList(r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	switch r.URL.Path {
	case "/",
		"/v1/kernels",
		"/v1/drivers",
		"/v1/artifacts",
		"/v1/builds",
		"/v1/cells",
		"/v1/releases",
		"/v1/warnings",
		"/releases",
		"/queue",
		"/warnings",
		"/feed.atom",
		"/v1/reports",
		"/v1/quarantine":
		return true
	}
	return strings.HasPrefix(r.URL.Path, "/cells/")
}

// notFound returns a handler for unknown paths: a page for browsers, problem+json for others.
func notFound(pages http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if pages != nil && strings.Contains(r.Header.Get("Accept"), "text/html") {
			pages.ServeHTTP(w, r)
			return
		}
		writeProblem(
			w,
			problemOf(fault.New(fault.NotFound, "there is no "+r.URL.Path, "find the paths in /openapi.json")),
		)
	}
}

// methodNotAllowed returns a handler for a method that the path does not accept. The response lists the accepted
// methods (RFC 9110, 15.5.6).
func methodNotAllowed(routes chi.Routes) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var has []string
		for _, m := range []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch,
			http.MethodDelete} {
			if routes.Match(chi.NewRouteContext(), m, r.URL.Path) ||
				m == http.MethodHead && slices.Contains(has, http.MethodGet) {
				has = append(has, m)
			}
		}
		w.Header().Set("Allow", strings.Join(has, ", "))
		p := problemOf(fault.New(fault.Usage, "this path does not accept the method "+r.Method,
			"use "+strings.Join(has, " or ")))
		p.Status = http.StatusMethodNotAllowed
		writeProblem(w, p)
	}
}

func pathID(r *http.Request) (int64, error) {
	id, err := strconv.ParseInt(chi.URLParam(r, "id"), 10, 64)
	if err != nil || id < 1 {
		return 0, fault.New(
			fault.Usage,
			fmt.Sprintf("build %q is not a number", chi.URLParam(r, "id")),
			"take the number from the list of builds: server builds",
		)
	}
	return id, nil
}

func getLog(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, err := pathID(r)
		var log io.ReadSeekCloser
		if err == nil {
			log, _, err = c.Catalogue.OpenLog(r.Context(), id)
		}
		if err != nil {
			fail(w, r, c.Log, err)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		http.ServeContent(w, r, "", time.Time{}, log)
		if err := log.Close(); err != nil {
			c.Log.WarnContext(r.Context(), "log not closed", "build", id, "err", err)
		}
	}
}

func putLog(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, err := pathID(r)
		if err == nil {
			err = c.Catalogue.PutLog(r.Context(), id, r.Body)
		}
		if err != nil {
			fail(w, r, c.Log, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}
}

// appendLog adds a part to the log of a running build.
func appendLog(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, err := pathID(r)
		offset, perr := strconv.ParseInt(r.URL.Query().Get("offset"), 10, 64)
		if err == nil && (perr != nil || offset < 0) {
			err = fault.New(fault.Usage, "append to the log: offset is not a number of bytes",
				"add the offset of this part in the log, in bytes, to the query, such as ?offset=0")
		}
		var part []byte
		if err == nil { // read the whole part first: a reader of the log must not see half of a refused part
			part, err = io.ReadAll(http.MaxBytesReader(w, r.Body, api.MaxLiveLogPart))
		}
		if err == nil {
			err = c.Catalogue.AppendLog(r.Context(), id, offset, bytes.NewReader(part))
		}
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			err = fault.New(
				fault.TooLarge,
				fmt.Sprintf("append to the log: this part has more than %d kB", api.MaxLiveLogPart>>10),
				"send the log in smaller parts",
			)
		}
		if err != nil {
			fail(w, r, c.Log, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}
}
