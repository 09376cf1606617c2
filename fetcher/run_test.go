package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// watcher is a writer that calls a function once, as soon as the given text is written.
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

// TestRunEnds stops fetcher run while it watches a driver, and before it has one. In the last row, its address is in
// use.
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
		stop   string // stop when the program prints this text; "" means when it asks the server
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

// busy is a node that wants another driver. The present driver is in use during the first inUse runs.
type busy struct {
	runs, inUse int
	state       gpucheck.State
	held        []time.Duration
}

func (b *busy) Run(context.Context) (*agent.Report, error) {
	r := &agent.Report{Verdict: gpucheck.Verdict{State: b.state}}
	if b.runs++; b.runs <= b.inUse {
		return r, fault.New(fault.Busy, "a program uses the GPU", "stop it")
	}
	return r, nil
}

func (b *busy) Monitor(ctx context.Context, _ time.Duration, _ agent.Watcher) error {
	start := time.Now()
	if b.runs > b.inUse {
		b.held = append(b.held, 0)
		return nil
	}
	<-ctx.Done()
	b.held = append(b.held, time.Since(start))
	return nil
}

// TestPending checks that a node with a ready driver keeps running, and gets the wanted driver as soon as possible. A
// node without a ready driver ends.
func TestPending(t *testing.T) {
	t.Parallel()
	for state, want := range map[gpucheck.State]struct {
		runs, pending int
		err           fault.Kind // Internal means no error
	}{gpucheck.Ready: {3, 2, fault.Internal}, gpucheck.Unusable: {1, 0, fault.Busy}} {
		synctest.Test(t, func(t *testing.T) {
			b, pending := &busy{inUse: 2, state: state}, 0
			k := daemon{
				node: b, every: time.Minute, outside: &listeners{server: report.New(time.Now)}, pending: func(err error) {
					if err != nil {
						pending++
					}
				},
				run: func(run func(context.Context) (*agent.Report, error)) error {
					_, err := run(t.Context())
					return err
				},
			}
			err := k.stay(t.Context())
			if (err == nil) != (want.err == fault.Internal) || err != nil && !fault.Is(err, want.err) || b.runs != want.runs ||
				pending != want.pending {
				t.Errorf("%s: keep = %v after %d runs, %d times pending; want %+v", state, err, b.runs, pending, want)
			}
			if state == gpucheck.Ready &&
				!slices.Equal(b.held, []time.Duration{retryChecks * time.Minute, retryChecks * time.Minute, 0}) {
				t.Errorf("held for %v; want ten looks each time", b.held)
			}
		})
	}
}

// countingContext counts the derived contexts that are not released yet. Package context registers them by AfterFunc,
// because it does not know this type.
type countingContext struct {
	context.Context
	done    chan struct{}
	derived atomic.Int32
}

func (c *countingContext) Done() <-chan struct{} { return c.done }

func (c *countingContext) AfterFunc(func()) (stop func() bool) {
	c.derived.Add(1)
	return sync.OnceValue(func() bool {
		c.derived.Add(-1)
		return true
	})
}

// TestPendingReleases checks that a node that waits long for another driver keeps no context of its earlier tries.
func TestPendingReleases(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx := &countingContext{Context: t.Context(), done: make(chan struct{})}
		k := daemon{
			node: &busy{inUse: 5, state: gpucheck.Ready}, every: time.Minute, outside: &listeners{server: report.New(time.Now)},
			pending: func(error) {},
			run: func(run func(context.Context) (*agent.Report, error)) error {
				_, err := run(t.Context())
				return err
			},
		}
		if err := k.stay(ctx); err != nil {
			t.Fatal(err)
		}
		if left := ctx.derived.Load(); left != 0 {
			t.Errorf("stay left %d contexts; want none", left)
		}
	})
}

// TestHelp checks that the help fits a terminal, and that each flag has a heading in it.
func TestHelp(t *testing.T) {
	t.Parallel()
	if err := cli.CheckHelp(root); err != nil {
		t.Error(err)
	}
}
