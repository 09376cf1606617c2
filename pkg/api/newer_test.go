package api_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestNewerServer has a newer server, whose answers have kinds of failures that this client does not know. The client
// must keep the text of the error, and take a kind from the HTTP status.
func TestNewerServer(t *testing.T) {
	t.Parallel()
	var status int
	var body string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if status >= http.StatusBadRequest {
			w.Header().Set("Content-Type", "application/problem+json")
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}))
	t.Cleanup(srv.Close)
	c := api.NewClient(srv.URL, "", nil)
	for is, want := range map[int]fault.Kind{
		http.StatusBadGateway: fault.Transient, http.StatusConflict: fault.Usage, http.StatusForbidden: fault.Forbidden,
	} {
		status, body = is, fmt.Sprintf(`{"title": "t", "status": %d, "detail": "odd page", "kind": "new-trouble", `+
			`"hint": "log in"}`, is)
		_, err := c.Build(t.Context(), 1)
		if !fault.Is(err, want) || err.Error() != "odd page" || fault.Hint(err) != "log in" {
			t.Errorf("Build() with status %d = %v of kind %v, hint %q; want odd page of kind %v, log in", is, err,
				fault.Of(err), fault.Hint(err), want)
		}
	}
	status, body = http.StatusOK, `{"id": 1, "state": "failed", "class": "new-trouble", "error": "odd page", "new": {}}`
	if b, err := c.Build(t.Context(), 1); err != nil || b.Class != "new-trouble" || b.Error != "odd page" {
		t.Errorf("Build() = %+v, %v; want class new-trouble", b, err)
	}
}
