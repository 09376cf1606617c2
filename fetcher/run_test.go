package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
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

// watcher is a writer that calls seen once, as soon as the given text is written.
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

// TestRunEnds stops `fetcher run` while it watches a driver, and while it still asks the server. In the last row,
// another program uses the address of --listen; the node must get its driver nevertheless.
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
	t.Cleanup(func() { _ = taken.Close() }) // the test is over, so an error does not matter
	rows := []struct {
		name   string
		stop   string // stop at this output; "" means when the program asks the server
		listen string
		status int
		stderr string
	}{
		{"while it holds", "staged", "", 0, ""},
		{"while it holds and serves", "staged", "127.0.0.1:0", 0, ""},
		{"while it asks the server", "", "", 30, "error: "},
		{"address taken", "staged", taken.Addr().String(), 0, ""},
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

// busy is a node that wants another driver. A program uses the present driver during the first inUse runs.
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

func noVerdict(context.Context) (gpucheck.Verdict, bool) { return gpucheck.Verdict{}, false }

// TestPending checks that the daemon on a node with a ready driver runs again until the node has the wanted driver. If
// the driver is not ready, the daemon must end with the error.
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
				quickVerdict: noVerdict,
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

// scripted is a node whose Run and Monitor are functions of a test.
type scripted struct {
	run   func(ctx context.Context, n int) (*agent.Report, error)
	watch func(ctx context.Context, n int) error
	runs  int
}

func (s *scripted) Run(ctx context.Context) (*agent.Report, error) {
	s.runs++
	return s.run(ctx, s.runs)
}

func (s *scripted) Monitor(ctx context.Context, _ time.Duration, _ agent.Watcher) error {
	return s.watch(ctx, s.runs)
}

// daemonOf returns a daemon for the node. quick is the verdict that it uses after a run without a verdict.
func daemonOf(node *scripted, out *report.Server, quick gpucheck.Verdict) daemon {
	return daemon{
		node: node, every: time.Minute, outside: &listeners{server: out}, pending: func(error) {},
		run: func(run func(context.Context) (*agent.Report, error)) error {
			_, err := run(context.Background())
			return err
		},
		quickVerdict: func(context.Context) (gpucheck.Verdict, bool) { return quick, quick.State != gpucheck.Ready },
	}
}

// status returns the HTTP status of a GET request.
func status(h http.Handler, path string) int {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code
}

var (
	readyVerdict  = gpucheck.Verdict{State: gpucheck.Ready, Modules: map[string]string{"nvidia": "", "nvidia_uvm": ""}}
	unloadedState = gpucheck.Verdict{State: gpucheck.Unusable, Modules: map[string]string{}}
)

// TestRunThatHangs checks that a node is no longer ready if a run hangs, although its driver was ready before. /healthz
// must then fail, but not while the first run works, which may take long.
func TestRunThatHangs(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		hangs int // the run that hangs
		want  int // the status of /healthz after an hour
	}{{1, http.StatusOK}, {2, http.StatusServiceUnavailable}} {
		synctest.Test(t, func(t *testing.T) {
			out := report.New(time.Now)
			end := make(chan struct{})
			node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
				if n == row.hangs {
					<-end
					return &agent.Report{}, fault.New(fault.Internal, "it hung", "")
				}
				return &agent.Report{Verdict: readyVerdict}, fault.New(fault.Busy, "another driver is wanted", "wait")
			}, watch: func(ctx context.Context, _ int) error {
				<-ctx.Done()
				return nil
			}}
			done := make(chan error)
			go func() { done <- daemonOf(node, out, unloadedState).stay(t.Context()) }()
			time.Sleep(time.Hour)
			if got := status(out, "/healthz"); got != row.want || status(out, "/readyz") != http.StatusServiceUnavailable {
				t.Errorf("run %d hangs: /healthz = %d, /readyz = %d; want %d, and not ready", row.hangs, got,
					status(out, "/readyz"), row.want)
			}
			close(end)
			if err := <-done; err == nil {
				t.Error("stay = nil; want the error of the run")
			}
		})
	}
}

// TestDriverThatDisappears checks what the daemon does when a ready driver is no longer loaded. If another process
// unloaded the driver, the daemon must run again. If a run fails and leaves no driver, the daemon must end, so that
// kubelet starts it again.
func TestDriverThatDisappears(t *testing.T) {
	t.Parallel()
	failed := fault.New(fault.Rejected, "the kernel refused a module", "")
	for _, row := range []struct {
		name string
		run  func(ctx context.Context, n int) (*agent.Report, error)
		held error // the error that Monitor returns after the first run
		runs int
		err  error
		want int // the status of /readyz at the end
	}{
		{"another process unloaded it, and the next run loads it", func(context.Context, int) (*agent.Report, error) {
			return &agent.Report{Verdict: readyVerdict}, nil
		}, agent.ErrNotLoaded, 2, nil, http.StatusOK},
		{"another process unloaded it, and a run cannot load it", func(_ context.Context, n int) (*agent.Report, error) {
			if n == 1 {
				return &agent.Report{Verdict: readyVerdict}, nil
			}
			return &agent.Report{}, failed
		}, agent.ErrNotLoaded, 2, failed, http.StatusServiceUnavailable},
		{"a run unloaded it and could not load it again", func(_ context.Context, n int) (*agent.Report, error) {
			if n == 1 {
				return &agent.Report{Verdict: readyVerdict, Pending: "another driver is wanted"}, nil
			}
			return &agent.Report{}, failed
		}, nil, 2, failed, http.StatusServiceUnavailable},
	} {
		synctest.Test(t, func(t *testing.T) {
			out := report.New(time.Now)
			node := &scripted{run: row.run, watch: func(_ context.Context, n int) error {
				if n == 1 {
					return row.held
				}
				return nil
			}}
			err := daemonOf(node, out, unloadedState).stay(t.Context())
			if !errors.Is(err, row.err) || node.runs != row.runs || status(out, "/readyz") != row.want {
				t.Errorf("%s: stay = %v after %d runs, /readyz = %d; want %v, %d, %d", row.name, err, node.runs,
					status(out, "/readyz"), row.err, row.runs, row.want)
			}
		})
	}
}

// TestUnusableIsWatched checks a driver that is loaded but cannot use a GPU. The daemon must watch it, because an
// operator may reset the GPU, and run again later, because another driver may be able to use the GPU. It must report as
// pending why the node lacks the wanted driver, without repeating the verdict.
func TestUnusableIsWatched(t *testing.T) {
	t.Parallel()
	broken := gpucheck.Verdict{State: gpucheck.Unusable, Reason: "the driver reports Xid 79", Digest: "sha256:a",
		Modules: readyVerdict.Modules}
	other := broken
	other.Digest = "sha256:b"
	for _, row := range []struct {
		name   string
		report agent.Report
		err    error
		want   string // the pending reason
	}{
		{"the wanted driver", agent.Report{Verdict: broken}, broken.Err(), ""},
		{"with others joined", agent.Report{Verdict: broken}, errors.Join(errors.Join(broken.Err(), nil),
			fault.New(fault.Busy, "another driver is wanted", "wait")), "another driver is wanted"},
		{"a rollback waits", agent.Report{Verdict: broken, Pending: "a rollback waits"}, broken.Err(), "a rollback waits"},
		{"after a rollback", agent.Report{Verdict: broken}, other.Err(), other.Err().Error()},
	} {
		synctest.Test(t, func(t *testing.T) {
			out := report.New(time.Now)
			node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
				if n == 1 {
					return &row.report, row.err
				}
				return &agent.Report{Verdict: readyVerdict}, nil
			}, watch: func(ctx context.Context, n int) error {
				if n == 1 {
					if ready, healthy := status(out, "/readyz"), status(out, "/healthz"); ready != 503 || healthy != 200 {
						t.Errorf("%s: /readyz = %d, /healthz = %d; want 503, 200", row.name, ready, healthy)
					}
					<-ctx.Done()
				}
				return nil
			}}
			var pending []string
			k := daemonOf(node, out, unloadedState)
			k.pending = func(err error) {
				if err != nil {
					pending = append(pending, err.Error())
				}
			}
			start := time.Now()
			err := k.stay(t.Context())
			if took := time.Since(start); err != nil || node.runs != 2 || took != retryChecks*k.every {
				t.Errorf("%s: stay = %v after %d runs and %v; want nil after 2 runs and %v", row.name, err, node.runs, took,
					retryChecks*k.every)
			}
			if got := strings.Join(pending, "|"); got != row.want {
				t.Errorf("%s: pending %q; want %q", row.name, got, row.want)
			}
		})
	}
}

// TestNotedRollbackIsDone checks a rollback that waits for an idle GPU. When Monitor reports that the rollback is
// possible, the daemon must run again, and the node must stay ready.
func TestNotedRollbackIsDone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		out := report.New(time.Now)
		node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
			if n == 2 && status(out, "/readyz") != http.StatusOK {
				t.Error("before the second run, the node is not ready; want ready")
			}
			return &agent.Report{Verdict: readyVerdict}, nil
		}, watch: func(_ context.Context, n int) error {
			if n == 1 {
				return agent.ErrRollback
			}
			return nil
		}}
		if err := daemonOf(node, out, unloadedState).stay(t.Context()); err != nil || node.runs != 2 {
			t.Errorf("stay = %v after %d runs; want nil after 2", err, node.runs)
		}
	})
}

// TestUncheckedDriver checks a process that cannot check the driver. The node must not stay ready, although an earlier
// process found the driver ready.
func TestUncheckedDriver(t *testing.T) {
	t.Parallel()
	failed := fault.New(fault.TimedOut, "the probe did not answer", "")
	out := report.New(time.Now)
	out.Report(readyVerdict) // the cluster still shows this verdict
	node := &scripted{run: func(context.Context, int) (*agent.Report, error) { return &agent.Report{}, failed }}
	err := daemonOf(node, out, readyVerdict).stay(t.Context())
	w := httptest.NewRecorder()
	out.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
	if !errors.Is(err, failed) || w.Code != http.StatusServiceUnavailable ||
		!strings.Contains(w.Body.String(), "the probe did not answer") {
		t.Errorf("stay = %v, /readyz = %d %s; want not ready, with the reason", err, w.Code, w.Body)
	}
}

// countingContext counts the contexts that were derived from it and are not released yet. Package context does not know
// this type, so it registers each derived context by AfterFunc.
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

// TestPendingReleases checks that the daemon releases the context of each earlier run, while a GPU is in use and it
// therefore runs again and again.
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
			quickVerdict: noVerdict,
		}
		if err := k.stay(ctx); err != nil {
			t.Fatal(err)
		}
		if left := ctx.derived.Load(); left != 0 {
			t.Errorf("stay left %d contexts; want none", left)
		}
	})
}

// TestGPUsBeforeTheFirstRun checks that the metrics show the GPUs of a node during the first run, because that run may
// end the program. The node must not be ready then.
func TestGPUsBeforeTheFirstRun(t *testing.T) {
	t.Parallel()
	failed := fault.New(fault.NoArtifact, "nothing is published", "")
	out := report.New(time.Now)
	node := &scripted{run: func(context.Context, int) (*agent.Report, error) {
		w := httptest.NewRecorder()
		out.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		for _, want := range []string{"prebake_fetcher_gpus_present 2\n", "prebake_fetcher_ready 0\n"} {
			if !strings.Contains(w.Body.String(), want) {
				t.Errorf("the metrics lack %q:\n%s", want, w.Body)
			}
		}
		if ready, healthy := status(out, "/readyz"), status(out, "/healthz"); ready != 503 || healthy != 200 {
			t.Errorf("/readyz = %d, /healthz = %d; want 503, 200", ready, healthy)
		}
		return &agent.Report{}, failed
	}}
	quick := gpucheck.Verdict{State: gpucheck.Absent, PCIGPUs: 2, Modules: map[string]string{}}
	if err := daemonOf(node, out, quick).stay(t.Context()); !errors.Is(err, failed) {
		t.Errorf("stay = %v; want %v", err, failed)
	}
}

// TestServeAgain checks that serve uses an address as soon as the other program that has it ends.
func TestServeAgain(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	logged := make(chan struct{})
	log := slog.New(slog.NewTextHandler(&watcher{text: "\n", seen: func() { close(logged) }}, nil))
	go func() { done <- serve(ctx, report.New(time.Now), taken.Addr().String(), log) }()
	<-logged
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	client := http.Client{Timeout: time.Second}
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		resp, err := client.Get("http://" + taken.Addr().String() + "/healthz")
		if err == nil {
			_ = resp.Body.Close() // only the fact of an answer counts
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("serve = %v; want nil", err)
	}
}

// TestHelp checks that the help fits a terminal, and that each flag is under a heading.
func TestHelp(t *testing.T) {
	t.Parallel()
	if err := cli.CheckHelp(root); err != nil {
		t.Error(err)
	}
}
