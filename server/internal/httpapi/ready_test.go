package httpapi

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// part stands in for a part of the server. Its Ping returns the given error.
type part struct{ err error }

func (p part) Ping(context.Context) error { return p.err }

// TestReadiness makes the parts of the server fail, one at a time. Nodes need only the catalogue; writes need every
// part.
func TestReadiness(t *testing.T) {
	t.Parallel()
	away := part{fault.New(fault.Transient, "dial tcp 10.1.2.3:5432: refused", "")}
	const text = "the server cannot answer right now; ask again; the server's log has the cause\n"
	rows := []struct {
		name                   string
		catalogue, queue, disk part
		read, write            int
		body                   string
	}{
		{"all works", part{}, part{}, part{}, 200, 200, "ok\n"},
		{"catalogue away", away, part{}, part{}, 503, 503, "catalogue: " + text},
		{"queue away", part{}, away, part{}, 200, 503, "queue: " + text},
		{"disk full", part{}, part{}, part{fault.New(fault.DiskFull, "0 MiB on /var", "")}, 200, 503,
			"disk: the server's disk is full; the server's log has the cause\n"},
		{"two parts", part{}, away, away, 200, 503, "queue: " + text + "disk: " + text},
	}
	for _, row := range rows {
		c := Config{Log: slog.New(slog.DiscardHandler), Disk: row.disk}
		c.Store = struct {
			part
			counter
			farmSource
		}{part: row.catalogue}
		c.Queue = struct {
			part
			depther
		}{part: row.queue}
		for path, want := range map[string]int{"/readyz": row.read, "/readyz?for=write": row.write} {
			w := httptest.NewRecorder()
			ready(c)(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
			if w.Code != want || w.Body.String() != row.body {
				t.Errorf("%s: GET %s = %d %q; want %d %q", row.name, path, w.Code, w.Body, want, row.body)
			}
		}
	}
}
