// Package gpucheck asks NVML, the driver's management library, whether the driver works, and calls cuInit of CUDA's
// library. It judges the answers. A separate program calls these libraries, because they need a C library.
// The package calls no node ready without evidence.
package gpucheck

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// State is the short form of a verdict.
type State string

// These are the states of the driver on a node.
const (
	Ready    State = "ready"     // every GPU on the bus answers, and the check with cuInit did not fail
	NoDevice State = "no-device" // no GPU is on the bus
	Unusable State = "unusable"  // a GPU is on the bus, and the driver cannot use it
	Drifted  State = "drifted"   // the loaded driver is not the installed one
	Loaded   State = "loaded"    // the modules are right; nobody has asked NVML since the boot
	Staged   State = "staged"    // installed, and by request not loaded
	Absent   State = "absent"    // nothing is installed
	Starting State = "starting"  // every GPU answers; CUDA waits for a fabric manager or a confidential node's ready state
	Foreign  State = "foreign"   // nothing is installed; a foreign driver is loaded and works
)

// Verdict is the known state of the driver on this node.
type Verdict struct {
	State State `json:"verdict"`
	// Reason says in one line why the state is not ready. If the state is ready, Reason is a note for the node's owner, or
	// "".
	Reason string        `json:"reason,omitempty"`
	Driver target.Driver `json:"driver"`
	// Digest is the digest of the installed artifact.
	Digest string `json:"digest,omitempty"`
	// Modules are the loaded NVIDIA modules, with their versions.
	Modules map[string]string `json:"modules"`
	// Foreign lists modules of the right version that were not loaded from the installed file.
	Foreign []string `json:"foreignModules,omitempty"`
	NVML    NVML     `json:"nvml"`
	// CUDA is the result of cuInit, or nil if there is none.
	CUDA *CUDA `json:"cuda,omitempty"`
	// PCIGPUs counts the GPUs on the bus. UsableGPUs counts the GPUs that answered NVML. It is 0 if
	// the driver is unusable for CUDA.
	PCIGPUs    int `json:"pciGPUs"`
	UsableGPUs int `json:"usableGPUs"`
	// NVRM has the driver's own lines in the kernel log.
	NVRM []string `json:"nvrm,omitempty"`
	// OnlyReset means that the verdict says nothing about the driver: NVML wants a GPU reset or the node rebooted, and the
	// driver has logged no fatal error since its load.
	OnlyReset bool `json:"-"`
	// OnlyCUDA means that every GPU answers NVML, and only CUDA fails.
	OnlyCUDA bool `json:"-"`
}

// NVML is what the probe learned from NVML about the driver and the GPUs.
type NVML struct {
	Version string   `json:"version,omitempty"`
	CUDA    string   `json:"cuda,omitempty"`
	Devices []Device `json:"devices"`
	Error   string   `json:"error,omitempty"`
}

// Device is a GPU as NVML describes it.
type Device struct {
	UUID        string `json:"uuid"`
	Name        string `json:"name"`
	PCIBusID    string `json:"pciBusId"`
	MemoryBytes uint64 `json:"memoryBytes"`
	// Fabric is the GPU's progress in joining its NVLink fabric: not started, in progress or completed. It is "" without a
	// fabric.
	Fabric string `json:"fabric,omitempty"`
	// Persistence is on, off, or the reason why it could not be turned on. It is "" if the GPU does not report it.
	Persistence string `json:"persistence,omitempty"`
	// MIG means that the GPU is in MIG mode: programs can only use the MIG instances that somebody makes.
	MIG bool `json:"mig,omitempty"`
	// Error is the reason why NVML cannot use the GPU. A healthy GPU has "". Code is NVML's return value for Error
	// (nvmlReturn_t), or 0.
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"`
	// Recovery is what the driver wants done with the GPU (nvmlDeviceGpuRecoveryAction_t). nil means that the driver does
	// not report it.
	Recovery *int64 `json:"recovery,omitempty"`
}

// Facts are what Judge needs for a verdict.
type Facts struct {
	Driver  target.Driver
	Digest  string
	Modules map[string]string
	Foreign []string
	NVML    NVML
	CUDA    *CUDA // the result of cuInit, or nil if there is none
	// GPUs are the PCI addresses of the GPUs that the driver must drive.
	GPUs []string
	NVRM []string
	// Since has the lines of the kernel log since the load of the driver, or none if that time is not known.
	Since []string
}

// requiredModules are the modules that every CUDA program needs.
var requiredModules = []string{"nvidia", "nvidia_uvm"}

// NotLoaded reports whether the node has GPUs, but a required module is not loaded.
func (v Verdict) NotLoaded() bool {
	return v.State == Unusable && slices.ContainsFunc(requiredModules, func(name string) bool {
		_, loaded := v.Modules[name]
		return !loaded
	})
}

// JudgeForeign returns a verdict about a foreign driver.
func JudgeForeign(f Facts) Verdict {
	v := Judge(f)
	switch v.State {
	case Ready:
		v.State, v.Reason = Foreign, "installed by another installer; every GPU answers"
	case Loaded:
		v.State, v.Reason = Foreign, "installed by another installer; NVML was not asked"
	default:
		v.Reason = "foreign driver: " + v.Reason
	}
	return v
}

// Judge returns a verdict from facts. The first problem decides.
func Judge(f Facts) Verdict {
	v := Verdict{
		State: Ready, Driver: f.Driver, Digest: f.Digest, Modules: f.Modules, Foreign: f.Foreign, NVML: f.NVML,
		CUDA: f.CUDA, PCIGPUs: len(f.GPUs), NVRM: f.NVRM,
	}
	missing, reasons, gone := f.missing()
	broken, marked := f.broken(gone)
	v.UsableGPUs = max(0, v.PCIGPUs-len(missing)-marked)
	if v.NVML.Devices == nil {
		v.NVML.Devices = []Device{} // JSON then has an empty list and not null
	}
	is := func(s State, format string, args ...any) Verdict {
		v.State, v.Reason = s, fmt.Sprintf(format, args...)
		return v
	}
	if v.PCIGPUs == 0 {
		return is(NoDevice, "no NVIDIA GPU on the PCI bus")
	}
	for _, name := range requiredModules {
		got, ok := f.Modules[name]
		if !ok {
			return is(Unusable, "module %s is not loaded", name)
		}
		if got != "" && got != f.Driver.Modules().Version {
			return is(Drifted, "module %s has version %s; the installed driver has version %s", name, got, f.Driver.Version)
		}
	}
	switch {
	case f.NVML.Version == "" && f.NVML.Error == "":
		return is(Loaded, "modules are loaded; NVML was not asked")
	case f.NVML.Version == "":
		return is(Unusable, "NVML does not answer: %s", f.NVML.Error)
	case f.NVML.Version != f.Driver.Modules().Version:
		return is(Unusable, "NVML answers with version %q; the installed driver has version %s", f.NVML.Version,
			f.Driver.Version)
	case len(missing) > 0:
		return is(Unusable, "%d of %d GPUs usable: %s", v.UsableGPUs, v.PCIGPUs,
			strings.Join(slices.Concat(missing, reasons, broken), ", "))
	case f.NVML.Error != "":
		return is(Unusable, "NVML: %s", f.NVML.Error)
	}
	if len(broken) > 0 {
		v.OnlyReset = len(FatalXids(f.Since)) == 0
		return is(Unusable, "%s", strings.Join(broken, "; "))
	}
	if waiting := f.fabricless(); len(waiting) > 0 {
		return is(Starting, "%d GPUs have not joined their NVLink fabric (%s): CUDA programs cannot start before "+
			"nvidia-fabricmanager has connected these GPUs", len(waiting), waiting[0])
	}
	return v.withCUDA()
}

// broken returns why GPUs that answer must not be used: fatal errors in the kernel log, and NVML's recovery actions.
// The log may have dropped the error that led to such an action. gone has the slots of the GPUs that do not answer, and
// broken leaves these out. gpus is the number of the other GPUs with such a reason.
func (f Facts) broken(gone []string) (reasons []string, gpus int) {
	wanted, slots := f.NVML.demands()
	var lines []string
	for _, line := range KeepXids(f.Since) {
		if at := slot(XidGPU(line)); !slices.Contains(gone, at) {
			lines, slots = append(lines, line), append(slots, at)
		}
	}
	if fatal := FatalXids(lines); len(fatal) > 0 {
		reasons = append(reasons, "the driver reports "+strings.Join(fatal, "; "))
	}
	if len(wanted) > 0 {
		reasons = append(reasons, "NVML reports that "+strings.Join(wanted, "; "))
	}
	slots = slices.DeleteFunc(slots, func(at string) bool { // a GPU that has left the bus is not among those present
		return !slices.ContainsFunc(f.GPUs, func(gpu string) bool { return slot(gpu) == at })
	})
	slices.Sort(slots)
	return reasons, len(slices.Compact(slots))
}

// missing returns the GPUs that NVML does not list as healthy, and their slots. A healthy device without a PCI address
// counts as one of the GPUs that are not listed. The errors of other devices without an address are in reasons.
func (f Facts) missing() (missing, reasons, gone []string) {
	nameless := 0
	listed := map[string]string{} // from address to error
	for _, d := range f.NVML.Devices {
		switch {
		case d.PCIBusID != "":
			text := d.Error
			if what := d.demand(); what != "" && text != "" {
				text += ", and it needs " + what
			}
			listed[busAddress(d.PCIBusID)] = text
		case d.Error == "":
			nameless++
		default:
			reasons = append(reasons, d.Error)
		}
	}
	for _, gpu := range f.GPUs {
		said, ok := listed[busAddress(gpu)]
		switch {
		case ok && said == "":
		case ok:
			missing, gone = append(missing, gpu+": "+said), append(gone, slot(gpu))
		case nameless > 0:
			nameless--
		default:
			missing, gone = append(missing, gpu+" is not listed"), append(gone, slot(gpu))
		}
	}
	return missing, reasons, gone
}

// fabricless returns the GPUs that wait for NVIDIA's fabric manager, on machines with NVSwitches. Until it has
// connected them, CUDA programs fail with error 802, system not yet initialized.
func (f Facts) fabricless() (waiting []string) {
	for _, d := range f.NVML.Devices {
		if d.Fabric == "not started" || d.Fabric == "in progress" {
			waiting = append(waiting, d.PCIBusID+" "+d.Fabric)
		}
	}
	return waiting
}

// busAddress normalises a PCI address. NVML writes the domain with eight digits in capitals (nvmlPciInfo_t), sysfs with
// four in small letters.
func busAddress(s string) string {
	domain, rest, _ := strings.Cut(strings.ToLower(s), ":")
	return strings.TrimLeft(domain, "0") + ":" + rest
}

// Problem is the error that [Verdict.Err] wraps in a fault. It carries the verdict.
type Problem struct {
	Verdict Verdict
	text    string
}

func (p *Problem) Error() string { return p.text }

// IsOf reports whether the problem comes from the verdict v.
func (p *Problem) IsOf(v Verdict) bool {
	return p.Verdict.State == v.State && p.Verdict.Digest == v.Digest && p.Verdict.Reason == v.Reason
}

// Err returns the verdict as a fault, or nil if the operator need not act: ready, loaded, staged and foreign.
func (v Verdict) Err() error {
	text := v.Reason
	if len(v.NVRM) > 0 {
		text += "; the kernel says: " + strings.Join(v.NVRM[max(0, len(v.NVRM)-2):], " | ")
	}
	is := func(kind fault.Kind, text, hint string) error {
		return fault.Wrap(kind, &Problem{Verdict: v, text: text}, hint)
	}
	switch v.State {
	case NoDevice:
		return is(fault.NoDevice, "no GPU present: "+text,
			"attach a GPU to this machine, or run fetcher only on nodes with a GPU")
	case Unusable:
		if v.OnlyCUDA {
			return is(fault.Unusable, "GPU present but not usable: "+text,
				"read the kernel log: dmesg | grep -e NVRM -e Xid; --no-cuda-check turns this check off")
		}
		return is(fault.Unusable, "GPU present but not usable: "+text,
			"read the kernel log: dmesg | grep -e NVRM -e Xid; after a fatal Xid, or if NVML demands it, reset the GPU "+
				"(nvidia-smi --gpu-reset); if this verdict stays, reboot the node")
	case Starting:
		return is(fault.Unusable, text,
			"start NVIDIA's fabric manager in the version of this driver, which is no part of Prebake: docs/how-to/gke.md "+
				"has who starts it; on a confidential node, set the GPUs' ready state; then run: fetcher status")
	case Drifted:
		return is(fault.Mismatch, text, "when the GPUs are idle, run: fetcher install")
	case Absent:
		return is(fault.NoArtifact, text, "install a driver: fetcher install")
	}
	return nil
}

// Print writes the verdict for people, in lines of at most 80 columns.
func (v Verdict) Print(w io.Writer) error {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		fmt.Fprintf(&b, "%-8s %s\n", key, Clip(text, 71)) // 71 is the length of a digest
	}
	line("verdict", "%s", v.State)
	if v.Reason != "" {
		line("reason", "%s", v.Reason)
	}
	if v.Driver.Version != "" {
		line("driver", "%s", v.Driver)
	}
	if v.Digest != "" {
		line("digest", "%s", v.Digest)
	}
	for _, name := range slices.Sorted(maps.Keys(v.Modules)) {
		note := ""
		if slices.Contains(v.Foreign, name) {
			note = ", not loaded from the installed file"
		}
		line("module", "%s %s%s", name, v.Modules[name], note)
	}
	switch {
	case v.NVML.CUDA != "":
		line("nvml", "%s, CUDA %s", v.NVML.Version, v.NVML.CUDA)
	case v.NVML.Version != "":
		line("nvml", "%s", v.NVML.Version)
	case v.NVML.Error != "":
		line("nvml", "no answer: %s", v.NVML.Error)
	}
	if v.CUDA != nil {
		line("cuda", "%s", v.CUDA)
	}
	if v.PCIGPUs > 0 && v.NVML.Version == "" && v.NVML.Error == "" {
		line("gpus", "%d on the PCI bus, NVML was not asked about them", v.PCIGPUs)
	} else {
		line("gpus", "%d on the PCI bus, %d usable", v.PCIGPUs, v.UsableGPUs)
	}
	for _, d := range v.NVML.Devices {
		line("gpu", "%s %s %s, %d MiB", d.PCIBusID, d.Name, d.UUID, d.MemoryBytes>>20)
		if d.Fabric != "" {
			line("fabric", "%s %s", d.PCIBusID, d.Fabric)
		}
	}
	for _, text := range v.NVRM {
		line("kernel", "%s", text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Clip returns a text of at most n characters. If it cuts the text, the last three characters are dots.
func Clip(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return fmt.Sprintf("%.*s...", n-3, s)
}
