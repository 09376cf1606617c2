package batch

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestOrder checks the order in which several workers start cells. The first cell with a kernel or a driver puts
// results into the cache. While it runs, other cells with this kernel or driver wait, if another cell can start. Each
// step ends one running cell, if the step names one, and then starts one cell.
func TestOrder(t *testing.T) {
	t.Parallel()
	p := &plan.Plan{}
	for _, kernel := range []string{"1.0.1", "1.0.2", "2.0.1", "3.0.1"} {
		for _, driver := range []string{"5.1", "6.1"} {
			p.Cells = append(p.Cells, plan.Cell{
				Kernel: target.Kernel{BuildID: kernel}, Driver: target.Driver{Version: driver, Flavour: target.Open},
				EarlyWarning: kernel == "1.0.2" && driver == "6.1",
			})
		}
	}
	f := newRunner(Config{Attempts: 1}, p)
	for _, j := range f.jobs {
		family, _, _ := strings.Cut(j.Cell.Kernel.BuildID, ".") // 1.0.1 and 1.0.2 have one fingerprint
		j.kernel.arrived, j.kernel.fingerprint = true, target.Fingerprint(family)
		j.driver.arrived, j.driver.flavours = true, []target.Flavour{target.Open}
	}
	byName := map[string]*job{}
	name := func(j *job) string { return j.Cell.Kernel.BuildID + " " + j.Cell.Driver.Version }
	for _, j := range f.jobs {
		byName[name(j)] = j
	}
	for i, step := range []struct{ end, begin string }{
		{"", "1.0.1 5.1"},          // no cell has finished, so the plan's order counts
		{"", "2.0.1 6.1"},          // a different kernel and a different driver
		{"1.0.1 5.1", "1.0.2 5.1"}, // the same fingerprint and driver as 1.0.1 5.1, whose results are in the cache
		{"1.0.2 5.1", "3.0.1 5.1"}, // kernel 2.0.1 and driver 6.1 wait: the first cell with each of them still runs
		{"2.0.1 6.1", "1.0.1 6.1"}, // finished cells had this kernel and this driver, so their results are in the cache
		{"3.0.1 5.1", "2.0.1 5.1"},
		{"1.0.1 6.1", "3.0.1 6.1"}, // the early warning 1.0.2 6.1 starts last
		{"2.0.1 5.1", "1.0.2 6.1"},
	} {
		if j := byName[step.end]; j != nil {
			f.endAttempt(t.Context(), j, &pipeline.Result{}, nil, time.Second)
		}
		got, _, _ := f.pick(time.Now())
		if got == nil {
			t.Fatalf("step %d: nothing begun; want %s", i, step.begin)
		}
		if diff := cmp.Diff(step.begin, name(got)); diff != "" {
			t.Fatalf("step %d: begun (-want +got):\n%s", i, diff)
		}
		got.running = true
	}
	if j, _, open := f.pick(time.Now()); j != nil || open {
		t.Errorf("after the last cell: %v, open %t", j, open)
	}
}

var errBreak = fault.New(fault.APIBreak, "x.c:1: error: no such field", "")

// TestLateTwin has two cells with the same fingerprint and driver, which are one build. The first cell fails before the
// second cell's kernel arrives. The second cell must then fail without an attempt.
func TestLateTwin(t *testing.T) {
	t.Parallel()
	cell := func(kernel string) plan.Cell {
		return plan.Cell{Kernel: target.Kernel{BuildID: kernel, Board: "lakitu"},
			Driver: target.Driver{Version: "5.1", Flavour: target.Open}}
	}
	f := newRunner(Config{Attempts: 1}, &plan.Plan{Cells: []plan.Cell{cell("1.0.1"), cell("1.0.2")}})
	first, twin := f.jobs[0], f.jobs[1]
	f.endFetch(t.Context(), first.driver, func() { first.driver.flavours = []target.Flavour{target.Open} }, nil)
	f.endFetch(t.Context(), first.kernel, func() { first.kernel.fingerprint = "1" }, nil)
	if j, _, _ := f.pick(time.Now()); j != first {
		t.Fatalf("pick = %v; want the first", j)
	}
	f.endAttempt(t.Context(), first, nil, errBreak, time.Second)
	f.endFetch(t.Context(), twin.kernel, func() { twin.kernel.fingerprint = "1" }, nil)
	if twin.State != Failed || twin.Like != "1.0.1/lakitu" || twin.Attempts != 0 {
		t.Errorf("twin is %s, like %q, %d attempts; want it failed like the first", twin.State, twin.Like, twin.Attempts)
	}
}

// TestTwinTriesItself checks which failures count for all cells with the same fingerprint and driver. A failed
// compilation does. A failure that depends on the COS build does not, so the other cell must start.
func TestTwinTriesItself(t *testing.T) {
	t.Parallel()
	phases := func(failed string) *pipeline.Result {
		res := &pipeline.Result{}
		for _, name := range []string{"source", "look up", "take modules", "compile", "sign modules", "check"} {
			res.Phases = append(res.Phases, timeline.Phase{Name: name, Failed: name == failed})
			if name == failed {
				break
			}
		}
		return res
	}
	for _, row := range []struct {
		kind   fault.Kind
		phase  string
		shared bool
	}{
		{fault.APIBreak, "compile", true},
		{fault.Unsupported, "compile", true},
		{fault.CheckFailed, "check", false},
		{fault.Unsupported, "source", false},
		{fault.Unsupported, "look up", false},
		{fault.CheckFailed, "take modules", false},
		{fault.CheckFailed, "sign modules", false},
	} {
		var cells []plan.Cell
		for _, kernel := range []string{"1.0.1", "1.0.2"} {
			cells = append(cells, plan.Cell{Kernel: target.Kernel{BuildID: kernel, Board: "lakitu"},
				Driver: target.Driver{Version: "5.1", Flavour: target.Open}})
		}
		f := newRunner(Config{Attempts: 1}, &plan.Plan{Cells: cells})
		for _, j := range f.jobs {
			j.kernel.arrived, j.kernel.fingerprint, j.driver.arrived, j.driver.flavours =
				true, "1", true, []target.Flavour{target.Open}
		}
		first, twin := f.jobs[0], f.jobs[1]
		f.endAttempt(t.Context(), first, phases(row.phase), fault.New(row.kind, "x", ""), time.Second)
		next, _, _ := f.pick(time.Now())
		if first.State != Failed || (twin.State == Failed) != row.shared || (next == twin) == row.shared {
			t.Errorf("%v in %q: the first is %q, the twin %q; want that they fail alike: %v", row.kind, row.phase, first.State,
				twin.State, row.shared)
		}
	}
}

// TestNothingIsBegunMeanwhile checks which cell another worker can start at the moment when an attempt ends. It must
// not start the same cell again. It may start a cell with the same fingerprint and driver only if the attempt
// succeeded.
func TestNothingIsBegunMeanwhile(t *testing.T) {
	t.Parallel()
	var cells []plan.Cell
	for _, kernel := range []string{"1.0.1", "1.0.2"} {
		cells = append(cells, plan.Cell{Kernel: target.Kernel{BuildID: kernel, Board: "lakitu"},
			Driver: target.Driver{Version: "5.1", Flavour: target.Open}})
	}
	for _, row := range []struct {
		name   string
		err    error
		state  State
		digest string
		twin   bool // whether the other cell, with the same fingerprint and driver, starts next
	}{
		{"made", nil, Published, "sha256:1", true},
		{"failed", errBreak, Failed, "", false},
	} {
		var f *runner
		var begun []string
		look := func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if j, _, _ := f.pick(time.Now()); j != nil {
				begun = append(begun, j.Cell.Kernel.BuildID)
			}
		}
		f = newRunner(Config{Attempts: 1}, &plan.Plan{Cells: cells})
		for _, j := range f.jobs {
			j.kernel.arrived, j.kernel.fingerprint, j.driver.arrived, j.driver.flavours =
				true, "1", true, []target.Flavour{target.Open}
		}
		first, twin := f.jobs[0], f.jobs[1]
		first.running = true
		woken, looked := f.changed, make(chan struct{})
		f.eventMu.Lock() // endAttempt cannot send its event before look has run
		go func() {
			defer close(looked)
			<-woken
			look()
			f.eventMu.Unlock()
		}()
		f.endAttempt(t.Context(), first, &pipeline.Result{Digest: "sha256:1"}, row.err, time.Second)
		<-looked
		var want []string
		if row.twin {
			want = []string{twin.Cell.Kernel.BuildID}
		}
		if diff := cmp.Diff(want, begun); diff != "" {
			t.Errorf("%s: begun (-want +got):\n%s", row.name, diff)
		}
		if first.State != row.state || first.Digest != row.digest {
			t.Errorf("%s: it is %s, digest %q; want %s, %q", row.name, first.State, first.Digest, row.state, row.digest)
		}
		if failed := twin.State == Failed && twin.Like == "1.0.1/lakitu"; failed == row.twin {
			t.Errorf("%s: its twin is %q, like %q", row.name, twin.State, twin.Like)
		}
	}
}
