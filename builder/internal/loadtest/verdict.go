package loadtest

import "strings"

// Recipe names the way of testing. It goes into the key of a kept verdict.
const Recipe = "loadtest-3"

// Verdict is what was seen. Its JSON is kept, printed and signed: names stay.
type Verdict struct {
	// State is [Loaded], [NoDevice] or [Rejected].
	State string `json:"state"`
	// Reason says in a line why State is not Loaded.
	Reason string `json:"reason,omitempty"`
	// Release is what the booted kernel calls itself.
	Release string `json:"release,omitempty"`
	// Machine is what it ran in; EmulatedGPU says that it had one.
	Machine     string `json:"machine,omitempty"`
	EmulatedGPU bool   `json:"emulatedGpu"`
	// Modules holds every module of the set: first those that were tried, in the
	// order of loading, then those that were not, by name.
	Modules []Module `json:"modules"`
	// NVMLVersion is the driver version that NVML reported.
	NVMLVersion string `json:"nvmlVersion,omitempty"`
	// NotAsked says why NVML was not asked; "" where it was, or came too late.
	NotAsked string `json:"notAsked,omitempty"`
	// Warnings are kernel log lines that a person should see though all went well.
	Warnings []string `json:"warnings,omitempty"`
	// KernelLog is what the kernel said from the first load on, the last
	// maxKernelLog bytes of it; after a crash, the end of the console.
	KernelLog string `json:"kernelLog"`
	// BootSeconds, LoadSeconds, ProbeSeconds and UnloadSeconds say where the
	// time went; Seconds is the machine's whole life.
	BootSeconds   float64 `json:"bootSeconds"`
	LoadSeconds   float64 `json:"loadSeconds"`
	ProbeSeconds  float64 `json:"probeSeconds"`
	UnloadSeconds float64 `json:"unloadSeconds"`
	Seconds       float64 `json:"seconds"`
}

// Module is what happened to one module.
type Module struct {
	Name string `json:"name"`
	// Load and Unload are [OK], [Refused] or [Skipped]; "" where the test did not
	// get so far.
	Load   string `json:"load,omitempty"`
	Unload string `json:"unload,omitempty"`
	// Note says why, where it is not OK.
	Note string `json:"note,omitempty"`
}

// What may happen to a module.
const (
	OK      = "ok"
	Refused = "refused"
	Skipped = "skipped"
)

// maxKernelLog bounds the log in a verdict, which is kept as a fact, signed and
// sent around. An undisturbed run takes a fifth of it.
const maxKernelLog = 32 << 10

// String returns a line for people: "loaded", "loaded, no device: ..." or
// "rejected: ...".
func (v *Verdict) String() string {
	if v.Reason == "" {
		return v.State
	}
	return v.State + ": " + v.Reason
}

// Loaded names the modules that were loaded, in order.
func (v *Verdict) Loaded() []string {
	var names []string
	for _, m := range v.Modules {
		if m.Load == OK {
			names = append(names, m.Name)
		}
	}
	return names
}

// module returns the entry of a name.
func (v *Verdict) module(name string) *Module {
	for i := range v.Modules {
		if v.Modules[i].Name == name {
			return &v.Modules[i]
		}
	}
	v.Modules = append(v.Modules, Module{Name: name})
	return &v.Modules[len(v.Modules)-1]
}

// lastBytes returns the whole lines at the end of a text that fit.
func lastBytes(text string, most int) string {
	if len(text) <= most {
		return text
	}
	_, whole, _ := strings.Cut(text[len(text)-most:], "\n")
	return whole
}
