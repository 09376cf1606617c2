// Package gpucheck asks the driver's own management library whether the driver
// works, and judges the answer. NVML sits in a separate program, since it
// needs a C library and this program has none. The package refuses to call a
// node ready on anything less than what was seen.
package gpucheck

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/target"
)

// State is the short form of a verdict.
type State string

// The states.
const (
	Ready    State = "ready"     // every GPU on the bus answers
	NoDevice State = "no-device" // there is no GPU on the bus
	Unusable State = "unusable"  // there is one, and the driver cannot use it
	Drifted  State = "drifted"   // what is loaded is not what is installed
	Loaded   State = "loaded"    // modules are right; NVML was not asked since boot
	Staged   State = "staged"    // installed, and by request not loaded
	Absent   State = "absent"    // nothing is installed
)

// Verdict is what is known of the driver on this node.
type Verdict struct {
	State State `json:"verdict"`
	// Reason says in one line why the state is not ready.
	Reason string        `json:"reason,omitempty"`
	Driver target.Driver `json:"driver"`
	// Digest names the artifact that is installed.
	Digest string `json:"digest,omitempty"`
	// Modules are the NVIDIA modules that are loaded, with their versions.
	Modules map[string]string `json:"modules"`
	// Foreign are those of them that were loaded from another file than the
	// installed one, although it has the same version.
	Foreign []string `json:"foreignModules,omitempty"`
	NVML    NVML     `json:"nvml"`
	// PCIGPUs are on the bus; UsableGPUs answered NVML.
	PCIGPUs    int `json:"pciGPUs"`
	UsableGPUs int `json:"usableGPUs"`
	// NVRM are the driver's own lines in the kernel log.
	NVRM []string `json:"nvrm,omitempty"`
}

// NVML is the probe's answer.
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
}

// Facts are what a verdict is made from.
type Facts struct {
	Driver  target.Driver
	Digest  string
	Modules map[string]string
	Foreign []string
	NVML    NVML
	PCIGPUs int
	NVRM    []string
}

// required are the modules without which no CUDA program runs.
var required = []string{"nvidia", "nvidia_uvm"}

// Judge makes a verdict from facts. The first thing that is wrong decides.
func Judge(f Facts) Verdict {
	v := Verdict{
		State: Ready, Driver: f.Driver, Digest: f.Digest, Modules: f.Modules, Foreign: f.Foreign, NVML: f.NVML,
		PCIGPUs: f.PCIGPUs, UsableGPUs: len(f.NVML.Devices), NVRM: f.NVRM,
	}
	if v.NVML.Devices == nil {
		v.NVML.Devices = []Device{} // an empty list in JSON
	}
	is := func(s State, format string, args ...any) Verdict {
		v.State, v.Reason = s, fmt.Sprintf(format, args...)
		return v
	}
	if f.PCIGPUs == 0 {
		return is(NoDevice, "no NVIDIA GPU on the PCI bus")
	}
	for _, name := range required {
		got, ok := f.Modules[name]
		if !ok {
			return is(Unusable, "module %s is not loaded", name)
		}
		if got != "" && got != f.Driver.Modules().Version {
			return is(Drifted, "module %s is version %s; installed is %s", name, got, f.Driver.Version)
		}
	}
	switch {
	case f.NVML.Version == "" && f.NVML.Error == "":
		return is(Loaded, "modules are loaded; NVML was not asked")
	case f.NVML.Version == "":
		return is(Unusable, "NVML does not answer: %s", f.NVML.Error)
	case f.NVML.Version != f.Driver.Modules().Version:
		return is(Unusable, "NVML answers with version %q; installed is %s", f.NVML.Version, f.Driver.Version)
	case len(f.NVML.Devices) < f.PCIGPUs:
		return is(Unusable, "%d of %d GPUs usable", len(f.NVML.Devices), f.PCIGPUs)
	case f.NVML.Error != "":
		return is(Unusable, "NVML: %s", f.NVML.Error)
	}
	return v
}

// Err returns the verdict as a fault, or nil for ready, loaded and staged.
func (v Verdict) Err() error {
	text := v.Reason
	if len(v.NVRM) > 0 {
		text += "; the kernel says: " + strings.Join(v.NVRM[max(0, len(v.NVRM)-2):], " | ")
	}
	switch v.State {
	case NoDevice:
		return fault.New(fault.NoDevice, "no GPU present: "+text, "attach a GPU to this machine, or keep this program off nodes without one")
	case Unusable:
		return fault.New(fault.Unusable, "GPU present but not usable: "+text, "read the kernel's lines: dmesg | grep -e NVRM -e Xid")
	case Drifted:
		return fault.New(fault.Mismatch, text, "run fetcher install when the GPUs are idle")
	case Absent:
		return fault.New(fault.NoArtifact, text, "run fetcher install")
	}
	return nil
}

// Print writes the verdict for people, at most 80 columns wide.
func (v Verdict) Print(w io.Writer) error {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		fmt.Fprintf(&b, "%-8s %s\n", key, clip(text, 71)) // 71 is a digest's length
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
	line("gpus", "%d on the PCI bus, %d usable", v.PCIGPUs, v.UsableGPUs)
	for _, d := range v.NVML.Devices {
		line("gpu", "%s %s %s, %d MiB", d.PCIBusID, d.Name, d.UUID, d.MemoryBytes>>20)
	}
	for _, text := range v.NVRM {
		line("kernel", "%s", text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Prober runs the probe program.
type Prober struct {
	// Program is the probe on this side of the root.
	Program string
	// HostRoot is the folder that is the node's root. When it is not "/", the
	// program is copied to Copy and run inside, with the node's own libraries.
	HostRoot string
	// Copy is a path inside the node's root; used only with HostRoot.
	Copy string
	// Library is the path of libnvidia-ml.so.1 inside the node's root.
	Library string
}

// probeTime bounds one probe. NVML's first call starts the GPU, which takes
// some seconds for each on large machines.
const probeTime = 2 * time.Minute

// maxAnswer bounds what the probe may say; a machine has at most 16 GPUs.
const maxAnswer = 1 << 20

// Probe asks NVML. That NVML fails is an answer, not an error; an error means
// that the probe itself could not be run.
func (p Prober) Probe(ctx context.Context) (NVML, error) {
	program := p.Program
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.HostRoot != "/" {
		if err := replace(filepath.Join(p.HostRoot, p.Copy), p.Program); err != nil {
			return NVML{}, fmt.Errorf("copy probe: %w", err)
		}
		program, attr.Chroot = p.Copy, p.HostRoot
	}
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, fault.New(fault.Unusable, "ask NVML: no answer in "+probeTime.String(), "read the kernel's lines: dmesg | grep NVRM"))
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "--lib", p.Library)
	cmd.Path, cmd.Err = program, nil // it was looked up on this side of the root
	cmd.Dir, cmd.SysProcAttr = "/", attr
	cmd.Env = []string{"LD_LIBRARY_PATH=" + filepath.Dir(p.Library)}
	var stdout, stderr limited
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		return NVML{}, context.Cause(ctx)
	}
	return parseAnswer(stdout.Bytes(), stderr.String(), err)
}

// parseAnswer reads the probe's JSON. Without JSON the probe did not run.
func parseAnswer(stdout []byte, stderr string, runErr error) (NVML, error) {
	var a struct {
		DriverVersion string   `json:"driverVersion"`
		CUDAVersion   string   `json:"cudaVersion"`
		Devices       []Device `json:"devices"`
		Error         string   `json:"error"`
	}
	if err := json.Unmarshal(stdout, &a); err != nil {
		cause := err
		if runErr != nil {
			cause = runErr
		}
		return NVML{}, fault.Wrap(fault.Unusable, fmt.Errorf("ask NVML: %w: %s", cause, clip(strings.TrimSpace(stderr), 200)),
			"check that --probe names the nvmlprobe program and that the node has a C library")
	}
	switch {
	case a.Error == "" && runErr != nil:
		a.Error = runErr.Error()
	case a.Error == "" && a.DriverVersion == "":
		a.Error = "the probe named no version"
	}
	return NVML{Version: a.DriverVersion, CUDA: a.CUDAVersion, Devices: a.Devices, Error: a.Error}, nil
}

// limited is a buffer that stops taking bytes at a bound.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := maxAnswer - l.Len(); room < len(p) {
		l.Buffer.Write(p[:max(0, room)]) // a Buffer's Write never fails
		return len(p), nil
	}
	return l.Buffer.Write(p)
}

// replace copies a program over another, which may be running.
func replace(dst, src string) error {
	tmp := dst + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := hostfile.Copy(tmp, src); err != nil {
		return err
	}
	return errors.Join(os.Chmod(tmp, 0o755), os.Rename(tmp, dst))
}

// clip cuts a text to n bytes and marks the cut.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n-3] + "..."
}
