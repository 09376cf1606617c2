package publish_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

// onPush runs a registry that creates a repository when a client with push rights asks for a token to push. Until then
// it denies every request. The token exchange follows the token specification of the distribution project. Status,
// challenge and scopes are those of Quay, from helm/helm#31567 (2025-11-25) and helm/helm#32144 (2026-05-22). In these
// issues a client that went on to use its token for reading could not push.
func onPush(t *testing.T) string {
	t.Helper()
	var made atomic.Bool
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: testkit.Registry(t, true)})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		switch {
		case r.URL.Path == "/token":
			user, password, _ := r.BasicAuth()
			answer := "pull"
			if user == "me" && password == "mine" && strings.Contains(r.URL.Query().Get("scope"), "push") {
				answer = "push"
				made.Store(true)
			}
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"token":"`+answer+`"}`)
		case token == "" || !made.Load() || token == "pull" && r.Method != http.MethodGet && r.Method != http.MethodHead:
			scope := "repository:prebake/driver:pull"
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				scope += ",push"
			}
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+r.Host+`/token",service="`+r.Host+`",scope="`+scope+`"`)
			w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","detail":{},"message":"access to the requested resource is not authorized"}]}`)
		default:
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// TestPublishMakesRepository checks that Publish works with a registry that creates a repository at the first push.
func TestPublishMakesRepository(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	for password, want := range map[string]fault.Kind{"mine": -1, "wrong": fault.Usage} {
		repo, err := registry.Open(onPush(t)+"/prebake/driver", registry.Options{Username: "me", Password: password})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = publish.Publish(t.Context(), repo, artifact(t, key, s))
		if want < 0 && err != nil || want >= 0 && fault.Of(err) != want {
			t.Errorf("with the password %q: Publish = %v (%v)", password, err, fault.Of(err))
		}
		if want < 0 {
			check(t, repo, key, s, 2)
		}
	}
}
