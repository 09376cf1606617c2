package batch_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// cell parses text such as "1.0.1 5.1-open": a BUILD_ID, a driver version and a flavour.
func cell(text string) plan.Cell {
	id, rest, _ := strings.Cut(text, " ")
	version, flavour, _ := strings.Cut(rest, "-")
	return plan.Cell{
		Kernel: target.Kernel{BuildID: id, Board: "lakitu", Arch: target.AMD64},
		Driver: target.Driver{Version: version, Flavour: target.Flavour(flavour)},
		Listed: true,
	}
}

func cells(texts ...string) *plan.Plan {
	p := &plan.Plan{}
	for _, text := range texts {
		p.Cells = append(p.Cells, cell(text))
	}
	return p
}

// world is a fake of all functions that a batch calls. A kernel's fingerprint is the first number of its BUILD_ID:
// kernels 1.0.1 and 1.0.2 share one. Driver 9.9 has no open flavour.
type world struct {
	t *testing.T

	mu      sync.Mutex
	began   []string // started cells, in order
	fetched []string // fetched kernels and drivers, in order
	running map[string]bool
	most    int // the maximum number of cells that ran at the same time

	// outcome returns the result of an attempt, counted from 1. Nil means success.
	outcome func(c plan.Cell, attempt int) error
	// duration returns how long an attempt at a cell runs.
	duration  func(c plan.Cell) time.Duration
	published map[string]string
	memory    map[string]batch.Failure
	arrive    func(name string) error
	attempts  map[string]int
}

func (w *world) name(c plan.Cell) string { return c.Kernel.BuildID + " " + c.Driver.String() }

func (w *world) config() batch.Config {
	w.running, w.attempts = map[string]bool{}, map[string]int{}
	if w.memory == nil {
		w.memory = map[string]batch.Failure{}
	}
	return batch.Config{
		Make: w.make, Logs: filepath.Join(w.t.TempDir(), "logs"), Failures: w,
		Kernel: func(_ context.Context, k target.Kernel, _ func(string)) (target.Fingerprint, error) {
			family, _, _ := strings.Cut(k.BuildID, ".")
			return target.Fingerprint(family), w.fetch(k.BuildID)
		},
		Driver: func(_ context.Context, version string, _ target.Arch, say func(string)) ([]target.Flavour, error) {
			if w.arrive == nil {
				say("here")
			}
			if version == "9.9" {
				return []target.Flavour{target.Proprietary}, w.fetch(version)
			}
			return []target.Flavour{target.Proprietary, target.Open}, w.fetch(version)
		},
		Published: func(_ context.Context, c plan.Cell) (string, error) {
			return w.published[w.name(c)], nil
		},
	}
}

func (w *world) fetch(name string) error {
	w.mu.Lock()
	w.fetched = append(w.fetched, name)
	w.mu.Unlock()
	if w.arrive != nil {
		return w.arrive(name)
	}
	return nil
}

func (w *world) make(ctx context.Context, c plan.Cell, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
	same := strings.Split(c.Kernel.BuildID, ".")[0] + " " + c.Driver.String()
	w.mu.Lock()
	if w.running[same] {
		w.t.Errorf("%s runs twice at the same time", same)
	}
	w.running[same] = true
	w.most = max(w.most, len(w.running))
	w.began = append(w.began, w.name(c))
	w.attempts[w.name(c)]++
	attempt := w.attempts[w.name(c)]
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.running, same)
		w.mu.Unlock()
	}()
	fmt.Fprintf(log, "log of %s\n", w.name(c))
	err := line.Do("compile", func() (string, error) {
		if w.duration != nil {
			select {
			case <-time.After(w.duration(c)):
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}
		if w.outcome != nil {
			return "", w.outcome(c, attempt)
		}
		return "", nil
	})
	return &pipeline.Result{Digest: "sha256:" + w.name(c), Phases: line.Phases()}, err
}

func (w *world) Find(_ context.Context, c plan.Cell) (batch.Failure, bool) {
	f, ok := w.memory[w.name(c)]
	return f, ok
}

func (w *world) Remember(_ context.Context, c plan.Cell, f batch.Failure) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.memory[w.name(c)] = f
	return nil
}

// states returns one line of text for each cell of a report.
func states(r *batch.Report) []string {
	var lines []string
	for _, j := range r.Jobs {
		s := fmt.Sprintf("%s %s %s", j.Cell.Kernel.BuildID, j.Cell.Driver, j.State)
		if j.Failure != nil {
			s += " " + j.Failure.Class.String()
		}
		if j.Like != "" {
			s += " like " + j.Like
		}
		if j.Known {
			s += " known"
		}
		if j.Attempts > 1 {
			s += fmt.Sprintf(" %d attempts", j.Attempts)
		}
		lines = append(lines, s)
	}
	return lines
}

// waitASecond delays each input by a second of the test's fake clock, so that the plan's first cell starts first.
func waitASecond(string) error {
	time.Sleep(time.Second)
	return nil
}

var errBreak = fault.New(fault.APIBreak, "nv-pci.c:1: error: too few arguments", "take a newer one")

// TestRun checks four rules. A failed cell does not block any other cell. Cells with the same fingerprint and driver
// share one build and its outcome. A cell that is already published does not start. A cell with a stored failure does
// not start.
func TestRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, testRun)
}

func testRun(t *testing.T) {
	w := &world{
		t:        t,
		arrive:   waitASecond,
		duration: func(plan.Cell) time.Duration { return time.Minute },
		outcome: func(c plan.Cell, _ int) error {
			if c.Driver.String() == "5.1-open" {
				return errBreak
			}
			return nil
		},
		published: map[string]string{"2.0.1 5.1-proprietary": "sha256:there"},
		memory:    map[string]batch.Failure{"2.0.1 5.1-open": {Class: fault.APIBreak, Error: "as ever"}},
	}
	p := cells("1.0.1 5.1-proprietary", "1.0.1 5.1-open", "1.0.1 9.9-proprietary", "1.0.1 9.9-open",
		"1.0.2 5.1-proprietary", "1.0.2 5.1-open", "2.0.1 5.1-proprietary", "2.0.1 5.1-open", "2.0.1 9.9-open")
	p.Cells[8].Listed = false
	p.Cells = append(p.Cells, plan.Cell{Problem: &plan.Problem{Err: fault.New(fault.InputMissing, "no such build", "")}},
		plan.Cell{Problem: &plan.Problem{Err: fault.New(fault.Unsupported, "no R470", ""), Unavailable: true}})
	cfg := w.config()
	r := batch.Run(t.Context(), cfg, p)
	want := []string{
		"1.0.1 5.1-proprietary published", "1.0.1 5.1-open failed api-break", "1.0.1 9.9-proprietary published",
		"1.0.1 9.9-open unavailable unsupported",
		"1.0.2 5.1-proprietary published", "1.0.2 5.1-open failed api-break like 1.0.1/lakitu",
		"2.0.1 5.1-proprietary existed", "2.0.1 5.1-open failed api-break known", "2.0.1 9.9-open failed unsupported",
		" - failed input-missing", " - unavailable unsupported",
	}
	if diff := cmp.Diff(want, states(r)); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	// The cells start kernel by kernel. Cell "1.0.2 5.1-open" does not start: kernels 1.0.1 and 1.0.2 have one
	// fingerprint, and driver 5.1-open failed for kernel 1.0.1.
	if diff := cmp.Diff([]string{"1.0.1 5.1-proprietary", "1.0.1 5.1-open", "1.0.2 5.1-proprietary",
		"1.0.1 9.9-proprietary"}, w.began); diff != "" {
		t.Errorf("begun (-want +got):\n%s", diff)
	}
	slices.Sort(w.fetched)
	// Run may or may not fetch kernel 2.0.1. Only cell "2.0.1 9.9-open" needs it, and this cell fails at once if Run
	// learns first that driver 9.9 has no open flavour.
	w.fetched = slices.DeleteFunc(w.fetched, func(name string) bool { return name == "2.0.1" })
	if diff := cmp.Diff([]string{"1.0.1", "1.0.2", "5.1", "9.9"}, w.fetched); diff != "" {
		t.Errorf("fetched (-want +got):\n%s", diff)
	}
	if got, want := r.States[batch.Published], 3; got != want {
		t.Errorf("published %d; want %d", got, want)
	}
	wantFailures := []batch.Count{{Class: fault.InputMissing, Cells: 1}, {Class: fault.Unsupported, Cells: 1},
		{Class: fault.APIBreak, Cells: 3}}
	if diff := cmp.Diff(wantFailures, r.Failures); diff != "" {
		t.Errorf("failures (-want +got):\n%s", diff)
	}
	if f := r.Jobs[1].Failure; f.Error != errBreak.Error() || f.Hint == "" {
		t.Errorf("failure = %+v; want the compiler's line and a hint", f)
	}
	if text, err := os.ReadFile(r.Jobs[0].Log); err != nil || string(text) != "log of 1.0.1 5.1-proprietary\n" {
		t.Errorf("log = %q, %v", text, err)
	}
	// In the second run no cell starts.
	w.began, w.fetched = nil, nil
	for _, j := range r.Jobs {
		if j.State == batch.Published {
			w.published[w.name(j.Cell)] = j.Digest
		}
	}
	r = batch.Run(t.Context(), cfg, p)
	if len(w.began)+len(w.fetched) != 0 || r.States[batch.Existed] != 4 || r.States[batch.Failed] != 5 ||
		r.States[batch.Unavailable] != 2 {
		t.Errorf("second run begins %v, fetches %v, %v", w.began, w.fetched, r.States)
	}
	// Status builds nothing.
	w.published = nil
	r, err := batch.Status(t.Context(), cfg, p)
	if err != nil || len(w.began)+len(w.fetched) != 0 || r.States[batch.Missing] != 4 {
		t.Errorf("Status begins %v, fetches %v, %v, %v; want 4 missing", w.began, w.fetched, r.States, err)
	}
}

// TestUnknown has a destination that does not answer, so nobody knows whether the cell is published. Status must return
// an error, and Run must build the cell.
func TestUnknown(t *testing.T) {
	t.Parallel()
	w := &world{t: t}
	cfg := w.config()
	cfg.Published = func(context.Context, plan.Cell) (string, error) { return "", fault.New(fault.Transient, "down", "") }
	notes := 0
	cfg.Watch = func(e batch.Event) {
		if e.Kind == batch.Note {
			notes++
		}
	}
	p := cells("1.0.1 5.1-open")
	if r, err := batch.Status(t.Context(), cfg, p); !fault.Is(err, fault.Transient) {
		t.Errorf("Status = %v, %v; want a transient error", r, err)
	}
	if r := batch.Run(t.Context(), cfg, p); r.States[batch.Published] != 1 || notes != 2 {
		t.Errorf("Run: %v, %d notes; want the cell made, and one note for each lookup", r.States, notes)
	}
}

// TestAgain checks that Run pauses after a temporary failure, and then tries the cell again, while other cells run. A
// cell that ran out of memory must run alone in its next attempt.
func TestAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, duration: func(plan.Cell) time.Duration { return time.Minute }}
		w.outcome = func(c plan.Cell, attempt int) error {
			switch c.Kernel.BuildID {
			case "1.0.1": // in every attempt
				return fault.New(fault.Transient, "down", "")
			case "2.0.1":
				if attempt == 1 {
					return fault.New(fault.OutOfMemory, "killed", "")
				}
				if len(w.running) != 1 {
					t.Errorf("a cell that ran out of memory runs again together with %v; want it alone", w.running)
				}
			case "3.0.1":
				return errors.New("a bug") // Run does not try a cell again after a bug
			}
			return nil
		}
		cfg := w.config()
		cfg.Parallel = 3
		r := batch.Run(t.Context(), cfg,
			cells("1.0.1 5.1-open", "2.0.1 5.1-open", "3.0.1 5.1-open", "4.0.1 5.1-open", "5.0.1 5.1-open", "6.0.1 5.1-open"))
		want := []string{
			"1.0.1 5.1-open failed transient 3 attempts", "2.0.1 5.1-open published 2 attempts",
			"3.0.1 5.1-open failed internal",
			"4.0.1 5.1-open published", "5.0.1 5.1-open published", "6.0.1 5.1-open published",
		}
		if diff := cmp.Diff(want, states(r)); diff != "" {
			t.Errorf("states (-want +got):\n%s", diff)
		}
		if w.most != 3 {
			t.Errorf("at most %d cells ran at the same time; want 3", w.most)
		}
		if len(w.memory) != 0 {
			t.Errorf("stored failures = %v; want none, because temporary failures and bugs are not permanent", w.memory)
		}
	})
}

// TestFetchTrouble checks that a failed fetch fails only the cells that need the input. Run must fetch again after a
// temporary failure.
func TestFetchTrouble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t}
		tries := 0
		w.arrive = func(name string) error {
			switch name {
			case "1.0.1":
				return fault.New(fault.InputMissing, "no headers", "")
			case "7.7":
				return fault.New(fault.Unsupported, "no runfile of ours", "")
			case "2.0.1":
				if tries++; tries < 3 {
					return fault.New(fault.Transient, "down", "")
				}
			}
			return nil
		}
		r := batch.Run(t.Context(), w.config(), cells("1.0.1 5.1-open", "2.0.1 5.1-open", "2.0.1 7.7-open"))
		want := []string{"1.0.1 5.1-open failed input-missing", "2.0.1 5.1-open published",
			"2.0.1 7.7-open failed unsupported"}
		if diff := cmp.Diff(want, states(r)); diff != "" {
			t.Errorf("states (-want +got):\n%s", diff)
		}
	})
}

// TestCancel checks that running cells are cancelled and no other cell starts when the context ends.
func TestCancel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := &world{t: t, arrive: waitASecond, duration: func(plan.Cell) time.Duration { return time.Hour }}
		time.AfterFunc(90*time.Minute, cancel)
		r := batch.Run(ctx, w.config(), cells("1.0.1 5.1-open", "2.0.1 5.1-open", "3.0.1 5.1-open"))
		want := []string{"1.0.1 5.1-open published", "2.0.1 5.1-open cancelled cancelled",
			"3.0.1 5.1-open cancelled cancelled"}
		if diff := cmp.Diff(want, states(r)); diff != "" {
			t.Errorf("states (-want +got):\n%s", diff)
		}
		if err := r.Err(); !fault.Is(err, fault.Cancelled) {
			t.Errorf("Err = %v; want cancelled", err)
		}
	})
}

// TestStopping checks that running cells finish and no other cell starts after the stop signal.
func TestStopping(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stopping := make(chan struct{})
		w := &world{t: t, arrive: waitASecond, duration: func(plan.Cell) time.Duration { return time.Hour }}
		time.AfterFunc(30*time.Minute, func() { close(stopping) })
		cfg := w.config()
		cfg.Stopping = stopping
		r := batch.Run(t.Context(), cfg, cells("1.0.1 5.1-open", "2.0.1 5.1-open"))
		want := []string{"1.0.1 5.1-open published", "2.0.1 5.1-open cancelled cancelled"}
		if diff := cmp.Diff(want, states(r)); diff != "" {
			t.Errorf("states (-want +got):\n%s", diff)
		}
	})
}

// TestStoppingFetch checks that Run does not wait for inputs after the stop signal, because no cell will use them.
func TestStoppingFetch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stopping := make(chan struct{})
		w := &world{t: t}
		cfg := w.config()
		cfg.Stopping = stopping
		cfg.Kernel = func(ctx context.Context, _ target.Kernel, _ func(string)) (target.Fingerprint, error) {
			<-ctx.Done()
			return "", ctx.Err()
		}
		time.AfterFunc(time.Minute, func() { close(stopping) })
		r := batch.Run(t.Context(), cfg, cells("1.0.1 5.1-open", "2.0.1 5.1-open"))
		want := []string{"1.0.1 5.1-open cancelled cancelled", "2.0.1 5.1-open cancelled cancelled"}
		if diff := cmp.Diff(want, states(r)); diff != "" {
			t.Errorf("states (-want +got):\n%s", diff)
		}
	})
}

// TestErr checks the error that decides the exit code. If all failures have one fault class, the error has this class.
// If they have several classes, the error has the class Several. A failed cell that is an early warning does not count.
func TestErr(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		fails map[string]error
		early string
		kind  fault.Kind
		ok    bool
	}{
		{name: "all published", ok: true},
		{name: "one class", fails: map[string]error{"1.0.1": errBreak, "2.0.1": errBreak}, kind: fault.APIBreak},
		{name: "several classes", fails: map[string]error{"1.0.1": errBreak, "2.0.1": fault.New(fault.CheckFailed, "x", "")},
			kind: fault.Several},
		{name: "early warnings only", fails: map[string]error{"3.0.1": errBreak}, early: "3.0.1", ok: true},
		{name: "early warnings beside others",
			fails: map[string]error{"1.0.1": errBreak, "3.0.1": fault.New(fault.CheckFailed, "x", "")}, early: "3.0.1",
			kind: fault.APIBreak},
	}
	for _, row := range rows {
		w := &world{t: t, outcome: func(c plan.Cell, _ int) error { return row.fails[c.Kernel.BuildID] }}
		p := cells("1.0.1 5.1-open", "2.0.1 5.1-open", "3.0.1 5.1-open")
		for i := range p.Cells {
			p.Cells[i].EarlyWarning = p.Cells[i].Kernel.BuildID == row.early
		}
		r := batch.Run(t.Context(), w.config(), p)
		if err := r.Err(); (err == nil) != row.ok || err != nil && fault.Of(err) != row.kind {
			t.Errorf("%s: Err = %v (%v); want %v", row.name, err, fault.Of(err), row.kind)
		}
		if got := r.Early() > 0; got != (row.early != "") {
			t.Errorf("%s: Early = %d", row.name, r.Early())
		}
	}
}

// TestEvents checks that Watch gets one event after the other. Each event has the number of cells that are finished at
// that moment.
func TestEvents(t *testing.T) {
	t.Parallel()
	w := &world{t: t}
	var seen []string
	cfg := w.config()
	cfg.Watch = func(e batch.Event) {
		seen = append(seen, fmt.Sprintf("%d/%d %d %s %s%s", e.Done, e.Total, e.Kind, e.Job.State, e.Phase.Phase, e.Text))
	}
	batch.Run(t.Context(), cfg, cells("1.0.1 5.1-open"))
	want := []string{"0/1 5  driver 5.1: here", "0/1 0  ", "0/1 1  compile", "0/1 1  compile", "1/1 3 published "}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
