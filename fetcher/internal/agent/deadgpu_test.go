package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestDeadGPUCondemnsNoDriver lets both drivers find no device for some time, because the GPU is broken. When the GPU
// works again, neither may be refused.
func TestDeadGPUCondemnsNoDriver(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		active bool // whether the new driver is active before, and the node reboots, or else it is offered
		runs   int
	}{{false, 1}, {false, 3}, {true, 1}, {true, 2}, {true, 3}} {
		t.Run(fmt.Sprintf("new driver active %t, %d runs", row.active, row.runs), func(t *testing.T) {
			t.Parallel()
			n, ref, _, newer, _, pn := publishTwo(t, 1)
			if row.active {
				if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
					t.Fatal(err)
				}
			}
			for _, version := range []string{oldVersion, newVersion} {
				n.kernel.refuse["nvidia "+version] = syscall.ENODEV
			}
			n.answer(ref, pn.Digest, newer.Driver)
			if row.active {
				n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
			}
			for range row.runs {
				if row.active {
					n.reboot(t)
				}
				if _, err := n.runAs(t); err == nil {
					t.Error("Run = nil; want an error")
				}
			}
			clear(n.kernel.refuse)
			n.reboot(t)
			if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.Digest != pn.Digest ||
				r.Verdict.State != gpucheck.Ready {
				t.Errorf("with a GPU that works: Run = %s %s, %v; want the new driver ready", r.Verdict.State,
					r.Verdict.Driver, err)
			}
		})
	}
}

// TestDeadGPUAfterReboot breaks the GPU of a node with a reboot, for which a new driver waits. The former driver used
// the GPU before, and cannot use it now. So this is no failure of the new driver, and the farm must not hear of one.
func TestDeadGPUAfterReboot(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	sample.Write(t, n.root, "etc/machine-id", strings.Repeat("0a", 16)+"\n")
	n.inUse(t, "1")
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Busy) {
		t.Fatalf("Run = %v; want busy", err)
	}
	n.reboot(t)
	n.parts.Probe = probe{n.root, 0}
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	n.parts.Tried = func(r api.NodeReport) { t.Errorf("the farm is told %+v; want nothing", r) }
	r, _ := n.runAs(t)
	if r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Unusable {
		t.Errorf("Run = %s %s; want the former driver, unusable", r.Verdict.State, r.Verdict.Driver)
	}
	raw, err := os.ReadFile(filepath.Join(n.root, attemptsFile))
	if err != nil || strings.Contains(string(raw), `"failures"`) {
		t.Errorf("the records are %s, %v; want no failure", strings.TrimSpace(string(raw)), err)
	}
}

// TestSuspectIsCounted checks that a failure at boot counts if the previous driver then works.
func TestSuspectIsCounted(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	n.reboot(t)
	for i, want := range []fault.Kind{fault.Unusable, fault.Rejected} {
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if !fault.Is(err, want) || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready ||
			i == 1 && len(n.kernel.calls) > 0 {
			t.Errorf("run %d = %s %s, %v, calls %v; want the previous driver, and %v", i, r.Verdict.State, r.Verdict.Driver,
				err, n.kernel.calls, want)
		}
	}
}
