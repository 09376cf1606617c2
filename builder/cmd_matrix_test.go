package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	stock "github.com/google/go-containerregistry/pkg/registry"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/vbauerster/mpb/v8"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/script"
	"github.com/prebake/prebake/pkg/timeline"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"builder": main})
}

// publicRegistry runs a registry of the library go-containerregistry, with the audience header of a public Prebake
// server.
func publicRegistry(t *testing.T) string {
	t.Helper()
	inner := stock.New(stock.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(registry.AudienceHeader, registry.AudiencePublic)
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://") + "/prebake/driver"
}

// TestScript runs the scripts in testdata/script. In a script, $KEY is the path of a signing key, and $PUBLIC is a
// repository that says it is public.
func TestScript(t *testing.T) {
	t.Parallel()
	public := publicRegistry(t)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			key := filepath.Join(env.WorkDir, "key")
			if code, out, errs := run(t, "keygen", key); code != 0 {
				t.Errorf("keygen = %d %s%s", code, out, errs)
			}
			env.Setenv("KEY", key)
			env.Setenv("PUBLIC", public)
			env.Setenv("XDG_CACHE_HOME", filepath.Join(env.WorkDir, "home-cache"))
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": script.Exits, "await": await},
	})
}

// await is a command for the scripts. It waits until a file exists, or until the test's time is over.
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: await FILE")
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
	}
}

// TestTable checks the table of cells and their states: it has at most 80 columns, and for a failed cell it quotes the
// compiler's error.
func TestTable(t *testing.T) {
	t.Parallel()
	job := func(id, version string, f target.Flavour, s batch.State) *batch.Job {
		k, err := target.ParseKernel(id, "lakitu")
		if err != nil {
			t.Fatal(err)
		}
		return &batch.Job{Cell: plan.Cell{Kernel: k, Driver: target.Driver{Version: version, Flavour: f},
			Asked: []string{"R535"}}, State: s}
	}
	jobs := []*batch.Job{
		job("17800.0.50", "535.261.03", target.Proprietary, batch.Published),
		job("17800.0.56", "535.261.03", target.Open, batch.Failed),
		job("17800.1.50", "", "", batch.Unavailable),
		job("123456789.123456789.123456789", "12345.12345.12345.12345", target.Proprietary, batch.Failed),
		{Cell: plan.Cell{Kernel: target.Kernel{Board: "lakitu"}, Asked: []string{"milestone 125, latest 3 released"},
			EarlyWarning: true}, State: batch.Failed},
	}
	jobs[0].Seconds = 123.456
	jobs[1].Failure = &batch.Failure{Class: fault.APIBreak,
		Error: "nvidia/nv-pci.c:123:45: error: too few arguments to function 'pci_resize_resource'"}
	jobs[1].Like = "17800.0.55/lakitu"
	jobs[1].Seconds = 61
	jobs[2].Failure = &batch.Failure{Class: fault.Unsupported,
		Error: "choose driver R535: COS lists no such driver for this COS build"}
	jobs[3].Failure = &batch.Failure{Class: fault.Internal, Error: strings.Repeat("x", 200)}
	jobs[3].Known = true
	jobs[4].Failure = &batch.Failure{Class: fault.InputMissing, Error: "none"}
	var out strings.Builder
	r := &batch.Report{Jobs: jobs, States: map[batch.State]int{batch.Published: 1, batch.Failed: 3, batch.Unavailable: 1}}
	if err := printMatrix(&out, r, 0); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join("testdata", "table.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s\n%s", diff, out.String())
	}
	for line := range strings.Lines(out.String()) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > columns {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

// TestScreen checks what an operator sees on a terminal. A running cell has a progress line, which is drawn again and
// again. A finished cell has a permanent line.
func TestScreen(t *testing.T) {
	t.Parallel()
	out := &safeBuffer{}
	s := &screen{w: out, lines: map[int]*movingLine{},
		bars: mpb.New(mpb.WithOutput(out), mpb.WithWidth(columns), mpb.WithAutoRefresh())}
	event := func(index int, kind batch.EventKind) batch.Event {
		c := plan.Cell{Kernel: target.Kernel{BuildID: "1.0." + strconv.Itoa(index), Board: "lakitu"},
			Driver: target.Driver{Version: "5.1", Flavour: target.Open}}
		return batch.Event{Kind: kind, Total: 2, Job: &batch.Job{Index: index, Cell: c, State: batch.Published}}
	}
	s.watch(event(0, batch.Started))
	s.watch(event(1, batch.Started))
	e := event(0, batch.Phase)
	e.Phase = timeline.Event{Phase: "compile", Text: "conftest 3/390"}
	s.watch(e)
	for !strings.Contains(out.String(), "conftest 3/390") {
		runtime.Gosched() // mpb draws the line in a goroutine of its own
	}
	again := event(1, batch.Again)
	again.Failure = &batch.Failure{Class: fault.Transient, Error: "down"}
	s.watch(again)
	s.watch(event(0, batch.Settled))
	s.watch(event(1, batch.Started))
	s.watch(event(1, batch.Settled))
	s.close()
	for _, want := range []string{"1.0.0/lakitu 5.1-open: published\n", "1.0.1/lakitu 5.1-open: published\n",
		"1.0.1/lakitu 5.1-open: transient, will be tried again: down\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("screen lacks %q:\n%q", want, out.String())
		}
	}
	for line := range strings.Lines(out.String()) {
		line = ansi.ReplaceAllString(strings.TrimSuffix(line, "\n"), "")
		if n := len([]rune(line)); n > columns {
			t.Errorf("%d columns: %q", n, line)
		}
	}
}

var ansi = regexp.MustCompile("\x1b\\[[0-9;]*[A-Za-z]|\r")

type safeBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// newOneCell returns a matrix with an empty cache, and a plan with one cell.
func newOneCell(t *testing.T) (*matrix, *plan.Plan) {
	t.Helper()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	kernel, err := target.ParseKernel("17800.0.9", "lakitu")
	if err != nil {
		t.Fatal(err)
	}
	p := &plan.Plan{Cells: []plan.Cell{{Kernel: kernel, Driver: target.Driver{Version: "535.1", Flavour: target.Open}}}}
	m := &matrix{cfg: pipeline.Config{Cache: cache}}
	m.batch.Logs = t.TempDir()
	m.batch.Kernel = func(context.Context, target.Kernel, func(string)) (target.Fingerprint, error) { return "f", nil }
	m.batch.Driver = func(context.Context, string, target.Arch, func(string)) ([]target.Flavour, error) {
		return []target.Flavour{target.Open}, nil
	}
	return m, p
}

// TestPassHasOwnCache checks a matrix that builds old artifacts again. Each pass over the wish list must have a new,
// empty cache for these builds, and must remove the cache at its end.
func TestPassHasOwnCache(t *testing.T) {
	t.Parallel()
	m, p := newOneCell(t)
	m.cfg.RebuildAfter = time.Hour
	var used []string
	m.batch.Make = func(ctx context.Context, _ plan.Cell, _ io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
		used = append(used, m.cfg.Fresh.Dir())
		_, cached, err := m.cfg.Fresh.Tree(ctx, "object", "key", func(context.Context, string) error { return nil })
		if cached {
			t.Error("a pass has an object of an earlier pass")
		}
		return &pipeline.Result{}, err
	}
	for range 2 {
		if report, err := m.runPass(t.Context(), p); err != nil || report.States[batch.Published] != 1 {
			t.Fatalf("runPass = %+v, %v; want one cell published", report, err)
		}
	}
	if len(used) != 2 || used[0] == used[1] {
		t.Fatalf("two passes have the caches %v; want two", used)
	}
	for _, dir := range used {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a pass left its cache: %v", err)
		}
	}
}

// sums is a fake bucket. It has every checksum file, always with the same content.
type sums struct{}

func (sums) ReadSmall(context.Context, string, int64) ([]byte, error) { return []byte("sum"), nil }

// TestRetryFailedOnce checks that only the first pass with --retry-failed builds a cell again that failed with the same
// inputs. Otherwise `builder work` would compile such a cell in vain in each pass.
func TestRetryFailedOnce(t *testing.T) {
	t.Parallel()
	m, p := newOneCell(t)
	store := func(forget bool) *batch.FailureStore {
		return &batch.FailureStore{Facts: m.cfg.Cache, Kernels: sums{}, Drivers: sums{}, Forget: forget}
	}
	broken := fault.Errorf(fault.APIBreak, "no such function")
	outcome, made := broken, 0
	m.batch.Attempts = 1
	m.batch.Make = func(context.Context, plan.Cell, io.Writer, *timeline.Run) (*pipeline.Result, error) {
		made++
		return &pipeline.Result{}, outcome
	}
	pass := func(known bool, when string) {
		t.Helper()
		before := made
		report, err := m.runPass(t.Context(), p)
		if err != nil || report.States[batch.Failed] != 1 || report.Jobs[0].Known != known || (made == before) != known {
			t.Errorf("%s: runPass = %+v, %v, built %d times; want one failed cell, known before: %t", when, report, err,
				made-before, known)
		}
	}
	m.batch.Failures = store(false)
	pass(false, "the first pass")
	pass(true, "the second pass")
	m.batch.Failures = store(true)
	outcome = fault.Errorf(fault.Transient, "connection reset")
	pass(false, "a first pass with --retry-failed and without a network")
	outcome = broken
	pass(false, "the pass after that")
	pass(true, "a further pass")
}
