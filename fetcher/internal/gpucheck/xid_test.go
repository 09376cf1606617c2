package gpucheck_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/target"
)

// TestFatalXids checks which lines of the kernel log are fatal errors. The lines are from issues 1151 and 1045 of
// NVIDIA/open-gpu-kernel-modules, and from the guide of stas00/ml-engineering.
func TestFatalXids(t *testing.T) {
	t.Parallel()
	got := gpucheck.FatalXids([]string{
		"NVRM: GPU at PCI:0000:2b:00: GPU-0b11d014-1685-04bd-26ed-5fc0bc1c44ae",
		"NVRM: Xid (PCI:0000:2b:00): 79, GPU has fallen off the bus.",
		"NVRM: GPU 0000:2b:00.0: GPU has fallen off the bus.",
		"NVRM: Xid (PCI:0000:2b:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)",
		"NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate.",
		"NVRM: Xid (PCI:0000:01:00): 119, pid=15041, name=zed-editor, Timeout after 45s of waiting for RPC response from " +
			"GPU0 GSP!",
		"NVRM: Xid (PCI:0000:01:00): 45, pid=15041, name=zed-editor, Ch 00000006",
		"NVRM: Xid (PCI:0000:03:00): 31, pid=1, MMU Fault",
		"NVRM: Xid (PCI:0000:05:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
		"NVRM: Xid (PCI:0000:06:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)",
		"NVRM: Xid (PCI:0000:04:00): 7900",
		"NVRM: Xid (PCI:0000:07:00): 48, pid=1, DBE",
		"NVRM: Xid (PCI:0000:07:00): 154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)",
		"somebody writes NVRM: Xid 79",
		"NVRM: Xid (PCI:0000:08:00): 119, pid=1, Timeout",
		"NVRM: Xid (PCI:0000:08:00): 154, GPU recovery action changed from 0x0 (None) to 0x3 (Drain P2P)",
		"NVRM: Xid (PCI:0000:08:00): 154, GPU recovery action changed from 0x3 (Drain P2P) to 0x0 (None)",
		"NVRM: Xid (PCI:0000:09:00): 154, GPU recovery action changed from 0x0 (None) to 0x5 (Recover IMEX Domain)",
		"NVRM: Xid (PCI:0000:0a:00): 154, GPU recovery action changed from 0x0 (None) to 0x6 (Bus Reset)",
		// These lines are of GPUs with MIG instances. Their formats are from kernel_rc.c of NVIDIA's driver.
		"NVRM: Xid (PCI:0000:0b:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No",
		"NVRM: Xid (PCI:0000:0c:00 GPU-I:01 GPU-CI:02): 109, pid=9, name=a, Ch 00000002, errorString CTX SWITCH TIMEOUT",
		"NVRM: Xid (PCI:0000:0c:00 GPU-I:03): 119, pid=9, name=a, Timeout",
	})
	want := []string{
		"Xid 79 of GPU 0000:2b:00: GPU has fallen off the bus.",
		"Xid 119 of GPU 0000:01:00: pid=15041, name=zed-editor, Timeout after 45s of waiting for RPC response fro...",
		"Xid 154 of GPU 0000:05:00: GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
		"Xid 119 of GPU 0000:08:00: pid=1, Timeout",
		"Xid 154 of GPU 0000:0a:00: GPU recovery action changed from 0x0 (None) to 0x6 (Bus Reset)",
		"Xid 109 of GPU 0000:0c:00: pid=9, name=a, Ch 00000002, errorString CTX SWITCH TIMEOUT",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("FatalXids (-want +got):\n%s", diff)
	}
}

// TestCatalogue compares our list of fatal errors with the immediate actions in NVIDIA's Xid catalogue, as of
// 2025-10-29, for GPUs since Ampere (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html). TestFatalXids has
// the rows for Xid 154.
func TestCatalogue(t *testing.T) {
	t.Parallel()
	actions := map[string][]int{
		"RESET_GPU":                           {46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 156, 158},
		"RESET_GPU, also for intended events": {155},
		"RESTART_BM":                          {79}, "RESTART_VM": {151}, "WORKFLOW_XID_48": {48},
		"RESTART_APP": {8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80, 82, 83, 84, 85, 86, 88,
			89, 94, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 139},
		"IGNORE":            {14, 37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 108, 121, 137, 141, 152, 153, 157, 160, 161},
		"CHECK_MECHANICALS": {54}, "UPDATE_SWFW": {78}, "CHECK_UVM": {159}, "CONTACT_SUPPORT": {142},
		"WORKFLOW_XID_45": {45}, "WORKFLOW_NVLINK_ERR": {74}, "WORKFLOW_NVLINK5_ERR": {144, 145, 146, 147, 148, 149, 150},
	}
	demand := []string{"RESET_GPU", "RESTART_BM", "RESTART_VM", "WORKFLOW_XID_48"}
	for action, xids := range actions {
		for _, xid := range xids {
			fatal := gpucheck.FatalXids([]string{fmt.Sprintf("NVRM: Xid (PCI:0000:2b:00): %d, pid=1, text", xid)})
			if got, want := len(fatal) == 1, slices.Contains(demand, action); got != want {
				t.Errorf("Xid %d, for which NVIDIA says %s, is fatal: %t; want %t", xid, action, got, want)
			}
		}
	}
}

// TestNeedsReset checks for which answers of NVML only a reset makes the GPU usable again.
func TestNeedsReset(t *testing.T) {
	t.Parallel()
	const lost, timeout, resetRequired = 15, 10, 16
	for _, row := range []struct {
		name    string
		devices []gpucheck.Device
		want    bool
	}{
		{"healthy", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0"}}, false},
		{"lost", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Error: "x", Code: lost}}, true},
		{"too slow", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Error: "x", Code: timeout}}, false},
		{"the driver forgets this", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Error: "x", Code: resetRequired}},
			false},
		{"the driver wants nothing", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Recovery: new(int64(0))}}, false},
		{"the driver wants a reset", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Recovery: new(int64(1))}}, true},
		{"the driver wants a reboot", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Recovery: new(int64(2))}}, true},
		{"the driver wants less", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Recovery: new(int64(3))}}, false},
		{"an action of a newer driver", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Recovery: new(int64(9))}}, true},
		{"another GPU is lost", []gpucheck.Device{{PCIBusID: "00000000:2B:00.0"}, {Error: "x", Code: lost}}, false},
		{"not opened, because it is lost", []gpucheck.Device{{PCIBusID: "00000000:2C:00.0"}, {Error: "x", Code: lost}},
			true},
		{"one of two was not opened for another reason", []gpucheck.Device{{Error: "x", Code: lost},
			{Error: "x", Code: timeout}}, false},
		{"not listed", []gpucheck.Device{{PCIBusID: "00000000:2C:00.0"}}, false},
	} {
		if got := (gpucheck.NVML{Devices: row.devices}).NeedsReset("0000:2b:00"); got != row.want {
			t.Errorf("%s: NeedsReset = %t; want %t", row.name, got, row.want)
		}
	}
}

// TestJudgeXidAndFabric checks two cases in which NVML answers but a node is not ready. A fatal Xid makes a GPU
// unusable. While the NVLink fabric is being set up, the state is Starting.
func TestJudgeXidAndFabric(t *testing.T) {
	t.Parallel()
	good := func() gpucheck.Facts {
		return gpucheck.Facts{
			Driver: target.Driver{Version: "580.159.04", Flavour: target.Open}, GPUs: []string{"0000:2b:00.0"},
			Modules: map[string]string{"nvidia": "580.159.04", "nvidia_uvm": "580.159.04"},
			NVML: gpucheck.NVML{Version: "580.159.04",
				Devices: []gpucheck.Device{{PCIBusID: "00000000:2B:00.0", Fabric: "completed"}}},
		}
	}
	if v := gpucheck.Judge(good()); v.State != gpucheck.Ready {
		t.Errorf("Judge = %+v; want ready", v)
	}
	f := good()
	f.Since = []string{"NVRM: Xid (PCI:0000:2b:00): 79, GPU has fallen off the bus."}
	if v := gpucheck.Judge(f); v.State != gpucheck.Unusable || !strings.Contains(v.Reason, "Xid 79") || v.UsableGPUs != 0 {
		t.Errorf("Judge with a fatal Xid = %+v; want unusable", v)
	}
	for _, state := range []string{"not started", "in progress"} {
		f := good()
		f.NVML.Devices[0].Fabric = state
		if v := gpucheck.Judge(f); v.State != gpucheck.Starting || !strings.Contains(v.Reason, "fabricmanager") ||
			v.UsableGPUs != 1 || v.Err() == nil {
			t.Errorf("Judge with a fabric %s = %+v; want starting", state, v)
		}
	}
}

// TestJudgeRecovery checks that NVML's recovery action can make a GPU unusable although the kernel log has no error.
// Older drivers report no recovery action.
func TestJudgeRecovery(t *testing.T) {
	t.Parallel()
	const xid = "NVRM: Xid (PCI:0000:2b:00): 119, pid=1, Timeout"
	for _, row := range []struct {
		name     string
		recovery *int64
		since    []string
		err      string // NVML's error of the GPU
		want     gpucheck.State
		reason   string
		usable   int
		only     bool
	}{
		{"an older driver", nil, nil, "", gpucheck.Ready, "", 2, false},
		{"none", new(int64(0)), nil, "", gpucheck.Ready, "", 2, false},
		{"drain P2P", new(int64(3)), nil, "", gpucheck.Ready, "", 2, false},
		{"recover the IMEX domain", new(int64(5)), nil, "", gpucheck.Ready, "", 2, false},
		{"reset", new(int64(1)), nil, "", gpucheck.Unusable, "NVML reports that GPU 00000000:2B:00.0 needs a reset", 1,
			true},
		{"reboot", new(int64(2)), nil, "", gpucheck.Unusable,
			"NVML reports that GPU 00000000:2B:00.0 needs a reboot of the node", 1, true},
		{"drain and reset", new(int64(4)), nil, "", gpucheck.Unusable,
			"NVML reports that GPU 00000000:2B:00.0 needs a reset when its programs have ended", 1, true},
		{"of a newer driver", new(int64(9)), nil, "", gpucheck.Unusable,
			"NVML reports that GPU 00000000:2B:00.0 needs recovery action 9", 1, true},
		{"reset after an error", new(int64(1)), []string{xid}, "", gpucheck.Unusable,
			"the driver reports Xid 119 of GPU 0000:2b:00: pid=1, Timeout; " +
				"NVML reports that GPU 00000000:2B:00.0 needs a reset", 1, false},
		{"an error alone", nil, []string{xid}, "", gpucheck.Unusable,
			"the driver reports Xid 119 of GPU 0000:2b:00: pid=1, Timeout", 1, false},
		{"reboot of a lost GPU", new(int64(2)), nil, "GPU is lost", gpucheck.Unusable,
			"1 of 2 GPUs usable: 0000:2b:00.0: GPU is lost, and it needs a reboot of the node", 1, false},
	} {
		f := gpucheck.Facts{
			Driver: target.Driver{Version: "580.159.04", Flavour: target.Open}, GPUs: []string{"0000:2b:00.0", "0000:2c:00.0"},
			Modules: map[string]string{"nvidia": "580.159.04", "nvidia_uvm": "580.159.04"}, Since: row.since,
			NVML: gpucheck.NVML{Version: "580.159.04", Devices: []gpucheck.Device{
				{PCIBusID: "00000000:2B:00.0", Recovery: row.recovery, Error: row.err},
				{PCIBusID: "00000000:2C:00.0", Recovery: new(int64(0))}}},
		}
		v := gpucheck.Judge(f)
		if v.State != row.want || v.Reason != row.reason || v.UsableGPUs != row.usable || v.OnlyReset != row.only {
			t.Errorf("%s: Judge = %s %q, %d usable, only a reset %t; want %s %q, %d, %t", row.name, v.State, v.Reason,
				v.UsableGPUs, v.OnlyReset, row.want, row.reason, row.usable, row.only)
		}
		var p *gpucheck.Problem
		if err := v.Err(); (err == nil) != (row.want == gpucheck.Ready) || err != nil &&
			(!errors.As(err, &p) || !p.IsOf(v) || p.IsOf(gpucheck.Judge(gpucheck.Facts{}))) {
			t.Errorf("%s: Err = %v; want the problem of this verdict", row.name, err)
		}
		if v := gpucheck.JudgeForeign(f); (v.State == gpucheck.Foreign) != (row.want == gpucheck.Ready) {
			t.Errorf("%s: JudgeForeign = %s %s", row.name, v.State, v.Reason)
		}
	}
}

// TestJudgeCountsBoth checks that a GPU that must not be used, and another one that NVML does not list, are both not
// usable. Otherwise a driver that loses the second one would look as good as the former driver.
func TestJudgeCountsBoth(t *testing.T) {
	t.Parallel()
	f := gpucheck.Facts{
		Driver:  target.Driver{Version: "580.159.04", Flavour: target.Open},
		GPUs:    []string{"0000:2b:00.0", "0000:2c:00.0", "0000:2d:00.0", "0000:2e:00.0"},
		Modules: map[string]string{"nvidia": "580.159.04", "nvidia_uvm": "580.159.04"},
		Since: []string{"NVRM: Xid (PCI:0000:2c:00): 79, GPU has fallen off the bus.",
			"NVRM: Xid (PCI:0000:2d:00): 119, pid=1, Timeout"},
		NVML: gpucheck.NVML{Version: "580.159.04", Devices: []gpucheck.Device{
			{PCIBusID: "00000000:2B:00.0", Recovery: new(int64(1))}, {PCIBusID: "00000000:2D:00.0"},
			{PCIBusID: "00000000:2E:00.0"}}},
	}
	const reason = "1 of 4 GPUs usable: 0000:2c:00.0 is not listed, the driver reports Xid 119 of GPU 0000:2d:00: " +
		"pid=1, Timeout, NVML reports that GPU 00000000:2B:00.0 needs a reset"
	if v := gpucheck.Judge(f); v.UsableGPUs != 1 || v.Reason != reason || v.OnlyReset {
		t.Errorf("Judge = %d usable, %q, only a reset %t; want 1, %q", v.UsableGPUs, v.Reason, v.OnlyReset, reason)
	}
}

// TestJudgeGoneFromBus checks that an error of a GPU that is no longer on the PCI bus does not lower the number of
// usable GPUs.
func TestJudgeGoneFromBus(t *testing.T) {
	t.Parallel()
	f := gpucheck.Facts{
		Driver:  target.Driver{Version: "580.159.04", Flavour: target.Open},
		GPUs:    []string{"0000:2b:00.0", "0000:2d:00.0"},
		Modules: map[string]string{"nvidia": "580.159.04", "nvidia_uvm": "580.159.04"},
		Since:   []string{"NVRM: Xid (PCI:0000:2c:00): 79, GPU has fallen off the bus."},
		NVML: gpucheck.NVML{Version: "580.159.04",
			Devices: []gpucheck.Device{{PCIBusID: "00000000:2B:00.0"}, {PCIBusID: "00000000:2D:00.0"}}},
	}
	if v := gpucheck.Judge(f); v.UsableGPUs != 2 {
		t.Errorf("Judge = %d usable, %q; want 2", v.UsableGPUs, v.Reason)
	}
}

// TestAnswers checks that a GPU is found by its PCI address, which the kernel log and NVML write in different forms.
func TestAnswers(t *testing.T) {
	t.Parallel()
	nvml := gpucheck.NVML{Devices: []gpucheck.Device{
		{PCIBusID: "00000000:2B:00.0"}, {PCIBusID: "00000001:2C:00.0"}, {},
		{PCIBusID: "00000000:2D:00.0", Error: "GPU is lost"},
	}}
	for line, want := range map[string]bool{
		"NVRM: Xid (PCI:0000:2b:00): 79, x": true, "NVRM: Xid (0000:2B:00.0): 79, x": true,
		"NVRM: Xid (PCI:0001:2c:00): 79, x": true, "NVRM: Xid (PCI:0000:2c:00): 79, x": false,
		"NVRM: Xid (PCI:0000:2d:00): 79, x": false, "NVRM: Xid (PCI:0000:2e:00): 79, x": false, "no error": false,
	} {
		if got := nvml.Answers(gpucheck.XidGPU(line)); got != want {
			t.Errorf("Answers of the GPU in %q = %t; want %t", line, got, want)
		}
	}
}
