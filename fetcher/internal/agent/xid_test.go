package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

const (
	brokenGPU = "<3>[   21.000000] NVRM: Xid (PCI:0000:00:04): 48, pid=1, An uncorrectable double bit error (DBE)"
	resetGPU  = "<3>[   22.000000] NVRM: Xid (PCI:0000:00:04): 154, GPU recovery action changed from 0x1 (GPU Reset " +
		"Required) to 0x0 (None)"
)

// TestXidOutlivesProgram checks that a fatal GPU error (Xid) in the kernel log still counts after a restart of the
// fetcher. In each row, a new process runs the agent.
func TestXidOutlivesProgram(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.kernel.log = []string{"<3>[   10.000000] NVRM: Xid (PCI:0000:00:04): 95, before the load"}
	many := []string{}
	for i := range 600 {
		many = append(many, fmt.Sprintf("<3>[ 1%d.000000] NVRM: Xid (PCI:0000:00:04): 119, pid=%d, Timeout", i, i))
	}
	rows := []struct {
		name   string
		change func()
		state  gpucheck.State
	}{
		{"an error from before the load", func() {}, gpucheck.Ready},
		{"an error", func() { n.kernel.log = append(n.kernel.log, brokenGPU) }, gpucheck.Unusable},
		{"the same error", func() {}, gpucheck.Unusable},
		{"only new lines are left", func() { n.kernel.log = []string{brokenGPU} }, gpucheck.Unusable},
		{"the GPU was reset", func() { n.kernel.log = append(n.kernel.log, resetGPU) }, gpucheck.Ready},
		{"many errors", func() { n.kernel.log = append(n.kernel.log, many...) }, gpucheck.Unusable},
		{"the GPU was reset after many errors", func() { n.kernel.log = append(n.kernel.log, resetGPU) }, gpucheck.Ready},
		{"another error", func() { n.kernel.log = append(n.kernel.log, brokenGPU) }, gpucheck.Unusable},
		{"somebody loaded the driver again", func() {
			n.kernel.log = append(n.kernel.log,
				"<4>[   90.000000] NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  535.261.03  Release Build")
		}, gpucheck.Ready},
		{"an error before a reboot", func() { n.kernel.log = append(n.kernel.log, brokenGPU) }, gpucheck.Unusable},
		{"a reboot", func() { n.kernel.log = nil; n.reboot(t) }, gpucheck.Ready},
	}
	for _, row := range rows { // each row begins with the state that the row before it left
		row.change()
		r, err := n.run(t, ref, p.Digest, c.Driver)
		if r.Verdict.State != row.state || row.state == gpucheck.Unusable && !strings.Contains(r.Verdict.Reason, "Xid") {
			t.Errorf("%s: Run = %s %s, %v; want %s", row.name, r.Verdict.State, r.Verdict.Reason, err, row.state)
		}
	}
}

// repairable stands in for NVML on a node with one GPU, which can break and be reset.
type repairable struct {
	probe
	state *atomic.Int32
}

// These are the states of a GPU of type repairable.
const (
	healthy  = iota
	lost     // NVML says that the GPU is lost
	slow     // the GPU's firmware answers too late
	marked   // the GPU answers, but the driver asks for a reset
	unmarked // the GPU answers, and the driver asks for no reset
	unasked  // NVML lists no GPU
)

func (p repairable) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	nvml, err := p.probe.Probe(ctx, library, persist)
	if err != nil {
		return nvml, err
	}
	gpu := &nvml.Devices[0]
	gpu.PCIBusID = "00000000:00:04.0"
	switch p.state.Load() {
	case lost:
		gpu.Error, gpu.Code = "read name: GPU is lost", 15
	case slow:
		gpu.Error, gpu.Code = "read name: Timeout", 10
	case marked:
		gpu.Recovery = new(int64(1))
	case unmarked:
		gpu.Recovery = new(int64(0))
	case unasked:
		nvml.Devices, nvml.Error = nil, "count GPUs: Unknown Error"
	}
	return nvml, nil
}

// watchGPU runs the agent on a node with one GPU, and then checks the driver with Monitor. After check i, it calls
// steps[i]. It returns each verdict that differs from the one before, and the number of the check that had the last of
// them.
func watchGPU(t *testing.T, n *node, steps map[int]func(), checks int) (seen []string, last int) {
	t.Helper()
	a := agent.New(n.cfg, n.parts)
	if _, err := a.Run(t.Context()); err != nil && !fault.Is(err, fault.Unusable) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	check := 0
	err := a.Monitor(ctx, time.Millisecond, watcher(func(v gpucheck.Verdict) {
		check++
		if word := string(v.State) + " " + v.Reason; len(seen) == 0 || seen[len(seen)-1] != word {
			seen, last = append(seen, word), check
		}
		if do := steps[check]; do != nil {
			do()
		}
		if check == checks {
			cancel()
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	return seen, last
}

// says adds a line to the kernel log.
func (n *node) says(line string) {
	n.kernel.mu.Lock()
	defer n.kernel.mu.Unlock()
	n.kernel.log = append(n.kernel.log, line)
}

// resettable returns a node with one GPU, the state of that GPU, and a function that runs the agent once.
func resettable(t *testing.T) (n *node, state *atomic.Int32, run func() *agent.Report) {
	t.Helper()
	n, ref, c, p := bare(t)
	state = &atomic.Int32{}
	n.parts.Probe = repairable{probe{n.root, 1}, state}
	n.kernel.log = []string{"<6>[    1.000000] the kernel boots"}
	n.answer(ref, p.Digest, c.Driver)
	return n, state, func() *agent.Report {
		r, _ := n.run(t, ref, p.Digest, c.Driver) // the verdict has the error
		return r
	}
}

const noLonger = "ready NVML said that the GPU needs a reset, and then listed it as healthy in 5 checks, so this no " +
	"longer counts: "

// TestXidOfResetGPU checks a fatal error of a GPU that an operator then resets. The driver does not report the reset.
// So the error must stop counting once NVML called the GPU lost and then lists it as healthy in five checks. Before
// that, healthy answers must not clear the error. A new process must know what was cleared.
func TestXidOfResetGPU(t *testing.T) {
	t.Parallel()
	n, state, run := resettable(t)
	const offTheBus = "NVRM: Xid (PCI:0000:00:04): 79, GPU has fallen off the bus."
	set := func(to int32) func() { return func() { state.Store(to) } }
	// The GPU breaks twice. The second error comes while the agent counts healthy checks, so it must start to count again.
	seen, last := watchGPU(t, n, map[int]func(){
		2: func() { n.says("<3>[   21.000000] " + offTheBus) },
		4: set(unasked), 5: set(healthy), // NVML as a whole fails, which does not mean that the GPU was lost
		12: set(lost), 14: set(healthy),
		17: func() { n.says("<3>[   31.000000] " + offTheBus) },
		20: set(lost), 22: set(healthy),
	}, 40)
	counts := "unusable the driver reports Xid 79 of GPU 0000:00:04: GPU has fallen off the bus."
	gone := "unusable 0 of 1 GPUs usable: 0000:00:04.0: read name: GPU is lost"
	unlisted := "unusable 0 of 1 GPUs usable: 0000:00:04.0 is not listed"
	want := []string{"ready ", counts, unlisted, counts, gone, counts, gone, counts,
		noLonger + "Xid 79 of GPU 0000:00:04: GPU has fallen off the bus."}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
	if last != 22+6 {
		t.Errorf("ready at check %d; want %d, after 5 healthy answers", last, 22+6)
	}
	if r := run(); r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run of a new process = %s %s; want ready", r.Verdict.State, r.Verdict.Reason)
	}
	n.says("<3>[   41.000000] " + offTheBus)
	if r := run(); r.Verdict.State != gpucheck.Unusable {
		t.Errorf("Run after another error = %s; want unusable", r.Verdict.State)
	}
}

// TestXidOutlivesHealthyAnswers checks errors for which NVIDIA's Xid catalogue demands a reset. Failed and then healthy
// answers of NVML must not clear such an error: firmware that was too slow once answers the next call without a reset.
// The error must count until the node reboots.
func TestXidOutlivesHealthyAnswers(t *testing.T) {
	t.Parallel()
	for _, xid := range []string{
		"119, pid=1, name=x, Timeout after 45s of waiting for RPC response from GPU0 GSP!",
		"120, GSP kernel exception",
		"48, pid=1, An uncorrectable double bit error (DBE)",
	} {
		n, state, run := resettable(t)
		set := func(to int32) func() { return func() { state.Store(to) } }
		seen, _ := watchGPU(t, n, map[int]func(){
			2: func() { n.says("<3>[   21.000000] NVRM: Xid (PCI:0000:00:04): " + xid) },
			4: set(slow), 6: set(unmarked), // the GPU stays so for 24 checks
		}, 30)
		counts := "unusable the driver reports Xid " + strings.Replace(xid, ",", " of GPU 0000:00:04:", 1)
		want := []string{"ready ", counts, "unusable 0 of 1 GPUs usable: 0000:00:04.0: read name: Timeout", counts}
		if diff := cmp.Diff(want, seen); diff != "" {
			t.Errorf("%s: verdicts (-want +got):\n%s", xid, diff)
		}
		if r := run(); r.Verdict.State != gpucheck.Unusable {
			t.Errorf("%s: Run of a new process = %s; want unusable", xid, r.Verdict.State)
		}
		n.reboot(t)
		n.kernel.log = []string{"<6>[    1.000000] the kernel boots"}
		if r := run(); r.Verdict.State != gpucheck.Ready {
			t.Errorf("%s: Run after a reboot = %s %s; want ready", xid, r.Verdict.State, r.Verdict.Reason)
		}
	}
}

// TestXidOfMarkedGPU checks a GPU that answers all the time, while its driver asks for a reset (NVML's recovery
// action). Once the driver no longer asks for a reset, the error must stop counting.
func TestXidOfMarkedGPU(t *testing.T) {
	t.Parallel()
	n, state, _ := resettable(t)
	set := func(to int32) func() { return func() { state.Store(to) } }
	const xid = "119, pid=1, Timeout"
	seen, last := watchGPU(t, n, map[int]func(){
		2:  func() { n.says("<3>[   21.000000] NVRM: Xid (PCI:0000:00:04): " + xid); state.Store(marked) },
		12: set(unmarked),
	}, 30)
	counts := "unusable the driver reports Xid 119 of GPU 0000:00:04: pid=1, Timeout"
	want := []string{"ready ", counts + "; NVML reports that GPU 00000000:00:04.0 needs a reset", counts,
		noLonger + "Xid 119 of GPU 0000:00:04: pid=1, Timeout"}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
	if last != 12+6 {
		t.Errorf("ready at check %d; want %d, after 5 healthy answers", last, 12+6)
	}
}

// TestXidOfResetGPUAfterRestart restarts the fetcher between the error of a GPU and its reset. The same rule applies as
// without a restart: NVML must have said that the GPU needs a reset, and must then list it as healthy.
func TestXidOfResetGPUAfterRestart(t *testing.T) {
	t.Parallel()
	const offTheBus = "NVRM: Xid (PCI:0000:00:04): 79, GPU has fallen off the bus."
	for _, row := range []struct {
		name string
		sees int32          // the GPU's state after the error, while the first process runs
		down func(n *node)  // what happens while no process runs
		runs int32          // the GPU's state during the first run of the next process, which then finds it healthy
		want gpucheck.State // the last verdict
	}{
		{"reset while no program ran", lost, func(*node) {}, healthy, gpucheck.Ready},
		{"reset after the restart", lost, func(*node) {}, lost, gpucheck.Ready},
		{"marked by the driver", marked, func(*node) {}, unmarked, gpucheck.Ready},
		{"lost only after the restart", healthy, func(*node) {}, lost, gpucheck.Ready},
		{"the log dropped the error", lost, func(n *node) { n.kernel.log = []string{"<6>[   90.000000] newer"} }, healthy,
			gpucheck.Ready},
		{"never needed a reset", healthy, func(*node) {}, healthy, gpucheck.Unusable},
		{"another error", lost, func(n *node) { n.says("<3>[   80.000000] " + offTheBus) }, healthy, gpucheck.Unusable},
	} {
		n, state, _ := resettable(t)
		set := func(to int32) func() { return func() { state.Store(to) } }
		watchGPU(t, n, map[int]func(){2: func() { n.says("<3>[   21.000000] " + offTheBus) }, 3: set(row.sees)}, 6)
		row.down(n)
		state.Store(row.runs)
		seen, last := watchGPU(t, n, map[int]func(){1: set(healthy)}, 30)
		if got := seen[len(seen)-1]; !strings.HasPrefix(got, string(row.want)+" ") || row.want == gpucheck.Ready && last < 5 {
			t.Errorf("%s: last verdict %q at check %d; want %s, after 5 healthy answers", row.name, got, last, row.want)
		}
		if got := seen[0]; !strings.HasPrefix(got, string(gpucheck.Unusable)) {
			t.Errorf("%s: first verdict after the restart %q; want unusable", row.name, got)
		}
	}
}

// TestXidOutlivesLog checks that a new process knows a fatal error that the kernel log no longer has.
func TestXidOutlivesLog(t *testing.T) {
	t.Parallel()
	n, _, run := resettable(t)
	watchGPU(t, n, map[int]func(){2: func() { n.says(brokenGPU) }}, 4)
	n.kernel.log = []string{"<6>[   90.000000] newer lines"}
	s, err := agent.New(n.cfg, n.parts).Status(t.Context())
	if err != nil || s.Verdict.State != gpucheck.Unusable || !strings.Contains(s.Verdict.Reason, "Xid 48") {
		t.Errorf("Status = %+v, %v; want unusable, because of Xid 48", s, err)
	}
	if r := run(); r.Verdict.State != gpucheck.Unusable || !strings.Contains(r.Verdict.Reason, "Xid 48") {
		t.Errorf("Run = %s %s; want unusable, because of Xid 48", r.Verdict.State, r.Verdict.Reason)
	}
}

// TestStatusKnowsXids checks that `fetcher status` and the quick verdict before a run know the fatal errors in the
// kernel log.
func TestStatusKnowsXids(t *testing.T) {
	t.Parallel()
	n, _, run := resettable(t)
	run()
	for _, row := range []struct {
		line string
		want gpucheck.State
	}{
		{"<6>[   20.000000] NVRM: Xid (PCI:0000:00:04): 31, pid=1, MMU Fault", gpucheck.Ready},
		{brokenGPU, gpucheck.Unusable}, {resetGPU, gpucheck.Ready},
	} {
		n.says(row.line)
		a := agent.New(n.cfg, n.parts)
		s, err := a.Status(t.Context())
		if err != nil || s.Verdict.State != row.want {
			t.Errorf("after %q: Status = %+v, %v; want %s", row.line, s, err, row.want)
		}
		if v, ok := a.QuickVerdict(t.Context()); v.State != row.want || ok != (row.want != gpucheck.Ready) {
			t.Errorf("after %q: QuickVerdict = %s, %t; want %s", row.line, v.State, ok, row.want)
		}
	}
}

// changeRecord changes the record of the last run, as another release would have written it. A value of nil removes a
// field.
func (n *node) changeRecord(t *testing.T, set map[string]any) {
	t.Helper()
	path := filepath.Join(n.root, installDir, ".prebake/verdict.json")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var rec map[string]any
	if err := json.Unmarshal(raw, &rec); err != nil {
		t.Fatal(err)
	}
	maps.Copy(rec, set)
	maps.DeleteFunc(rec, func(_ string, value any) bool { return value == nil })
	if raw, err = json.Marshal(rec); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestXidsAfterUpgrade updates the fetcher to a release that counts more errors as fatal. An error that the older
// release ignored must not make the GPU unusable after the update. Errors that were fatal before the update, and errors
// that happen after it, must count.
func TestXidsAfterUpgrade(t *testing.T) {
	t.Parallel()
	xid := func(at, number int) string {
		return fmt.Sprintf("<3>[   %d.000000] NVRM: Xid (PCI:0000:00:04): %d, pid=1, text", at, number)
	}
	first := map[string]any{"fatalXids": nil} // the first releases stored no list
	for _, row := range []struct {
		name   string
		record map[string]any
		lines  []string // logged while the older release ran
		want   gpucheck.State
		later  string // logged after the upgrade
		then   gpucheck.State
	}{
		{"passed over by the first releases", first, []string{xid(20, 109)}, gpucheck.Ready, xid(30, 109),
			gpucheck.Unusable},
		{"fatal for all releases", first, []string{xid(20, 109), xid(21, 79)}, gpucheck.Unusable, "", gpucheck.Unusable},
		{"of a MIG instance", first, []string{"<3>[   20.000000] NVRM: Xid (PCI:0000:00:04 GPU-I:01 GPU-CI:00): 119, x"},
			gpucheck.Ready, xid(30, 120), gpucheck.Unusable},
		{"passed over by a release with a list", map[string]any{"fatalXids": []int{46, 48}}, []string{xid(20, 79)},
			gpucheck.Ready, xid(30, 79), gpucheck.Unusable},
		{"in the list", map[string]any{"fatalXids": []int{46, 48}}, []string{xid(20, 48)}, gpucheck.Unusable, "",
			gpucheck.Unusable},
		{"no longer fatal", map[string]any{"fatalXids": []int{48, 155}, "xids": []string{xid(15, 155)}}, nil,
			gpucheck.Ready, xid(30, 155), gpucheck.Ready},
		{"the same release", nil, []string{xid(20, 109)}, gpucheck.Unusable, "", gpucheck.Unusable},
	} {
		n, _, run := resettable(t)
		run()
		n.changeRecord(t, row.record)
		for _, line := range row.lines {
			n.says(line)
		}
		for i := range 3 {
			if r := run(); r.Verdict.State != row.want {
				t.Errorf("%s: Run %d after the upgrade = %s %s; want %s", row.name, i, r.Verdict.State, r.Verdict.Reason, row.want)
			}
		}
		if row.later != "" {
			n.says(row.later)
		}
		if r := run(); r.Verdict.State != row.then {
			t.Errorf("%s: Run after a later line = %s %s; want %s", row.name, r.Verdict.State, r.Verdict.Reason, row.then)
		}
	}
}

// TestRecoveryActionBlamesNoDriver replaces the driver on a node whose GPU already needs a reset. The new driver must
// stay, and no report to the server may blame it. If a fatal error happens after its load, the agent must return to the
// former driver.
func TestRecoveryActionBlamesNoDriver(t *testing.T) {
	t.Parallel()
	for _, blamed := range []bool{false, true} {
		n, ref, _, newer, po, pn := publishTwo(t, 1)
		sample.Write(t, n.root, "etc/machine-id", "0123456789abcdef0123456789abcdef\n")
		state := &atomic.Int32{}
		state.Store(marked)
		n.parts.Probe = repairable{probe{n.root, 1}, state}
		var outcomes []api.Outcome
		n.parts.Tried = func(r api.NodeReport) { outcomes = append(outcomes, r.Outcome) }
		digest, want := pn.Digest, []api.Outcome(nil)
		if blamed {
			n.kernel.says = map[string]string{"nvidia_uvm " + newVersion: brokenGPU}
			digest, want = po.Digest, []api.Outcome{api.FellBack}
		}
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if !fault.Is(err, fault.Unusable) || r.Verdict.State != gpucheck.Unusable || r.Verdict.Digest != digest ||
			!strings.Contains(r.Verdict.Reason, "NVML reports that GPU 00000000:00:04.0 needs a reset") {
			t.Errorf("blamed %t: Run = %+v, %v; want %s active, and the need of a reset", blamed, r.Verdict, err, digest)
		}
		if !slices.Equal(outcomes, want) {
			t.Errorf("blamed %t: reports %v; want %v", blamed, outcomes, want)
		}
	}
}

// TestCheckIsRecorded checks that `fetcher status` shows the result of the last check of `fetcher run`. It also checks
// that the agent does not roll back a new driver because of a GPU that was lost before the load.
func TestCheckIsRecorded(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	state := &atomic.Int32{}
	n.parts.Probe = repairable{probe{n.root, 1}, state}
	a := agent.New(n.cfg, n.parts)
	for _, row := range []struct {
		state int32
		want  gpucheck.State
	}{
		{healthy, gpucheck.Ready}, {lost, gpucheck.Unusable}, {healthy, gpucheck.Ready}, {marked, gpucheck.Unusable},
		{unasked, gpucheck.Unusable}, {healthy, gpucheck.Ready}, {unasked, gpucheck.Ready}, {lost, gpucheck.Unusable},
	} {
		state.Store(row.state)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := a.Monitor(ctx, time.Millisecond, watcher(func(gpucheck.Verdict) { cancel() })); err != nil {
			t.Fatal(err)
		}
		if s, err := a.Status(t.Context()); err != nil || s.Verdict.State != row.want || s.CheckedAt == nil {
			t.Errorf("Status after a check in state %d = %+v, %v; want %s", row.state, s, err, row.want)
		}
	}
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Unusable) || r.Verdict.Digest != pn.Digest || !r.Changed {
		t.Errorf("Run = %+v, %v; want the new driver active, and unusable", r.Verdict, err)
	}
}
