package registry_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// TestCheckPush checks that CheckPush finds out whether this client may write to a repository, and that it stores
// nothing.
func TestCheckPush(t *testing.T) {
	t.Parallel()
	var puts int
	inner := ggcr.New()
	writable := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut || r.Method == http.MethodPatch {
			puts++
		}
		inner.ServeHTTP(w, r)
	}))
	defer writable.Close()
	readOnly := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); r.Method == http.MethodPost && (user != "me" || password != "mine") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	defer readOnly.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	dir := t.TempDir()
	host := func(s *httptest.Server) string { return strings.TrimPrefix(s.URL, "http://") + "/prebake/driver" }
	rows := []struct {
		name, ref string
		o         registry.Options
		want      fault.Kind
		ok        bool
	}{
		{"open registry", host(writable), registry.Options{}, 0, true},
		{"right password", host(readOnly), registry.Options{Username: "me", Password: "mine"}, 0, true},
		{"may only read", host(readOnly), registry.Options{Username: "me", Password: "other"}, fault.PublishRefused, false},
		{"away", host(gone), registry.Options{}, fault.Transient, false},
		{"folder to be made", "oci:" + filepath.Join(dir, "a/b"), registry.Options{}, 0, true},
		{"no folder can be there", "oci:/proc/self/x", registry.Options{}, fault.Usage, false},
		{"not a name", "https://x/y", registry.Options{}, fault.Usage, false},
	}
	for _, row := range rows {
		err := registry.CheckPush(t.Context(), row.ref, row.o)
		if (err == nil) != row.ok || err != nil && (fault.Of(err) != row.want || fault.Hint(err) == "") {
			t.Errorf("%s: CheckPush(%s) = %v (%v), hint %q; want ok %t, %v", row.name, row.ref, err, fault.Of(err),
				fault.Hint(err), row.ok, row.want)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 || puts > 0 {
		t.Errorf("it left %v (%v) and put %d times; want no trace", left, err, puts)
	}
}
