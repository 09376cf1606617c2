package loadtest

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/vm"
)

// answer is the JSON that nvmlprobe prints.
type answer struct {
	DriverVersion string `json:"driverVersion"`
	Error         string `json:"error"`
}

// judge computes the verdict from the results of the plan's steps and from the kernel's log.
func judge(p *plan, res *vm.Result) *Verdict {
	log := sinceLoad(res)
	v := &Verdict{Machine: res.Machine, EmulatedGPU: p.gpu, NotAsked: p.notAsked, KernelLog: lastBytes(log, maxKernelLog),
		BootSeconds: res.BootSeconds, Seconds: res.Seconds, Warnings: warnings(log)}
	for _, name := range p.modules {
		v.Modules = append(v.Modules, Module{Name: name})
	}
	for _, name := range slices.Sorted(maps.Keys(p.skipped)) {
		v.Modules = append(v.Modules, Module{Name: name, Load: Skipped, Note: p.skipped[name]})
	}
	for _, s := range res.Steps {
		switch {
		case strings.HasPrefix(s.Name, stepLoad):
			v.LoadSeconds += s.Seconds
		case strings.HasPrefix(s.Name, stepUnload):
			v.UnloadSeconds += s.Seconds
		default:
			v.ProbeSeconds += s.Seconds
		}
	}
	v.State, v.Reason = v.examine(p, res)
	switch {
	case v.State == Rejected:
	case res.Crash != "":
		v.State, v.Reason = Rejected, "the kernel crashed after the last step: "+res.Crash
	case len(v.Warnings) > 0:
		v.State, v.Reason = Rejected, "the kernel logged a warning: "+v.Warnings[0]
	}
	return v
}

// sinceLoad returns the kernel's log since the load of the first module. After a crash it returns the whole log,
// because the steps then have no log of their own.
func sinceLoad(res *vm.Result) string {
	if res.Crash != "" {
		return res.KernelLog
	}
	boot := 0
	for _, s := range res.Steps {
		if strings.HasPrefix(s.Name, stepLoad) {
			if i := strings.Index(res.KernelLog, s.KernelLog); i >= 0 && s.KernelLog != "" {
				boot = i
			}
			break
		}
	}
	return res.KernelLog[boot:]
}

// examine checks the steps in order, up to the first wrong result, and fills in the results of the modules. The reason
// is "" if the state is Loaded.
func (v *Verdict) examine(p *plan, res *vm.Result) (state, reason string) {
	before, ok := res.Step(stepBefore)
	if !ok || !before.Ended || before.ExitCode != 0 {
		return Rejected, cutOff("read the kernel's release", res)
	}
	release, taint, _ := strings.Cut(strings.TrimSpace(string(before.Stdout)), "\n")
	if v.Release = release; release != p.release {
		// A kernel with symbol versions ignores the release in the vermagic. It would load modules for another release.
		return Rejected, fmt.Sprintf("the machine runs kernel release %s; the modules were made for kernel release %s",
			release, p.release)
	}
	for _, name := range p.modules {
		s, ok := res.Step(stepLoad + name)
		m := v.module(name)
		switch {
		case !ok || !s.Ended:
			m.Load = Refused
			return Rejected, cutOff("load "+name, res)
		case s.ExitCode == 0:
			m.Load = OK
			if name == drm && p.idleDRM {
				m.Note = "compiled for a kernel without DRM, so the module is empty"
			}
			continue
		case name == peermem && s.ExitCode == int(unix.EINVAL) && !strings.Contains(s.KernelLog, "nvidia_peermem:"):
			m.Load, m.Note = Skipped, "links into the kernel, but its load returns EINVAL: it was compiled without an RDMA stack"
			continue
		}
		if s.ExitCode == int(unix.ENODEV) && name == "nvidia" {
			if line := noDeviceLine(s.KernelLog); line != "" {
				m.Load, m.Note = OK, "linked into the kernel and ran, but found no device"
				return NoDevice, line
			}
		}
		m.Load = Refused
		return Rejected, refusal("load "+name, s)
	}
	if state, reason := v.examineLive(p, res); state != Loaded {
		return state, reason
	}
	for _, name := range slices.Backward(p.modules) {
		m := v.module(name)
		if m.Load != OK {
			continue
		}
		s, ok := res.Step(stepUnload + name)
		m.Unload = Refused
		if !ok || !s.Ended {
			return Rejected, cutOff("unload "+name, res)
		}
		if s.ExitCode != 0 {
			return Rejected, refusal("unload "+name, s)
		}
		m.Unload = OK
	}
	if res.Crash != "" {
		return Loaded, "" // the function judge reports the crash
	}
	after, ok := res.Step(stepAfter)
	if !ok || !after.Ended || after.ExitCode != 0 {
		return Rejected, cutOff("read the kernel's taint", res)
	}
	flags, err := newTaint(taint, string(after.Stdout))
	if err != nil {
		return Rejected, "read the kernel's taint: " + err.Error()
	}
	if flags != "" {
		return Rejected, strings.Join(append([]string{"the modules tainted the kernel: " + flags},
			v.Warnings[:min(1, len(v.Warnings))]...), ": ")
	}
	return Loaded, ""
}

// taints are the flags in Documentation/admin-guide/tainted-kernels.rst that show damage to the kernel. The flags for
// proprietary, out-of-tree and unsigned modules are expected. The flag for soft lockups is left out, because a busy
// host causes lockups in an emulated machine.
var taints = []struct {
	bit  uint
	what string
}{
	{1, "module forced"}, {3, "module removed by force"}, {4, "machine check"}, {5, "bad page"}, {7, "oops"},
	{9, "warning"},
}

// newTaint compares two contents of /proc/sys/kernel/tainted. It returns the names of the flags in taints that only the
// second one has. If a content is not a number, it returns an error.
func newTaint(before, after string) (string, error) {
	was, err1 := strconv.ParseUint(strings.TrimSpace(before), 10, 64)
	is, err2 := strconv.ParseUint(strings.TrimSpace(after), 10, 64)
	if err1 != nil || err2 != nil {
		return "", fmt.Errorf(
			"want a number; the machine printed %.20q before the load of the modules, and %.20q after the load",
			before, after)
	}
	var flags []string
	for _, t := range taints {
		if is&^was&(1<<t.bit) != 0 {
			flags = append(flags, t.what)
		}
	}
	return strings.Join(flags, ", "), nil
}

// examineLive checks the output of the steps that ran while the modules were loaded.
func (v *Verdict) examineLive(p *plan, res *vm.Result) (state, reason string) {
	for _, name := range []string{stepVersion, stepModules, stepStamp, stepNodes} {
		if name == stepStamp && p.madeFor == "" {
			continue
		}
		s, ok := res.Step(name)
		if !ok || !s.Ended {
			return Rejected, cutOff("read "+name, res)
		}
		if s.ExitCode != 0 {
			return Rejected, refusal("read "+name, s)
		}
		text := string(s.Stdout)
		switch name {
		case stepVersion:
			if !slices.Contains(strings.Fields(text), p.version) {
				return Rejected, fmt.Sprintf("the loaded driver reports %q; want version %s", firstLine(text), p.version)
			}
		case stepStamp:
			if got := string(modinfo.Note(s.Stdout, modinfo.StampOwner, modinfo.StampType)); got != p.madeFor {
				return Rejected, fmt.Sprintf("the loaded module nvidia has ABI fingerprint %q; the file nvidia.ko has %s", got,
					p.madeFor)
			}
		case stepModules:
			if missing := notLive(text, v.Loaded()); len(missing) > 0 {
				return Rejected, "not Live in /proc/modules after loading: " + strings.Join(missing, ", ")
			}
		}
	}
	if p.notAsked != "" {
		return Loaded, ""
	}
	s, ok := res.Step(stepProbe)
	if !ok || !s.Ended {
		return Rejected, cutOff("ask NVML", res)
	}
	var a answer
	if err := json.Unmarshal(s.Stdout, &a); err != nil {
		return Rejected, fmt.Sprintf("ask NVML: nvmlprobe ended with exit status %d and printed no result: %s", s.ExitCode,
			firstLine(s.Error+string(s.Stderr)))
	}
	v.NVMLVersion = a.DriverVersion
	switch {
	case a.Error != "":
		return Rejected, "ask NVML: " + a.Error
	case a.DriverVersion != p.version:
		return Rejected, fmt.Sprintf("ask NVML: NVML reports driver %q; want %s", a.DriverVersion, p.version)
	}
	return Loaded, ""
}

// cutOff describes why a step did not finish: the kernel crashed or the machine stopped.
func cutOff(what string, res *vm.Result) string {
	if res.Crash != "" {
		return what + ": the kernel crashed: " + res.Crash
	}
	return what + ": the machine did not finish this step"
}

// refusal describes a failed step: the given words, the errno or exit status, and the kernel's message if there is one.
func refusal(what string, s vm.StepResult) string {
	text := what + ": "
	if name := unix.ErrnoName(syscall.Errno(s.ExitCode)); name != "" && s.ExitCode < 124 {
		text += fmt.Sprintf("%s (%s)", name, syscall.Errno(s.ExitCode).Error())
	} else {
		text += fmt.Sprintf("exit status %d (%s)", s.ExitCode, s.Error)
	}
	if line := reasonLine(s.KernelLog); line != "" {
		text += ": kernel: " + line
	}
	return text
}

// noDeviceMarks are the messages with which the driver says that it runs but found no GPU.
var noDeviceMarks = []string{
	"NVRM: No NVIDIA GPU found",
	"NVRM: No NVIDIA devices probed",
	"NVRM: None of the NVIDIA devices were initialized",
	"NVRM: None of the NVIDIA graphics adapters were initialized",
}

func noDeviceLine(log string) string { return findLine(log, noDeviceMarks) }

// reasonMarks are parts of the kernel's messages about a refused module, the most informative first.
var reasonMarks = []string{
	"Unknown symbol", "disagrees about version of symbol", "version magic", "no symbol version",
	"Loading of unsigned module is rejected", "loading of module with unavailable key is rejected", "Key was rejected",
	// LoadPin also logs each module that it allows, with other words.
	"LoadPin: kernel-module denied", "LoadPin: kernel-module old-api-denied", "LoadPin: firmware denied", "Lockdown:",
	"exports duplicate symbol", "NVRM:", "nvidia",
}

// reasonLine returns the log's line that best explains a failure: one with a mark of reasonMarks, or else the last
// line.
func reasonLine(log string) string {
	if line := findLine(log, reasonMarks); line != "" {
		return line
	}
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return withoutStamp(lines[len(lines)-1])
}

// complaint matches the first line of each report of an internal problem. __warn in kernel/panic.c prints "WARNING:
// CPU: 0 PID: 1 at FILE:LINE FUNCTION", and since Linux 6.19 "WARNING: FILE:LINE at FUNCTION, CPU#0: COMMAND/PID".
// FILE:LINE may be missing.
var complaint = regexp.MustCompile(`^(WARNING: (CPU: |.*\bat .*, CPU#)|UBSAN: |KASAN: |BUG: )`)

// warnings returns the lines in which the kernel reports an internal problem but continues to run.
func warnings(log string) []string {
	var all []string
	for line := range strings.Lines(log) {
		text := withoutStamp(strings.TrimSpace(line))
		// A workqueue lockup is left out, because a busy host causes it.
		if complaint.MatchString(text) && !strings.HasPrefix(text, "BUG: workqueue lockup") && len(all) < maxWarnings {
			all = append(all, text)
		}
	}
	return all
}

// maxWarnings is the maximum number of lines in [Verdict.Warnings].
const maxWarnings = 20

// findLine tries the marks in order, and returns the first line with the first mark that occurs. If no mark occurs, it
// returns "".
func findLine(log string, marks []string) string {
	for _, mark := range marks {
		for line := range strings.Lines(log) {
			if strings.Contains(line, mark) {
				return withoutStamp(strings.TrimSpace(line))
			}
		}
	}
	return ""
}

// withoutStamp removes the time from the start of a line of the kernel's log, such as "[    5.264406] ".
func withoutStamp(line string) string {
	if stamp, text, ok := strings.Cut(line, "] "); ok && strings.Trim(stamp, "[ .0123456789") == "" {
		return text
	}
	return line
}

// notLive returns the modules that are not listed as Live in the given content of /proc/modules.
func notLive(text string, modules []string) []string {
	live := map[string]bool{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) >= 5 && f[4] == "Live" {
			live[plainName(f[0])] = true
		}
	}
	var missing []string
	for _, m := range modules {
		if !live[m] {
			missing = append(missing, m)
		}
	}
	return missing
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return line
}
