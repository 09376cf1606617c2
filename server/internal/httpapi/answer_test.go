package httpapi

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// stuckClient is a client that reads nothing until the test allows it.
type stuckClient struct {
	http.ResponseWriter
	writing *sync.WaitGroup
	let     chan struct{}
}

func (s *stuckClient) Write(p []byte) (int, error) {
	s.writing.Done()
	<-s.let
	return s.ResponseWriter.Write(p)
}

// TestSlowReadersHoldUpNobody checks that clients that do not read their answers do not delay the answers to other
// clients.
func TestSlowReadersHoldUpNobody(t *testing.T) {
	t.Parallel()
	h := throttle()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	ask := func(w http.ResponseWriter) {
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/kernels", nil))
	}
	var writing, done sync.WaitGroup
	let := make(chan struct{})
	for range listsMade() {
		writing.Add(1)
		done.Go(func() { ask(&stuckClient{httptest.NewRecorder(), &writing, let}) })
	}
	writing.Wait()
	w := httptest.NewRecorder()
	ask(w)
	close(let)
	done.Wait()
	if w.Code != http.StatusOK || w.Body.String() != "/v1/kernels" {
		t.Errorf("a list beside %d clients that do not read their lists = %d %q; want 200", listsMade(), w.Code, w.Body)
	}
}

// TestReportsHaveTheirOwnSlots checks that calls that take long do not delay the reports of builders.
func TestReportsHaveTheirOwnSlots(t *testing.T) {
	t.Parallel()
	var running, done sync.WaitGroup
	let := make(chan struct{})
	h := throttle()(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			running.Done()
			<-let
		}
	}))
	ask := func(method, path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
		return w.Code
	}
	running.Add(callsAtOnce)
	for range callsAtOnce {
		done.Go(func() { ask(http.MethodPost, "/v1/builds") })
	}
	running.Wait()
	code := ask(http.MethodPatch, "/v1/builds/7")
	close(let)
	done.Wait()
	if code != http.StatusOK {
		t.Errorf("the report of a builder beside %d long calls = %d; want 200", callsAtOnce, code)
	}
}

// TestCompression checks that large answers are compressed for clients that accept gzip, and that small answers never
// are.
func TestCompression(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		length int
		accept string
		want   string
	}{
		{compressFrom - 1, "gzip", ""},
		{compressFrom, "gzip", "gzip"},
		{compressFrom, "", ""},
	} {
		body := strings.Repeat("x", row.length)
		h := etags(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, body)
		}))
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/resolve", nil)
		r.Header.Set("Accept-Encoding", row.accept)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if got := w.Header().Get("Content-Encoding"); got != row.want || w.Header().Get("Etag") == "" {
			t.Errorf("%d bytes, Accept-Encoding %q: encoding %q, ETag %q; want %q and a tag", row.length, row.accept, got,
				w.Header().Get("Etag"), row.want)
		}
		if row.want == "" && w.Body.String() != body {
			t.Errorf("%d bytes came as %d", row.length, w.Body.Len())
		}
	}
}
