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
	broken *atomic.Bool
	silent *atomic.Bool // NVML counts no GPUs
}

func (p repairable) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	nvml, err := p.probe.Probe(ctx, library, persist)
	if err == nil {
		nvml.Devices[0].PCIBusID = "00000000:00:04.0"
		if p.broken.Load() {
			nvml.Devices[0].Error = "open GPU 0: GPU is lost"
		}
		if p.silent.Load() {
			nvml.Devices, nvml.Error = nil, "count GPUs: Unknown Error"
		}
	}
	return nvml, err
}

// TestXidOfResetGPU checks that the fatal error of a GPU that was reset by hand no longer counts, although the driver
// does not report the reset. While NVML lists a GPU as healthy throughout, its error counts. A new process knows what
// was cleared.
func TestXidOfResetGPU(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	gpu := repairable{probe{n.root, 1}, &atomic.Bool{}, &atomic.Bool{}}
	n.parts.Probe = gpu
	n.kernel.log = []string{"<6>[    1.000000] the kernel boots"}
	n.answer(ref, p.Digest, c.Driver)
	a := agent.New(n.cfg, n.parts)
	if _, err := a.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	says := func(line string) {
		n.kernel.mu.Lock()
		defer n.kernel.mu.Unlock()
		n.kernel.log = append(n.kernel.log, line)
	}
	// The steps are numbers of checks. The GPU breaks twice, because an error during the count begins it anew.
	const fatal, silent, counts, breaks, reset, again, breaksAgain, resetAgain, end = 2, 4, 5, 12, 14, 17, 20, 22, 40
	var seen []string
	back := 0 // the first check after the last reset that found the driver ready
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	looks := 0
	err := a.Monitor(ctx, time.Millisecond, watcher(func(v gpucheck.Verdict) {
		if word := string(v.State) + " " + v.Reason; len(seen) == 0 || seen[len(seen)-1] != word {
			seen = append(seen, word)
		}
		switch looks++; looks {
		case fatal:
			says("<3>[   21.000000] NVRM: Xid (PCI:0000:00:04): 79, GPU has fallen off the bus.")
		case silent, counts: // NVML as a whole fails, which says nothing about the GPU
			gpu.silent.Store(looks == silent)
		case breaks, breaksAgain:
			gpu.broken.Store(true)
		case reset, resetAgain:
			gpu.broken.Store(false)
		case again:
			says("<3>[   31.000000] NVRM: Xid (PCI:0000:00:04): 79, GPU has fallen off the bus.")
		case end:
			cancel()
		}
		if looks > resetAgain && back == 0 && v.State == gpucheck.Ready {
			back = looks
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	marked := "unusable the driver reports Xid 79 of GPU 0000:00:04: GPU has fallen off the bus."
	lost := "unusable 0 of 1 GPUs usable: 0000:00:04.0: open GPU 0: GPU is lost"
	unlisted := "unusable 0 of 1 GPUs usable: 0000:00:04.0 is not listed"
	want := []string{"ready ", marked, unlisted, marked, lost, marked, lost, marked,
		"ready NVML lists the GPU as healthy again in 5 checks, so this no longer counts: Xid 79 of GPU 0000:00:04: GPU " +
			"has fallen off the bus."}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
	if back != resetAgain+6 {
		t.Errorf("ready at check %d; want %d, after 5 healthy answers", back, resetAgain+6)
	}
	if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run of a new process = %s %s, %v; want ready", r.Verdict.State, r.Verdict.Reason, err)
	}
	says("<3>[   41.000000] NVRM: Xid (PCI:0000:00:04): 79, GPU has fallen off the bus.")
	if r, _ := n.run(t, ref, p.Digest, c.Driver); r.Verdict.State != gpucheck.Unusable {
		t.Errorf("Run after another error = %s; want unusable", r.Verdict.State)
	}
}
