package api_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestWebPage checks that the client recognises a login page that a network sends in place of the server's answer.
func TestWebPage(t *testing.T) {
	t.Parallel()
	for contentType, want := range map[string]fault.Kind{
		"text/html; charset=utf-8": fault.WebPage, "application/json": fault.Transient,
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			fmt.Fprint(w, "<html>log in to this network</html>")
		}))
		t.Cleanup(srv.Close)
		_, err := api.NewClient(srv.URL, "", nil).Resolve(t.Context(), api.Question{})
		if !fault.Is(err, want) || want == fault.WebPage && !strings.Contains(fault.Hint(err), srv.URL) {
			t.Errorf("Resolve of %s = %v, hint %q; want %v", contentType, err, fault.Hint(err), want)
		}
	}
}
