package gpucheck_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/target"
)

// TestFatalXids uses lines from issues 1151 and 1045 of NVIDIA/open-gpu-kernel-modules, and from the guide of
// stas00/ml-engineering.
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
	})
	want := []string{
		"Xid 79 of GPU 0000:2b:00: GPU has fallen off the bus.",
		"Xid 119 of GPU 0000:01:00: pid=15041, name=zed-editor, Timeout after 45s of waiting for RPC response fro...",
		"Xid 154 of GPU 0000:05:00: GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("FatalXids (-want +got):\n%s", diff)
	}
}

// TestJudgeXidAndFabric checks that Xid errors and an unfinished fabric make a GPU unusable although NVML answers.
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

// TestAnswers compares addresses as the driver's log and NVML write them.
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
