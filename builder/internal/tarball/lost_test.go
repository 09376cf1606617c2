package tarball_test

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// loser is a proxy in front of the storage emulator. For each suffix in names, it forwards one upload or removal of an
// object with this suffix and drops the answer.
type loser struct {
	next  http.Handler
	names []string

	mu   sync.Mutex
	lost []string
}

func (l *loser) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("name")
	if r.Method == http.MethodDelete {
		name = r.URL.Path
	}
	if (r.Method == http.MethodPost || r.Method == http.MethodDelete) && l.loses(name) {
		l.next.ServeHTTP(httptest.NewRecorder(), r)
		panic(http.ErrAbortHandler) // the connection ends without an answer
	}
	l.next.ServeHTTP(w, r)
}

func (l *loser) loses(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, suffix := range l.names {
		if strings.HasSuffix(name, suffix) {
			l.names = append(l.names[:i:i], l.names[i+1:]...)
			l.lost = append(l.lost, name)
			return true
		}
	}
	return false
}

// TestLostAnswers loses the answer to an upload that succeeded. The library sends the upload again, and this time its
// precondition fails. Publish must recognize its own object and succeed.
func TestLostAnswers(t *testing.T) {
	s := gcs.Start(t)
	u, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	l := &loser{next: &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(u) }},
		names: []string{".tgz", "index.json", "gpu_default_version", "gpu_default_version"}}
	proxy := httptest.NewServer(l)
	t.Cleanup(proxy.Close)
	(&gcs.Server{Endpoint: proxy.URL}).Use(t)
	s.Bucket(t, "twins")
	signer, _ := newSigner(t)
	v := verifier(t, signer)
	const dest = "gs://twins/x"
	if _, err := tarball.Publish(t.Context(), openBucket(t, dest), newRelease(t, signer, open, "")); err != nil {
		t.Fatal(err)
	}
	bare := withoutStates(content(t, dest))
	for _, declared := range []labels{{"DEFAULT": v261}, nil} {
		if _, err := tarball.SetLabels(t.Context(), openBucket(t, dest), labelling(signer, declared, nil)); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.lost) != 4 {
		t.Errorf("lost the answers for %q; want four", l.lost)
	}
	check(t, content(t, dest), v, open)
	if diff := cmp.Diff(bare, withoutStates(content(t, dest))); diff != "" {
		t.Errorf("after the label was removed (-before +now):\n%s", diff)
	}
}
