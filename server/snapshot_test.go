package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

// TestSnapshots checks that the server serves the signed snapshot, and no other file of the same folder.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	now := time.Now()
	farm := snapshots.New(t, now)
	farm.Publish(t, now)
	handler, err := snapshotFiles(farm.Dir)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	root, err := os.ReadFile(filepath.Join(farm.Dir, "1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := snapshot.New(snapshot.Config{From: server.URL + "/snapshot/", Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := c.Refresh(t.Context()); err != nil || s.Version != 1 {
		t.Errorf("Refresh from the server = %+v, %v; want list 1", s, err)
	}
	outside := filepath.Join(t.TempDir(), "key")
	for _, err := range []error{
		os.WriteFile(outside, []byte("secret"), 0o600), os.Symlink(outside, filepath.Join(farm.Dir, "7.root.json")),
		os.Mkdir(filepath.Join(farm.Dir, "8.root.json"), 0o755),
		os.WriteFile(filepath.Join(farm.Dir, "root-1.key"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"", "targets/", ".lock", "root-1.key", "7.root.json", "8.root.json", "9.root.json",
		"../key", "targets/../timestamp.json", "timestamp.json/"} {
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/snapshot/x", nil)
		r.URL.Path = "/snapshot/" + name
		handler.ServeHTTP(w, r)
		if w.Code != http.StatusNotFound {
			t.Errorf("GET /snapshot/%s = %d; want 404", name, w.Code)
		}
	}
	for name, want := range map[string]string{"timestamp.json": "no-cache",
		"1.targets.json": "public, max-age=31536000, immutable"} {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/snapshot/"+name, nil))
		if got := w.Header().Get("Cache-Control"); w.Code != http.StatusOK || got != want {
			t.Errorf("GET /snapshot/%s = %d, Cache-Control %q; want %q", name, w.Code, got, want)
		}
	}
	if _, err := snapshotFiles(filepath.Join(farm.Dir, "nowhere")); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("snapshotFiles of no folder = %v; want usage and a hint", err)
	}
}
