package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// goodNode returns the report that a node with the emulated GPU should make.
func goodNode() *nodeRun {
	r := &nodeRun{code: fault.Unusable.ExitCode(), live: []string{"nvidia-drm", "nvidia-modeset", "nvidia-uvm", "nvidia"}}
	r.report.Verdict.State, r.report.Verdict.Digest, r.report.Verdict.NVML.Version = "unusable", "sha256:a", "535.261.03"
	return r
}

func TestWantGPU(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		change func(*nodeRun)
		want   string // part of the error; "" means no error
	}{
		"all is well":          {func(*nodeRun) {}, ""},
		"a module is missing":  {func(r *nodeRun) { r.live = r.live[:2] }, "the module nvidia-uvm is not in"},
		"NVML does not answer": {func(r *nodeRun) { r.report.Verdict.NVML.Version = "" }, `NVML answers with version ""`},
		"another artifact":     {func(r *nodeRun) { r.report.Verdict.Digest = "sha256:b" }, "want sha256:a, which was built"},
		"the GPU computes":     {func(r *nodeRun) { r.code = 0 }, "exit status 0"},
		"the kernel said no":   {func(r *nodeRun) { r.code = fault.Rejected.ExitCode() }, "want exit status 9"},
		"nothing was published": {
			func(r *nodeRun) { *r = nodeRun{code: fault.NoArtifact.ExitCode()} }, "the module nvidia is not",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := goodNode()
			row.change(r)
			err := r.wantGPU("535.261.03", "sha256:a")
			if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
				t.Errorf("wantGPU() = %v; want %q", err, row.want)
			}
		})
	}
}

func TestWantNoDevice(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		state string
		kind  fault.Kind
		gpus  int
		ok    bool
	}{
		"a new disk":             {"absent", fault.NoArtifact, 0, true},
		"the driver of a run":    {"no-device", fault.NoDevice, 0, true},
		"a GPU, and a new disk":  {"absent", fault.NoArtifact, 1, false},
		"a GPU that is unusable": {"unusable", fault.Unusable, 1, false},
		"another failure":        {"unusable", fault.Internal, 0, false},
	} {
		r := &nodeRun{code: row.kind.ExitCode()}
		r.report.Verdict.State, r.report.Verdict.PCIGPUs = row.state, row.gpus
		if err := r.wantNoDevice(); (err == nil) != row.ok {
			t.Errorf("%s: wantNoDevice() = %v; want an error: %t", name, err, !row.ok)
		}
	}
}

func TestWantRemembered(t *testing.T) {
	t.Parallel()
	notes := func(conftest, compile string) []timeline.Phase {
		return []timeline.Phase{
			{Name: "conftest", Of: "compile", Note: conftest}, {Name: "compile", Of: "compile", Note: compile},
		}
	}
	for name, row := range map[string]struct {
		phases []timeline.Phase
		ok     bool
	}{
		"remembered":         {notes("400 answers, 399 remembered", "300 objects, 280 reused"), true},
		"objects were not":   {notes("400 answers, 399 remembered", "300 objects, 200 reused"), false},
		"conftest was not":   {notes("400 answers", "300 objects, 280 reused"), false},
		"modules in cache":   {[]timeline.Phase{{Name: "compile", Note: "5 modules, cached"}}, true},
		"nothing is told of": {nil, false},
	} {
		if err := wantRemembered(row.phases); (err == nil) != row.ok {
			t.Errorf("%s: wantRemembered() = %v; want an error: %t", name, err, !row.ok)
		}
	}
}

// TestDisk checks that a disk is kept after a passed run, and emptied after a failed run. Two runs never share a disk.
func TestDisk(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	open := func() *disk {
		t.Helper()
		d, err := openDisk(t.Context(), state, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	closed := func(d *disk, keep bool) {
		t.Helper()
		if err := d.close(keep); err != nil {
			t.Fatal(err)
		}
	}
	kept := filepath.Join(state, "node.img")
	first, second := open(), open()
	if first.path != kept || second.path == kept {
		t.Errorf("two runs at a time have disks %s and %s; want only the first to have %s", first.path, second.path, kept)
	}
	// ext4's superblock begins after the first KiB, and has the volume's name at offset 120 (ext4's documentation).
	const label = 1024 + 120
	if _, err := first.file.WriteAt([]byte("kept"), label); err != nil {
		t.Fatal(err)
	}
	closed(second, true)
	closed(first, true)
	read := func() string {
		t.Helper()
		raw := make([]byte, 4)
		f, err := os.Open(kept)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.ReadAt(raw, label)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	third := open()
	if got := read(); got != "kept" {
		t.Errorf("the disk after a run that passed has %q; want what that run wrote", got)
	}
	closed(third, false)
	fourth := open()
	if got := read(); got == "kept" {
		t.Error("the disk after a run that failed has what an earlier one wrote; want an empty one")
	}
	closed(fourth, true)
}
