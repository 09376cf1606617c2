package httpapi

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/prebake/prebake/pkg/fault"
)

// deadline bounds a request by the connection's own clocks, so that a client
// that stops reading or sending cannot hold a handler for ever.
func deadline(d time.Duration) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			control, until := http.NewResponseController(w), time.Now().Add(d)
			// A writer without deadlines is a test's recorder.
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
				log.ErrorContext(r.Context(), "request panicked", "method", r.Method, "path", r.URL.Path, "err", fmt.Sprint(cause), "stack", string(debug.Stack()))
				writeProblem(w, problemOf(fault.Errorf(fault.Internal, "panic")))
			}()
			next.ServeHTTP(w, r)
		})
	}
}

// secureHeaders are for the pages; the rest of the answers is not for browsers.
func secureHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		next.ServeHTTP(w, r)
	})
}

func pathID(r *http.Request) (int64, error) {
	id, err := strconv.ParseInt(chi.URLParam(r, "id"), 10, 64)
	if err != nil || id < 1 {
		return 0, fault.New(fault.Usage, fmt.Sprintf("build %q is not a number", chi.URLParam(r, "id")), "list builds: server builds")
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
