package agent_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

const (
	brokenGPU = "<3>[   21.000000] NVRM: Xid (PCI:0000:00:04): 48, pid=1, An uncorrectable double bit error (DBE)"
	resetGPU  = "<3>[   22.000000] NVRM: Xid (PCI:0000:00:04): 154, GPU recovery action changed from 0x1 (GPU Reset " +
		"Required) to 0x0 (None)"
)

// TestXidOutlivesProgram checks that a restart of the program does not hide a fatal error in the kernel log. Each run
// of the rows is a new program.
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
	for _, row := range rows { // each begins where the one before it ended
		row.change()
		r, err := n.run(t, ref, p.Digest, c.Driver)
		if r.Verdict.State != row.state || row.state == gpucheck.Unusable && !strings.Contains(r.Verdict.Reason, "Xid") {
			t.Errorf("%s: Run = %s %s, %v; want %s", row.name, r.Verdict.State, r.Verdict.Reason, err, row.state)
		}
	}
}

// repairable is NVML on a node with one GPU, which can break and be reset.
type repairable struct {
	probe
	state *atomic.Int32
}

// These are the states of a repairable GPU.
const (
	healthy  = iota
	lost     // NVML says that the GPU is lost
	slow     // the GPU's firmware does not answer in time
	marked   // the GPU answers, and the driver wants it reset
	unmarked // the GPU answers, and the driver wants nothing
	unasked  // NVML counts no GPUs
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

// watchGPU runs the agent on a node with one GPU, and then watches the driver. After each of the checks in the map it
// calls the function. It returns the verdicts that differ from the one before, and the check that found the last one.
func watchGPU(t *testing.T, n *node, steps map[int]func(), checks int) (seen []string, last int) {
	t.Helper()
	a := agent.New(n.cfg, n.parts)
	if _, err := a.Run(t.Context()); err != nil {
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

// resettable makes a node with a repairable GPU.
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

// TestXidOfResetGPU checks that the fatal error of a GPU that was reset by hand no longer counts, although the driver
// does not report the reset. While NVML lists a GPU as healthy throughout, its error counts. A new process knows what
// was cleared.
func TestXidOfResetGPU(t *testing.T) {
	t.Parallel()
	n, state, run := resettable(t)
	const offTheBus = "NVRM: Xid (PCI:0000:00:04): 79, GPU has fallen off the bus."
	set := func(to int32) func() { return func() { state.Store(to) } }
	// The GPU breaks twice, because an error during the count begins it anew.
	seen, last := watchGPU(t, n, map[int]func(){
		2: func() { n.says("<3>[   21.000000] " + offTheBus) },
		4: set(unasked), 5: set(healthy), // NVML as a whole fails, which says nothing about the GPU
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

// TestXidOutlivesHealthyAnswers checks that failed and then healthy answers of NVML clear no error: NVIDIA's Xid
// catalogue demands a reset, and firmware that was too slow once answers the next call without one. The error counts
// until the driver wants no reset any more, the driver is loaded again, or the node reboots.
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
			4: set(slow), 6: set(unmarked), // for 24 checks
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

// TestXidOfMarkedGPU checks that NVML's recovery action tells of a reset, although the GPU answers all the time.
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
