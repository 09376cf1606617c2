package loadtest

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/vm"
)

// answer is what nvmlprobe prints.
type answer struct {
	DriverVersion string `json:"driverVersion"`
	Error         string `json:"error"`
}

// judge turns what a machine did into a verdict.
func judge(p *plan, res *vm.Result) *Verdict {
	v := &Verdict{Skipped: p.skipped, KernelLog: lastBytes(res.KernelLog, maxKernelLog), BootSeconds: res.BootSeconds, Seconds: res.Seconds,
		Warnings: warnings(res.KernelLog)}
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
	return v
}

// examine walks the steps in the order in which they ran and stops at the
// first that was not as it should be.
func (v *Verdict) examine(p *plan, res *vm.Result) (state, reason string) {
	for _, name := range p.modules {
		s, ok := res.Step(stepLoad + name)
		if !ok || !s.Ended {
			return Rejected, cutOff("load "+name, res)
		}
		if s.ExitCode == int(unix.ENODEV) && name == "nvidia" {
			if line := noDeviceLine(s.KernelLog); line != "" {
				return NoDevice, line
			}
		}
		if s.ExitCode != 0 {
			return Rejected, refusal("load "+name, s)
		}
		v.Loaded = append(v.Loaded, name)
	}
	if state, reason := v.examineLive(p, res); state != Loaded {
		return state, reason
	}
	for _, name := range slices.Backward(p.modules) {
		s, ok := res.Step(stepUnload + name)
		if !ok || !s.Ended {
			return Rejected, cutOff("unload "+name, res)
		}
		if s.ExitCode != 0 {
			return Rejected, refusal("unload "+name, s)
		}
	}
	if res.Crash != "" {
		return Rejected, "kernel crashed at the end: " + res.Crash
	}
	return Loaded, ""
}

// examineLive looks at what the loaded modules said.
func (v *Verdict) examineLive(p *plan, res *vm.Result) (state, reason string) {
	for _, name := range []string{stepVersion, stepModules, stepNodes} {
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
				return Rejected, fmt.Sprintf("the loaded driver calls itself %q; want version %s", firstLine(text), p.version)
			}
		case stepModules:
			if missing := notLive(text, p.modules); len(missing) > 0 {
				return Rejected, "not in /proc/modules after loading: " + strings.Join(missing, ", ")
			}
		}
	}
	s, ok := res.Step(stepProbe)
	if !ok || !s.Ended {
		return Rejected, cutOff("ask NVML", res)
	}
	var a answer
	if err := json.Unmarshal(s.Stdout, &a); err != nil {
		return Rejected, fmt.Sprintf("ask NVML: exit status %d without an answer: %s", s.ExitCode, firstLine(s.Error+string(s.Stderr)))
	}
	v.NVMLVersion = a.DriverVersion
	switch {
	case a.Error != "":
		return Rejected, "ask NVML: " + a.Error
	case a.DriverVersion != p.version:
		return Rejected, fmt.Sprintf("ask NVML: it reports driver %q; want %s", a.DriverVersion, p.version)
	}
	return Loaded, ""
}

// cutOff says what stopped the machine before a step was over.
func cutOff(what string, res *vm.Result) string {
	if res.Crash != "" {
		return what + ": kernel crashed: " + res.Crash
	}
	return what + ": the machine did not get to the end of it"
}

// refusal names the errno and the kernel's own line.
func refusal(what string, s vm.StepResult) string {
	text := what + ": "
	if name := unix.ErrnoName(syscall.Errno(s.ExitCode)); name != "" && s.ExitCode < 124 {
		text += fmt.Sprintf("%s (%s)", name, syscall.Errno(s.ExitCode).Error())
	} else {
		text += fmt.Sprintf("exit status %d (%s)", s.ExitCode, s.Error)
	}
	if line := tellingLine(s.KernelLog); line != "" {
		text += ": kernel: " + line
	}
	return text
}

// noDeviceMarks are how the driver says that it runs but has no GPU.
var noDeviceMarks = []string{
	"NVRM: No NVIDIA GPU found",
	"NVRM: No NVIDIA devices probed",
	"NVRM: None of the NVIDIA devices were initialized",
	"NVRM: None of the NVIDIA graphics adapters were initialized",
}

func noDeviceLine(log string) string { return findLine(log, noDeviceMarks) }

// tellingMarks are how the kernel explains that it refuses a module, most
// telling first.
var tellingMarks = []string{
	"Unknown symbol", "disagrees about version of symbol", "version magic", "no symbol version",
	"Loading of unsigned module is rejected", "loading of module with unavailable key is rejected", "Key was rejected",
	"LoadPin:", "Lockdown:", "exports duplicate symbol", "NVRM:", "nvidia",
}

// tellingLine returns the kernel's line that best explains a failure.
func tellingLine(log string) string {
	if line := findLine(log, tellingMarks); line != "" {
		return line
	}
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return withoutStamp(lines[len(lines)-1])
}

// warnings returns the lines by which the kernel complains without giving up.
func warnings(log string) []string {
	var all []string
	for line := range strings.Lines(log) {
		text := withoutStamp(strings.TrimSpace(line))
		if strings.HasPrefix(text, "WARNING: ") || strings.HasPrefix(text, "INFO: task ") || strings.HasPrefix(text, "UBSAN: ") {
			all = append(all, text)
		}
	}
	return all
}

// findLine returns the first line that has the first mark that any line has.
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

func withoutStamp(line string) string {
	if stamp, text, ok := strings.Cut(line, "] "); ok && strings.Trim(stamp, "[ .0123456789") == "" {
		return text
	}
	return line
}

// notLive returns the modules that /proc/modules does not call Live.
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

// lastBytes returns the whole lines at the end of a text that fit.
func lastBytes(text string, most int) string {
	if len(text) <= most {
		return text
	}
	_, whole, _ := strings.Cut(text[len(text)-most:], "\n")
	return whole
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return line
}
