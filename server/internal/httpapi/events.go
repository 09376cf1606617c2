package httpapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/go-chi/chi/v5/middleware"

	"github.com/prebake/prebake/pkg/api"
)

// pollInterval is the pause between two checks of a watched build. After keepAliveInterval, an idle connection gets a
// comment, so that no proxy closes it.
const (
	pollInterval      = time.Second
	keepAliveInterval = 15 * time.Second
	longestWatch      = time.Hour
	longestWrite      = 30 * time.Second
	watchersAtAll     = 512
)

// events returns a handler that sends the states of a build as server-sent events
// (https://html.spec.whatwg.org/multipage/server-sent-events.html). Each event is named "build" and contains the build
// as in the API. The stream ends with the build, with the server, or after an hour.
func events(c Config) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		id, err := pathID(r)
		var b api.Build
		if err == nil {
			b, err = c.Catalogue.Build(ctx, id)
		}
		control := http.NewResponseController(w)
		if err == nil {
			// The client sends nothing more, but the server reads, so that it notices when the client goes away. The stream is
			// long, so this read has no deadline.
			err = control.SetReadDeadline(time.Time{})
			if errors.Is(err, http.ErrNotSupported) {
				err = nil // the recorder of a test has no deadlines
			}
		}
		if err != nil {
			fail(w, r, c.Log, err)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Cache-Control", "no-store")
		look, end := time.NewTicker(pollInterval), time.NewTimer(longestWatch)
		defer look.Stop()
		defer end.Stop()
		var sent []byte
		var at time.Time
		for {
			text, err := json.Marshal(b)
			if err != nil {
				c.Log.ErrorContext(ctx, "build not encoded", "build", id, "err", err)
				return
			}
			message := ""
			switch {
			case !bytes.Equal(text, sent):
				message = fmt.Sprintf("event: build\ndata: %s\n\n", text) // JSON text has no line breaks
			case time.Since(at) >= keepAliveInterval:
				message = ":\n\n"
			}
			if message != "" {
				_ = control.SetWriteDeadline(time.Now().Add(longestWrite)) // fails only for a recorder of a test
				if _, err := w.Write([]byte(message)); err != nil || control.Flush() != nil {
					return // the client is gone
				}
				sent, at = text, time.Now()
			}
			if b.State != api.Queued && b.State != api.Building {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-c.Stopping:
				return
			case <-end.C:
				return
			case <-look.C:
			}
			if b, err = c.Catalogue.Build(ctx, id); err != nil {
				if ctx.Err() == nil {
					c.Log.WarnContext(ctx, "build not watched any more", "build", id, "err", err)
				}
				return
			}
		}
	}
}

// watchers returns a middleware that limits how many clients watch builds at the same time.
func watchers() func(http.Handler) http.Handler {
	return middleware.ThrottleWithOpts(middleware.ThrottleOpts{
		Limit: watchersAtAll, StatusCode: http.StatusServiceUnavailable,
		RetryAfterFn: func(bool) time.Duration { return keepAliveInterval },
	})
}

// describeEvents adds the streaming route to the API's description.
func (t table) describeEvents(id *huma.Param) {
	op := t.read(
		"watch-build",
		"/v1/builds/{id}/events",
		"Watch a build: server-sent events named build, each with the build, until it ends",
	)
	op.Parameters = []*huma.Param{id}
	op.Responses = map[string]*huma.Response{strconv.Itoa(http.StatusOK): {
		Description: "the events",
		Content:     map[string]*huma.MediaType{"text/event-stream": {Schema: &huma.Schema{Type: huma.TypeString}}},
	}}
	t.OpenAPI().AddOperation(&op)
}
