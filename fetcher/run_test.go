package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/testkit"
)

// watcher calls seen once, when the text has been written.
type watcher struct {
	bytes.Buffer
	text string
	seen func()
}

func (w *watcher) Write(p []byte) (int, error) {
	n, err := w.Buffer.Write(p)
	if w.seen != nil && strings.Contains(w.String(), w.text) {
		w.seen()
		w.seen = nil
	}
	return n, err
}

// TestRunEnds tells fetcher run to stop while it holds, and before it got so
// far, and gives it an address that is taken.
func TestRunEnds(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	registry := testkit.Registry(t, true) + "/prebake/driver"
	p := sample.Publish(t, registry, key, c)
	pem := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(pem, key.PEM(t), 0o644); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = taken.Close() }) // the test is over
	rows := []struct {
		name   string
		stop   string // stop when this is printed; "" is when the server is asked
		listen string
		status int
		stderr string
	}{
		{"while it holds", "staged", "", 0, ""},
		{"while it holds and serves", "staged", "127.0.0.1:0", 0, ""},
		{"while it asks the server", "", "", 30, "error: "},
		{"address taken", "never", taken.Addr().String(), 2, "--listen"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if row.stop == "" {
					cancel()
					<-r.Context().Done()
					return
				}
				resolution(w, r, c, registry, p.Digest)
			}))
			defer server.Close()
			dir := sample.Root(t, c, 1)
			stdout, stderr := &watcher{text: row.stop, seen: cancel}, &bytes.Buffer{}
			if row.stop == "" {
				stdout.seen = nil
			}
			status := cli.Run(ctx, root(), []string{"fetcher", "run", "--host-root", dir, "--server", server.URL, "--key", pem,
				"--no-load", "--builder", "never", "--listen", row.listen}, stdout, stderr)
			if status != row.status || !strings.Contains(stderr.String(), row.stderr) {
				t.Errorf("fetcher run = %d, stderr:\n%s\nwant %d and %q", status, stderr, row.status, row.stderr)
			}
		})
	}
}

// Help fits a terminal, and has each flag in a group.
func TestHelp(t *testing.T) {
	t.Parallel()
	if err := cli.CheckHelp(root); err != nil {
		t.Error(err)
	}
}
