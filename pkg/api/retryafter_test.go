package api_test

import (
	"math"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestRetryAfter checks that an error has the wait that the header Retry-After asks for, whether the server or a proxy
// answered.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		header, kind, body string
		status             int
		least, most        time.Duration
		want               fault.Kind
	}{
		"the server's": {
			"90", "application/problem+json", `{"status":429,"kind":"too-many"}`, 429, 90 * time.Second, 90 * time.Second,
			fault.TooMany,
		},
		"a proxy's":      {"7", "text/html", "", 503, 7 * time.Second, 7 * time.Second, fault.Transient},
		"a date":         {"Wed, 01 Jan 2200 00:00:00 GMT", "text/html", "", 429, time.Hour, math.MaxInt64, fault.Transient},
		"a date of past": {"Wed, 01 Jan 2020 00:00:00 GMT", "text/html", "", 503, 0, 0, fault.Transient},
		"none":           {"", "text/html", "", 503, 0, 0, fault.Transient},
		"junk":           {"soon", "text/html", "", 503, 0, 0, fault.Transient},
		"negative":       {"-5", "text/html", "", 503, 0, 0, fault.Transient},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if row.header != "" {
				w.Header().Set("Retry-After", row.header)
			}
			w.Header().Set("Content-Type", row.kind)
			w.WriteHeader(row.status)
			_, _ = w.Write([]byte(row.body))
		}))
		_, err := api.NewClient(srv.URL, "", nil).Resolve(t.Context(), api.Question{})
		srv.Close()
		if wait := api.RetryAfter(err); wait < row.least || wait > row.most || !fault.Is(err, row.want) {
			t.Errorf("%s: %v after %v; want %v after %v to %v", name, err, wait, row.want, row.least, row.most)
		}
	}
}
