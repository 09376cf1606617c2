package loadtest

import "strings"

// Recipe is the version of this load test, and part of the key of a stored verdict. Raise it if a change may give
// another verdict.
const Recipe = "loadtest-3"

// Verdict is the result of a load test. Its JSON is stored, printed and signed, so the names must not change.
type Verdict struct {
	// State is [Loaded], [NoDevice] or [Rejected].
	State string `json:"state"`
	// Reason says in one line why State is not Loaded.
	Reason string `json:"reason,omitempty"`
	// Release is the release of the booted kernel, as uname -r prints it.
	Release string `json:"release,omitempty"`
	// Machine describes the virtual machine, such as the emulator's version. EmulatedGPU is true if it had an emulated
	// GPU.
	Machine     string `json:"machine,omitempty"`
	EmulatedGPU bool   `json:"emulatedGpu"`
	// Modules has every module of the driver. The modules to load come first, in load order; skipped modules follow by
	// name.
	Modules []Module `json:"modules"`
	// NVMLVersion is the driver version that NVML reported.
	NVMLVersion string `json:"nvmlVersion,omitempty"`
	// NotAsked is the reason why this test does not ask NVML. It is "" if the test asks NVML, even if it ended before
	// that step.
	NotAsked string `json:"notAsked,omitempty"`
	// Warnings are the log's lines about an internal problem of the kernel. If there are any, State is Rejected.
	Warnings []string `json:"warnings,omitempty"`
	// KernelLog has the last maxKernelLog bytes of the kernel's log since the first load. After a crash it has the end of
	// the console's output.
	KernelLog string `json:"kernelLog"`
	// Durations of the phases. Seconds is the total run time of the machine.
	BootSeconds   float64 `json:"bootSeconds"`
	LoadSeconds   float64 `json:"loadSeconds"`
	ProbeSeconds  float64 `json:"probeSeconds"`
	UnloadSeconds float64 `json:"unloadSeconds"`
	Seconds       float64 `json:"seconds"`
}

// Module is the result of one module.
type Module struct {
	Name string `json:"name"`
	// Load and Unload are [OK], [Refused] or [Skipped], or "" if the module did not get to that step.
	Load   string `json:"load,omitempty"`
	Unload string `json:"unload,omitempty"`
	// Note explains a result that is not a plain OK, such as the reason why a module was skipped.
	Note string `json:"note,omitempty"`
}

// These constants are the results of a module.
const (
	OK      = "ok"
	Refused = "refused" // the kernel returned an error, or the step did not end
	Skipped = "skipped" // the test did not load the module, or accepts that the module does not start; see Module.Note
)

// maxKernelLog is the maximum size of the log in a verdict, in bytes. The log of a good run fills a fifth of it.
const maxKernelLog = 32 << 10

// String returns the state and the reason in one line: "loaded", "loaded, no device: ..." or "rejected: ...".
func (v *Verdict) String() string {
	if v.Reason == "" {
		return v.State
	}
	return v.State + ": " + v.Reason
}

// Loaded returns the names of the modules that were loaded, in order.
func (v *Verdict) Loaded() []string {
	var names []string
	for _, m := range v.Modules {
		if m.Load == OK {
			names = append(names, m.Name)
		}
	}
	return names
}

// module returns the entry of a module.
func (v *Verdict) module(name string) *Module {
	for i := range v.Modules {
		if v.Modules[i].Name == name {
			return &v.Modules[i]
		}
	}
	v.Modules = append(v.Modules, Module{Name: name})
	return &v.Modules[len(v.Modules)-1]
}

// lastBytes returns the last whole lines of a text that fit into the limit in bytes.
func lastBytes(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	_, whole, _ := strings.Cut(text[len(text)-limit:], "\n")
	return whole
}
