package gpucheck_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// TestMain lets the test binary act as nvmlprobe if its first argument is --lib or --cuda.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && (os.Args[1] == "--lib" || os.Args[1] == "--cuda") {
		if os.Args[1] == "--cuda" && os.Getenv("CUDA_MPS_PIPE_DIRECTORY") != "/nonexistent" {
			os.Exit(1) // CUDA would connect to the MPS server of the node
		}
		fmt.Print(os.Getenv("LD_LIBRARY_PATH")[1:]) // the test puts the answer in place of the library's folder
		os.Exit(strings.Count(os.Args[2], "fail"))
	}
	os.Exit(m.Run())
}

const version = "535.261.03"

func good() gpucheck.Facts {
	return gpucheck.Facts{
		Driver: target.Driver{Version: version, Flavour: target.Open}, GPUs: []string{"0000:00:04.0"},
		Modules: map[string]string{"nvidia": version, "nvidia_uvm": version},
		NVML:    gpucheck.NVML{Version: version, CUDA: "12.2", Devices: make([]gpucheck.Device, 1)},
	}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name string
		edit func(*gpucheck.Facts)
		want gpucheck.State
		kind fault.Kind // Internal means no error
	}{
		{"good", func(*gpucheck.Facts) {}, gpucheck.Ready, fault.Internal},
		{"no GPU", func(f *gpucheck.Facts) { f.GPUs = nil }, gpucheck.NoDevice, fault.NoDevice},
		{"an edition of a release", func(f *gpucheck.Facts) { f.Driver.Version = version + "-grid" }, gpucheck.Ready,
			fault.Internal},
		{"not loaded", func(f *gpucheck.Facts) { delete(f.Modules, "nvidia") }, gpucheck.Unusable, fault.Unusable},
		{"uvm not loaded", func(f *gpucheck.Facts) { delete(f.Modules, "nvidia_uvm") }, gpucheck.Unusable, fault.Unusable},
		{"another version loaded", func(f *gpucheck.Facts) { f.Modules["nvidia"] = "470.1" }, gpucheck.Drifted,
			fault.Mismatch},
		{"NVML fails", func(f *gpucheck.Facts) { f.NVML = gpucheck.NVML{Error: "no library"} }, gpucheck.Unusable,
			fault.Unusable},
		{"NVML not asked", func(f *gpucheck.Facts) { f.NVML = gpucheck.NVML{} }, gpucheck.Loaded, fault.Internal},
		{"NVML of another version", func(f *gpucheck.Facts) { f.NVML.Version = "470.1" }, gpucheck.Unusable, fault.Unusable},
		{"GPU missing", func(f *gpucheck.Facts) { f.GPUs = append(f.GPUs, "0000:00:05.0") }, gpucheck.Unusable,
			fault.Unusable},
		{"GPUs by their addresses", func(f *gpucheck.Facts) {
			f.GPUs = append(f.GPUs, "10000:3b:00.0")
			f.NVML.Devices = []gpucheck.Device{{PCIBusID: "00010000:3B:00.0"}, {PCIBusID: "00000000:00:04.0"}}
		}, gpucheck.Ready, fault.Internal},
		{"another GPU in its place",
			func(f *gpucheck.Facts) { f.NVML.Devices = []gpucheck.Device{{PCIBusID: "00000000:00:05.0"}} }, gpucheck.Unusable,
			fault.Unusable},
		// nvmlprobe writes these errors if NVML cannot open a GPU, or cannot read one of its values.
		{"a GPU that is lost", func(f *gpucheck.Facts) { f.NVML.Devices[0].Error = "open GPU 0: GPU is lost" },
			gpucheck.Unusable, fault.Unusable},
		{"a GPU that tells its address, and no more", func(f *gpucheck.Facts) {
			f.NVML.Devices[0] = gpucheck.Device{PCIBusID: "00000000:00:04.0",
				Error: "read memory size: Insufficient Permissions"}
		}, gpucheck.Unusable, fault.Unusable},
		{"no GPU answers", func(f *gpucheck.Facts) { f.NVML.Devices = nil }, gpucheck.Unusable, fault.Unusable},
		{"CUDA works", func(f *gpucheck.Facts) { f.CUDA = &gpucheck.CUDA{} }, gpucheck.Ready, fault.Internal},
		{"CUDA fails", func(f *gpucheck.Facts) { f.CUDA = &gpucheck.CUDA{Code: 999} }, gpucheck.Unusable, fault.Unusable},
		{"CUDA does not answer", func(f *gpucheck.Facts) { f.CUDA = &gpucheck.CUDA{Code: gpucheck.CUDASilent} },
			gpucheck.Unusable, fault.Unusable},
		{"no CUDA device beside MIG", func(f *gpucheck.Facts) {
			f.GPUs, f.CUDA = append(f.GPUs, "0000:00:05.0"), &gpucheck.CUDA{Code: 100}
			f.NVML.Devices = []gpucheck.Device{{MIG: true}, {}}
		}, gpucheck.Unusable, fault.Unusable},
		{"CUDA waits", func(f *gpucheck.Facts) { f.CUDA = &gpucheck.CUDA{Code: 802} }, gpucheck.Starting, fault.Unusable},
		{"device error", func(f *gpucheck.Facts) { f.NVML.Error = "device 0 is lost" }, gpucheck.Unusable, fault.Unusable},
	}
	for _, row := range rows {
		f := good()
		f.NVRM = []string{"NVRM: quoted"}
		row.edit(&f)
		v := gpucheck.Judge(f)
		if v.UsableGPUs < 0 || v.UsableGPUs > v.PCIGPUs {
			t.Errorf("%s: %d of %d GPUs usable", row.name, v.UsableGPUs, v.PCIGPUs)
		}
		err := v.Err()
		if v.State != row.want || (row.kind == fault.Internal) != (err == nil) || err != nil &&
			(!fault.Is(err, row.kind) || fault.Hint(err) == "") {
			t.Errorf("%s: Judge = %q, Err = %v; want %q and %v with a hint", row.name, v.State, err, row.want, row.kind)
		}
		if hint := fault.Hint(err); row.want == gpucheck.Starting && !strings.Contains(hint, "docs/how-to/gke.md") {
			t.Errorf("%s: hint %q; want the page that says who starts the fabric manager", row.name, hint)
		}
		if (row.kind == fault.NoDevice || row.kind == fault.Unusable) && !strings.Contains(err.Error(), "NVRM: quoted") {
			t.Errorf("%s: Err = %v; want the kernel's line in it", row.name, err)
		}
	}
}

func TestPrint(t *testing.T) {
	t.Parallel()
	f := good()
	f.Digest = "sha256:" + strings.Repeat("a", 64)
	f.NVRM = []string{strings.Repeat("NVRM: long ", 20)}
	f.Foreign = []string{"nvidia_uvm"}
	f.NVML.Devices[0] = gpucheck.Device{UUID: "GPU-" + strings.Repeat("0", 32), Name: "NVIDIA H100 80GB HBM3",
		PCIBusID: "00000000:00:04.0", MemoryBytes: 80 << 30}
	var out bytes.Buffer
	if err := gpucheck.Judge(f).Print(&out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), f.Digest+"\n") {
		t.Errorf("Print cut the digest:\n%s", out.String())
	}
	if want := "nvidia_uvm " + version + ", not loaded from the installed file\n"; !strings.Contains(out.String(), want) {
		t.Errorf("Print = %s; want %q in it", out.String(), want)
	}
	for line := range strings.Lines(out.String()) {
		if len(strings.TrimSuffix(line, "\n")) > 80 {
			t.Errorf("line of %d columns: %q", len(line)-1, line)
		}
	}
}

// TestClipped checks that shortened lines are still valid UTF-8.
func TestClipped(t *testing.T) {
	t.Parallel()
	for lead := range 4 { // so that each place for a cut is within a character once
		long := strings.Repeat("x", lead) + strings.Repeat("\u20ac", 100)
		var out bytes.Buffer
		if err := (gpucheck.Verdict{State: gpucheck.Unusable, Reason: long}).Print(&out); err != nil {
			t.Fatal(err)
		}
		lines := append(gpucheck.FatalXids([]string{"NVRM: Xid (PCI:0000:00:04): 48, " + long}),
			slices.Collect(strings.Lines(out.String()))...)
		for _, line := range lines {
			if !utf8.ValidString(line) {
				t.Errorf("%q splits a character", line)
			}
		}
		if text := gpucheck.Clip(long, 71); utf8.RuneCountInString(text) != 71 || !strings.HasSuffix(text, "...") {
			t.Errorf("Clip = %q; want 71 characters", text)
		}
	}
	if text := strings.Repeat("\u20ac", 71); gpucheck.Clip(text, 71) != text {
		t.Errorf("Clip cuts a text of 71 characters to %q", gpucheck.Clip(text, 71))
	}
}

// TestProbe runs the test binary as the probe. The probe gets no environment variable but LD_LIBRARY_PATH, which has
// the folder of the library. So the name of that folder carries the answer.
func TestProbe(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name, answer, lib string
		want              gpucheck.NVML
		ok                bool
	}{
		{"works", `{"driverVersion":"535.1.1","cudaVersion":"12.2","devices":[]}`, "x", gpucheck.NVML{Version: "535.1.1"},
			true},
		{"NVML says no", `{"error":"driver not loaded"}`, "fail", gpucheck.NVML{Error: "driver not loaded"}, true},
		{"fails without a reason", `{}`, "fail", gpucheck.NVML{Error: "exit status 1"}, true},
		{"says nothing", `{}`, "x", gpucheck.NVML{Error: "the result of nvmlprobe has no driver version"}, true},
		{"is another program", `hello`, "x", gpucheck.NVML{}, false},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := gpucheck.Prober{Program: self, Node: node(t, "/")}
			got, err := p.Probe(t.Context(), "/"+row.answer+"/"+row.lib, false)
			if (err == nil) != row.ok || got.Version != row.want.Version || got.Error != row.want.Error {
				t.Errorf("Probe = %+v, %v; want %+v", got, err, row.want)
			}
			if !row.ok && (!fault.Is(err, fault.Unusable) || fault.Hint(err) == "") {
				t.Errorf("Probe = %v; want unusable with a hint", err)
			}
		})
	}
	none := gpucheck.Prober{Program: filepath.Join(t.TempDir(), "none"), Node: node(t, "/")}
	if _, err := none.Probe(t.Context(), "/x/y", false); !fault.Is(err, fault.Unusable) {
		t.Errorf("Probe without a program = %v; want unusable", err)
	}
}

func TestAskCUDA(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		answer, lib, err string
		want             gpucheck.CUDA
	}{
		{`{"code":0,"name":"CUDA_SUCCESS"}`, "x", "", gpucheck.CUDA{Name: "CUDA_SUCCESS"}},
		{`{"code":7777}`, "x", "", gpucheck.CUDA{Code: 7777}},
		{`{"error":"open CUDA: no such file"}`, "fail", "no such file", gpucheck.CUDA{}},
		{`{}`, "x", "ask CUDA", gpucheck.CUDA{}},
		{`Segmentation fault`, "fail", "exit status 1", gpucheck.CUDA{}},
	} {
		p := gpucheck.Prober{Program: self, Node: node(t, "/")}
		got, err := p.AskCUDA(t.Context(), "/"+row.answer+"/"+row.lib)
		if got != row.want || (err == nil) != (row.err == "") || err != nil && !strings.Contains(err.Error(), row.err) {
			t.Errorf("%s: AskCUDA = %+v, %v; want %+v, %q", row.answer, got, err, row.want, row.err)
		}
	}
	none := gpucheck.Prober{Program: filepath.Join(t.TempDir(), "none"), Node: node(t, "/")}
	if _, err := none.AskCUDA(t.Context(), "/x/y"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("AskCUDA without a program = %v; want that it does not exist", err)
	}
}

func node(t *testing.T, dir string) *noderoot.Root {
	t.Helper()
	r, err := noderoot.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() }) // a failed close of a folder loses no data
	return r
}

// TestProbeHangs checks that Probe returns in time although an earlier probe still hangs.
func TestProbeHangs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program, pipe := filepath.Join(dir, "probe"), filepath.Join(dir, "pipe")
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600),
		os.WriteFile(program, []byte("#!/bin/sh\n: >"+pipe+".runs\nread line <"+pipe+"\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	p := gpucheck.Prober{Program: program, Node: node(t, "/")}
	first := make(chan error, 1)
	go func() {
		_, err := p.Probe(t.Context(), "x", false)
		first <- err
	}()
	for { // wait until the first probe runs
		if _, err := os.Stat(pipe + ".runs"); err == nil {
			break
		}
		select {
		case err := <-first:
			t.Fatalf("the first Probe = %v; want that it hangs", err)
		case <-time.After(time.Millisecond):
		}
	}
	if _, err := p.Probe(t.Context(), "x", false); !fault.Is(err, fault.Unusable) || !errors.Is(err, gpucheck.ErrHung) {
		t.Errorf("Probe while another probe hangs = %v; want unusable", err)
	}
	if _, err := p.AskCUDA(t.Context(), "x"); !errors.Is(err, gpucheck.ErrHung) ||
		!strings.HasPrefix(err.Error(), "ask NVML: ") {
		t.Errorf("AskCUDA while another probe hangs = %v; want an error that names the probe's library, NVML", err)
	}
	out, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-first; !fault.Is(err, fault.Unusable) || errors.Is(err, gpucheck.ErrHung) {
		t.Errorf("the first Probe = %v; want the error of a probe without output", err)
	}
}

// TestProbeOfBusyFile starts a probe whose file is open for writing for a short time.
func TestProbeOfBusyFile(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "probe")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho '{\"code\":7}'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(program, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { _ = writer.Close() }) // a failed close loses no data
	p := gpucheck.Prober{Program: program, Node: node(t, "/")}
	if got, err := p.AskCUDA(t.Context(), "x"); err != nil || got.Code != 7 {
		t.Errorf("AskCUDA = %+v, %v; want the answer", got, err)
	}
}

// TestProbeCopies checks that several fetchers may copy the probe to the node at the same time. Once the copy exists,
// Probe must not need to write to the disk.
func TestProbeCopies(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Log("not root: the probe cannot be run inside another root, only copied")
	}
	root, program := t.TempDir(), filepath.Join(t.TempDir(), "probe")
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "nv"), 0o755),
		os.WriteFile(program, bytes.Repeat([]byte("#!/bin/false\n"), 1<<16), 0o755)); err != nil {
		t.Fatal(err)
	}
	readOnly := gpucheck.Prober{Program: program, Node: node(t, root), Copy: "/nv/probe", ReadOnly: true}
	if _, err := readOnly.Probe(t.Context(), "x", false); !fault.Is(err, fault.Unusable) ||
		!strings.Contains(err.Error(), "not copied") {
		t.Errorf("read-only, with nothing there: %v; want that NVML was not asked", err)
	}
	var g errgroup.Group
	for range 2 {
		g.Go(func() error {
			for range 50 {
				p := gpucheck.Prober{Program: program, Node: node(t, root), Copy: "/nv/probe"}
				switch _, err := p.Probe(t.Context(), "x", false); {
				case err == nil:
					return errors.New("a program that is none ran")
				case strings.Contains(err.Error(), "copy nvmlprobe"):
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(root, "nv", "*"))
	if err != nil || len(left) != 1 {
		t.Errorf("left in the folder: %v, %v; want the probe alone", left, err)
	}
	if err := os.Chmod(filepath.Join(root, "nv"), 0o555); err != nil {
		t.Fatal(err)
	}
	if _, err := readOnly.Probe(t.Context(), "x", false); strings.Contains(err.Error(), "not copied") {
		t.Errorf("read-only, with the probe there: %v; want it run", err)
	}
}
