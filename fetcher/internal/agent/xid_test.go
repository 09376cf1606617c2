package agent_test

import (
	"fmt"
	"strings"
	"testing"

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
