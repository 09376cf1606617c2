package loadtest

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/vm"
)

const version, release, stamp = "535.261.03", "6.1.0-50-cloud-amd64", "sha256:11"

// These are shortened kernel logs of real machines.
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
	procVersion = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Sat Jun 14 16:05:50 UTC 2025\nGCC " +
		"version:  gcc version 12.2.0\n"
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
	p := &plan{version: version, release: release, madeFor: stamp,
		modules: []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-peermem"},
		skipped: map[string]string{"nvidia-drm": "needs drm"}}
	p.addSteps()
	return p
}

// goodRun returns a result in which every step of the plan succeeded, except the load and unload of nvidia-peermem.
func goodRun(p *plan) *vm.Result {
	res := &vm.Result{KernelLog: logLoaded}
	for _, s := range p.steps {
		r := vm.StepResult{Name: s.Name, Ended: true, Seconds: 1}
		switch s.Name {
		case stepBefore:
			r.Stdout = []byte(release + "\n4096\n")
		case stepAfter:
			r.Stdout = []byte("12289\n") // the kernel's taint flags P, O and E, which every NVIDIA module sets
		case stepLoad + "nvidia":
			r.KernelLog = logLoaded
		case stepLoad + peermem:
			r.ExitCode, r.Error = 22, "insmod nvidia-peermem.ko: invalid argument"
		case stepUnload + peermem:
			r.ExitCode, r.Error = 2, "rmmod nvidia-peermem: no such file"
		case stepVersion:
			r.Stdout = []byte(procVersion)
		case stepModules:
			r.Stdout = []byte(procModules)
		case stepStamp:
			r.Stdout = modinfo.AppendNote(nil, modinfo.StampOwner, modinfo.StampType, []byte(stamp))
		case stepProbe:
			r.Stdout = []byte(nvmlGood)
		}
		res.Steps = append(res.Steps, r)
	}
	return res
}

func TestJudge(t *testing.T) {
	t.Parallel()
	// change returns a function that changes the result of one step of a good run. If the changed step fails, the function
	// also removes the results of later steps, because the machine would not run these.
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
		reason []string // each text must be in the reason; an empty list means no reason
	}{
		{"good", func(*vm.Result) {}, Loaded, 3, nil},
		{"no GPU", change("load nvidia", fails(19, logNoGPU)), NoDevice, 1, []string{"NVRM: No NVIDIA GPU found."}},
		{"GPU not accepted", change("load nvidia", fails(19, logNotAccepted)), NoDevice, 1,
			[]string{"None of the NVIDIA devices were initialized"}},
		{"ENODEV for another reason", change("load nvidia", fails(19, "[ 1.0] nvidia: odd\n")), Rejected, 0,
			[]string{"load nvidia: ENODEV", "nvidia: odd"}},
		{"wrong magic", change("load nvidia", fails(8, logMagic)), Rejected, 0,
			[]string{"load nvidia: ENOEXEC", "version magic '6.1.0-53"}},
		{"unknown symbol", change("load nvidia", fails(2, logSymbol)), Rejected, 0,
			[]string{"ENOENT", "kernel: nvidia: Unknown symbol pci_resize_resource (err -2)"}},
		{"other symbol version", change("load nvidia", fails(22, logVersions)), Rejected, 0,
			[]string{"EINVAL", "disagrees about version"}},
		{"second module", change("load nvidia-uvm", fails(2, logSymbol)), Rejected, 1, []string{"load nvidia-uvm: ENOENT"}},
		{"hangs", change("load nvidia", fails(124, "")), Rejected, 0,
			[]string{"load nvidia: exit status 124 (as the machine says)"}},
		{"crash", func(res *vm.Result) {
			change("load nvidia-uvm", func(s *vm.StepResult) { s.Ended = false })(res)
			res.Crash = "BUG: kernel NULL pointer dereference"
		}, Rejected, 1, []string{"load nvidia-uvm: the kernel crashed: BUG: kernel NULL"}},
		{"other driver in the kernel",
			change(stepVersion, says("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.031\n")), Rejected, 3,
			[]string{"want version 535.261.03"}},
		{"stamped otherwise", change(stepStamp,
			says(string(modinfo.AppendNote(nil, modinfo.StampOwner, modinfo.StampType, []byte("sha256:22"))))), Rejected, 3,
			[]string{`has ABI fingerprint "sha256:22"; the file nvidia.ko has sha256:11`}},
		{"not live", change(stepModules,
			says(strings.ReplaceAll(procModules, "0 - Live 0xffffffffc4800000", "0 - Loading 0x0"))), Rejected, 3,
			[]string{"nvidia-uvm"}},
		{"NVML says no", change(stepProbe, says(nvmlBad)), Rejected, 3, []string{"Driver/library version mismatch"}},
		{"NVML of another driver", change(stepProbe, says(nvmlNew)), Rejected, 3, []string{`"535.309.01"; want 535.261.03`}},
		{"probe crashes", change(stepProbe,
			func(s *vm.StepResult) { s.ExitCode, s.Stdout, s.Stderr = 139, nil, []byte("trap\n") }), Rejected, 3,
			[]string{"exit status 139 and printed no result: trap"}},
		{"does not unload", change("unload nvidia", fails(11, "")), Rejected, 3, []string{"unload nvidia: EAGAIN"}},
		{"peer memory does not link",
			change("load nvidia-peermem",
				fails(2, "[ 1.0] nvidia_peermem: Unknown symbol ib_register_peer_memory_client (err -2)\n")), Rejected, 3,
			[]string{"load nvidia-peermem: ENOENT", "Unknown symbol"}},
		{"NVML was not asked", func(res *vm.Result) {
			res.Steps = slices.DeleteFunc(res.Steps, func(s vm.StepResult) bool { return s.Name == stepProbe })
		}, Rejected, 3, []string{"ask NVML: the machine did not finish"}},
		{"another kernel", change(stepBefore, says("6.1.0-47-cloud-amd64\n0\n")), Rejected, 0,
			[]string{"runs kernel release 6.1.0-47-cloud-amd64; the modules were made for kernel release 6.1.0-50-cloud-amd64"}},
		{"taints the kernel", change(stepAfter, says("12801\n")), Rejected, 3,
			[]string{"the modules tainted the kernel: warning"}},
		{"taint of the boot stays out", func(res *vm.Result) {
			change(stepBefore, says(release+"\n512\n"))(res)
			change(stepAfter, says("12801\n"))(res)
		}, Loaded, 3, nil},
		{"taint cannot be read", change(stepAfter, says("much\n")), Rejected, 3,
			[]string{"read the kernel's taint: want a number"}},
		{"kernel warns", func(res *vm.Result) { res.KernelLog += "[    9.1] WARNING: CPU: 0 PID: 1 at mm/vmalloc.c:1\n" },
			Rejected, 3, []string{"the kernel logged a warning: WARNING: CPU: 0 PID: 1 at mm/vmalloc.c:1"}},
		{"kernel of 6.19 or later warns", func(res *vm.Result) {
			res.KernelLog += "[    9.1] WARNING: kernel/sched/core.c:8511 at sched_init+0x20/0x410, CPU#0: swapper/0\n"
		}, Rejected, 3, []string{"the kernel logged a warning: WARNING: kernel/sched/core.c:8511 at sched_init"}},
		{"a driver's own warning", func(res *vm.Result) {
			res.KernelLog += "[    9.1] WARNING: the GPU is old\n"
		}, Loaded, 3, nil},
		{"kernel warns while it boots",
			func(res *vm.Result) { res.KernelLog = "[    0.1] WARNING: CPU: 0 PID: 1 at boot.c:1\n" + res.KernelLog }, Loaded, 3,
			nil},
		{"no GPU, and a warning", func(res *vm.Result) {
			change("load nvidia", fails(19, logNoGPU))(res)
			res.KernelLog = "[    7.1] WARNING: CPU: 0 PID: 1 at x.c:1\n"
		}, Rejected, 1, []string{"the kernel logged a warning"}},
		{"crashes at power-off", func(res *vm.Result) { res.Crash = "BUG: late" }, Rejected, 3, []string{"BUG: late"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := testPlan()
			res := goodRun(p)
			row.change(res)
			v := judge(p, res)
			if v.State != row.state || len(v.Loaded()) != row.loaded {
				t.Errorf("judge() = %s, loaded %v; want %s, %d loaded modules", v, v.Loaded(), row.state, row.loaded)
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
	res.KernelLog = "[    0.1] Linux version 6.1\n" + res.KernelLog
	res.Machine = "QEMU emulator version 7.2"
	want := &Verdict{
		State: Loaded, Release: release, Machine: res.Machine, NVMLVersion: version, KernelLog: logLoaded,
		Modules: []Module{
			{Name: "nvidia", Load: OK, Unload: OK}, {Name: "nvidia-uvm", Load: OK, Unload: OK},
			{Name: "nvidia-modeset", Load: OK, Unload: OK},
			{Name: "nvidia-peermem", Load: Skipped,
				Note: "links into the kernel, but its load returns EINVAL: it was compiled without an RDMA stack"},
			{Name: "nvidia-drm", Load: Skipped, Note: "needs drm"},
		},
		BootSeconds: 4, LoadSeconds: 4, ProbeSeconds: 7, UnloadSeconds: 4, Seconds: 16,
	}
	if diff := cmp.Diff(want, judge(p, res)); diff != "" {
		t.Errorf("judge() (-want +got):\n%s", diff)
	}
}

// TestVerdictJSON checks that the JSON names stay as they are, because verdicts are stored and signed.
func TestVerdictJSON(t *testing.T) {
	t.Parallel()
	v := Verdict{State: Rejected, Reason: "r", Release: "6.1", Machine: "m", EmulatedGPU: true, NVMLVersion: "1",
		NotAsked: "n", Warnings: []string{"w"}, KernelLog: "k",
		Modules: []Module{{Name: "nvidia", Load: Refused, Unload: Skipped, Note: "x"}}}
	const want = `{"state":"rejected","reason":"r","release":"6.1","machine":"m","emulatedGpu":true,` +
		`"modules":[{"name":"nvidia","load":"refused","unload":"skipped","note":"x"}],"nvmlVersion":"1","notAsked":"n","warnings":["w"],"kernelLog":"k",` +
		`"bootSeconds":0,"loadSeconds":0,"probeSeconds":0,"unloadSeconds":0,"seconds":0}`
	got, err := json.Marshal(v)
	if err != nil || string(got) != want {
		t.Errorf("Marshal(verdict) = %s, %v; want %s", got, err, want)
	}
}

func TestIdleDRM(t *testing.T) {
	t.Parallel()
	for idle, want := range map[bool]string{true: "compiled for a kernel without DRM, so the module is empty", false: ""} {
		p := &plan{version: version, release: release, modules: []string{"nvidia", "nvidia-modeset", drm}, idleDRM: idle}
		p.addSteps()
		res := goodRun(p)
		step, _ := res.Step(stepModules)
		for i := range res.Steps {
			if res.Steps[i].Name == stepModules {
				res.Steps[i].Stdout = append([]byte("nvidia_drm 16384 0 - Live 0x0 (PO)\n"), step.Stdout...)
			}
		}
		v := judge(p, res)
		if m := v.module(drm); v.State != Loaded || m.Load != OK || m.Unload != OK || m.Note != want {
			t.Errorf("idle %t: judge() = %s, %+v; want it loaded, note %q", idle, v, m, want)
		}
	}
}

// TestNotAsked has a builder without the program that asks NVML. The verdict must say why nobody asked NVML.
func TestNotAsked(t *testing.T) {
	t.Parallel()
	p := &plan{version: version, release: release, modules: []string{"nvidia"},
		notAsked: "this builder has no nvmlprobe-arm64"}
	p.addSteps()
	res := goodRun(p)
	if _, ok := res.Step(stepProbe); ok {
		t.Error("the plan has a step that asks NVML, without a probe program")
	}
	if v := judge(p, res); v.State != Loaded || v.NotAsked != p.notAsked || v.NVMLVersion != "" {
		t.Errorf("judge() = %+v; want loaded, and why NVML was not asked", v)
	}
}

func TestPlanUnloadsInReverse(t *testing.T) {
	t.Parallel()
	var names []string
	for _, s := range testPlan().steps {
		names = append(names, s.Name)
	}
	want := []string{stepBefore, "load nvidia", "load nvidia-uvm", "load nvidia-modeset", "load nvidia-peermem",
		stepVersion, stepModules, stepStamp, stepNodes, stepProbe,
		"unload nvidia-peermem", "unload nvidia-modeset", "unload nvidia-uvm", "unload nvidia", stepAfter}
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
		if line := reasonLine(log); strings.ContainsRune(line, '\n') {
			t.Errorf("reasonLine(%q) = %q; want one line", log, line)
		}
		notLive(log, []string{"nvidia"})
		warnings(log)
	})
}

func TestKernelLogIsBounded(t *testing.T) {
	t.Parallel()
	p := testPlan()
	res := goodRun(p)
	res.KernelLog = logLoaded + strings.Repeat("NVRM: said too much\n", maxKernelLog)
	v := judge(p, res)
	if len(v.KernelLog) > maxKernelLog || !strings.HasPrefix(v.KernelLog, "NVRM: ") ||
		!strings.HasSuffix(v.KernelLog, "much\n") {
		t.Errorf("a verdict keeps %d bytes of the log, %.20q…; want whole lines of at most %d", len(v.KernelLog), v.KernelLog,
			maxKernelLog)
	}
}
