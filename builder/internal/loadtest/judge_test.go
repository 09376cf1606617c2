package loadtest

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/prebake/prebake/pkg/vm"
)

const version = "535.261.03"

// What real machines said, shortened.
const (
	logLoaded = `[    5.264406] nvidia-nvlink: Nvlink Core is being initialized, major device number 244
[    5.308864] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  535.261.03  Sat Jun 14 16:05:50 UTC 2025
`
	logNoGPU = `[    6.766282] nvidia: module verification failed: signature and/or required key missing - tainting kernel
[    7.751947] nvidia-nvlink: Nvlink Core is being initialized, major device number 244
[    7.752576] NVRM: No NVIDIA GPU found.
[    7.810972] nvidia-nvlink: Unregistered Nvlink Core, major device number 244
`
	logNotAccepted = `[    5.301602] nvidia 0001:00:00.0: PCI INT A: no GSI
[    5.302602] NVRM: None of the NVIDIA devices were initialized.
`
	logMagic = `[    5.742198] nvidia: version magic '6.1.0-53-cloud-amd64 SMP preempt mod_unload modversions ' should be '6.1.0-50-cloud-amd64 SMP preempt mod_unload modversions '
`
	logSymbol = `[    5.742198] nvidia: loading out-of-tree module taints kernel.
[    5.742300] nvidia: Unknown symbol pci_resize_resource (err -2)
`
	logVersions = `[    5.742198] nvidia: disagrees about version of symbol module_layout
`
	procVersion = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Sat Jun 14 16:05:50 UTC 2025\nGCC version:  gcc version 12.2.0\n"
	procModules = `nvidia_modeset 1503232 0 - Live 0xffffffffc4a00000 (PO)
nvidia_uvm 1564672 0 - Live 0xffffffffc4800000 (PO)
nvidia 62734336 2 nvidia_modeset,nvidia_uvm, Live 0xffffffffc0a00000 (PO)
emugpu 16384 0 - Live 0xffffffffc05e2000 (O)
`
	nvmlGood = `{"driverVersion":"535.261.03","cudaVersion":"12.2","devices":[]}` + "\n"
	nvmlBad  = `{"devices":[],"error":"open NVML: Driver/library version mismatch","code":18}` + "\n"
	nvmlNew  = `{"driverVersion":"535.309.01","devices":[]}` + "\n"
)

func testPlan() *plan {
	p := &plan{version: version, modules: []string{"nvidia", "nvidia-uvm", "nvidia-modeset"},
		skipped: map[string]string{"nvidia-peermem": "not loaded by nodes"}}
	p.addSteps()
	return p
}

// goodRun is a machine in which all went well.
func goodRun(p *plan) *vm.Result {
	res := &vm.Result{KernelLog: logLoaded}
	for _, s := range p.steps {
		r := vm.StepResult{Name: s.Name, Ended: true, Seconds: 1}
		switch s.Name {
		case stepLoad + "nvidia":
			r.KernelLog = logLoaded
		case stepVersion:
			r.Stdout = []byte(procVersion)
		case stepModules:
			r.Stdout = []byte(procModules)
		case stepProbe:
			r.Stdout = []byte(nvmlGood)
		}
		res.Steps = append(res.Steps, r)
	}
	return res
}

func TestJudge(t *testing.T) {
	t.Parallel()
	// change returns a run that differs from a good one in one step; what comes
	// after a failed step did not run.
	change := func(step string, f func(*vm.StepResult)) func(*vm.Result) {
		return func(res *vm.Result) {
			i := slices.IndexFunc(res.Steps, func(s vm.StepResult) bool { return s.Name == step })
			f(&res.Steps[i])
			if (res.Steps[i].ExitCode != 0 || !res.Steps[i].Ended) && step != stepProbe {
				res.Steps = res.Steps[:i+1]
			}
		}
	}
	fails := func(exit int, log string) func(*vm.StepResult) {
		return func(s *vm.StepResult) { s.ExitCode, s.KernelLog, s.Error = exit, log, "as the machine says" }
	}
	says := func(text string) func(*vm.StepResult) {
		return func(s *vm.StepResult) { s.Stdout = []byte(text) }
	}
	for _, row := range []struct {
		name   string
		change func(*vm.Result)
		state  string
		loaded int
		reason []string // every one is in the reason; none: there is no reason
	}{
		{"good", func(*vm.Result) {}, Loaded, 3, nil},
		{"no GPU", change("load nvidia", fails(19, logNoGPU)), NoDevice, 0, []string{"NVRM: No NVIDIA GPU found."}},
		{"GPU not accepted", change("load nvidia", fails(19, logNotAccepted)), NoDevice, 0, []string{"None of the NVIDIA devices were initialized"}},
		{"ENODEV for another reason", change("load nvidia", fails(19, "[ 1.0] nvidia: odd\n")), Rejected, 0, []string{"load nvidia: ENODEV", "nvidia: odd"}},
		{"wrong magic", change("load nvidia", fails(8, logMagic)), Rejected, 0, []string{"load nvidia: ENOEXEC", "version magic '6.1.0-53"}},
		{"unknown symbol", change("load nvidia", fails(2, logSymbol)), Rejected, 0, []string{"ENOENT", "kernel: nvidia: Unknown symbol pci_resize_resource (err -2)"}},
		{"other symbol version", change("load nvidia", fails(22, logVersions)), Rejected, 0, []string{"EINVAL", "disagrees about version"}},
		{"second module", change("load nvidia-uvm", fails(2, logSymbol)), Rejected, 1, []string{"load nvidia-uvm: ENOENT"}},
		{"hangs", change("load nvidia", fails(124, "")), Rejected, 0, []string{"load nvidia: exit status 124 (as the machine says)"}},
		{"crash", func(res *vm.Result) {
			change("load nvidia-uvm", func(s *vm.StepResult) { s.Ended = false })(res)
			res.Crash = "BUG: kernel NULL pointer dereference"
		}, Rejected, 1, []string{"load nvidia-uvm: kernel crashed: BUG: kernel NULL"}},
		{"other driver in the kernel", change(stepVersion, says("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.031\n")), Rejected, 3, []string{"want version 535.261.03"}},
		{"not live", change(stepModules, says(strings.ReplaceAll(procModules, "0 - Live 0xffffffffc4800000", "0 - Loading 0x0"))), Rejected, 3, []string{"nvidia-uvm"}},
		{"NVML says no", change(stepProbe, says(nvmlBad)), Rejected, 3, []string{"Driver/library version mismatch"}},
		{"NVML of another driver", change(stepProbe, says(nvmlNew)), Rejected, 3, []string{`"535.309.01"; want 535.261.03`}},
		{"probe crashes", change(stepProbe, func(s *vm.StepResult) { s.ExitCode, s.Stdout, s.Stderr = 139, nil, []byte("trap\n") }), Rejected, 3, []string{"exit status 139 without an answer: trap"}},
		{"does not unload", change("unload nvidia", fails(11, "")), Rejected, 3, []string{"unload nvidia: EAGAIN"}},
		{"crashes at power-off", func(res *vm.Result) { res.Crash = "BUG: late" }, Rejected, 3, []string{"BUG: late"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := testPlan()
			res := goodRun(p)
			row.change(res)
			v := judge(p, res)
			if v.State != row.state || len(v.Loaded) != row.loaded {
				t.Errorf("judge() = %s, loaded %v; want %s, %d of them", v, v.Loaded, row.state, row.loaded)
			}
			if len(row.reason) == 0 && v.Reason != "" {
				t.Errorf("reason = %q; want none", v.Reason)
			}
			for _, want := range row.reason {
				if !strings.Contains(v.Reason, want) {
					t.Errorf("reason = %q; want %q in it", v.Reason, want)
				}
			}
		})
	}
}

func TestJudgeFillsTheVerdict(t *testing.T) {
	t.Parallel()
	p := testPlan()
	res := goodRun(p)
	res.BootSeconds, res.Seconds = 4, 16
	res.KernelLog += "[    9.1] WARNING: CPU: 0 PID: 1 at mm/vmalloc.c:1\n"
	want := &Verdict{
		State: Loaded, Loaded: p.modules, NVMLVersion: version, Skipped: p.skipped,
		Warnings:    []string{"WARNING: CPU: 0 PID: 1 at mm/vmalloc.c:1"},
		BootSeconds: 4, LoadSeconds: 3, ProbeSeconds: 4, UnloadSeconds: 3, Seconds: 16,
	}
	if diff := cmp.Diff(want, judge(p, res), cmpopts.IgnoreFields(Verdict{}, "KernelLog")); diff != "" {
		t.Errorf("judge() (-want +got):\n%s", diff)
	}
}

func TestPlanUnloadsInReverse(t *testing.T) {
	t.Parallel()
	var names []string
	for _, s := range testPlan().steps {
		names = append(names, s.Name)
	}
	want := []string{"load nvidia", "load nvidia-uvm", "load nvidia-modeset", stepVersion, stepModules, stepNodes, stepProbe,
		"unload nvidia-modeset", "unload nvidia-uvm", "unload nvidia"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
}

func TestNormalise(t *testing.T) {
	t.Parallel()
	got := normalise(map[string]string{"nvidia.ko": "a", "nvidia_uvm": "b", "nvidia-modeset": "c"})
	want := map[string]string{"nvidia": "a", "nvidia-uvm": "b", "nvidia-modeset": "c"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("normalise() (-want +got):\n%s", diff)
	}
}

func FuzzTellingLine(f *testing.F) {
	for _, log := range []string{logLoaded, logNoGPU, logMagic, logSymbol, "", "[", "[ 1] "} {
		f.Add(log)
	}
	f.Fuzz(func(t *testing.T, log string) {
		if len(log) > 1<<16 {
			return
		}
		if line := tellingLine(log); strings.ContainsRune(line, '\n') {
			t.Errorf("tellingLine(%q) = %q; want one line", log, line)
		}
		notLive(log, []string{"nvidia"})
		warnings(log)
	})
}

func TestKernelLogIsBounded(t *testing.T) {
	t.Parallel()
	p := testPlan()
	res := goodRun(p)
	res.KernelLog = strings.Repeat("NVRM: said too much\n", maxKernelLog)
	v := judge(p, res)
	if len(v.KernelLog) > maxKernelLog || !strings.HasPrefix(v.KernelLog, "NVRM: ") || !strings.HasSuffix(v.KernelLog, "much\n") {
		t.Errorf("a verdict keeps %d bytes of the log, %.20q…; want whole lines of at most %d", len(v.KernelLog), v.KernelLog, maxKernelLog)
	}
}
