package cdi_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	oci "github.com/opencontainers/runtime-spec/specs-go"
	upstream "tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/prebake/prebake/fetcher/internal/cdi"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
)

// h200 is a file /proc/driver/nvidia/gpus/*/information. It was read on a machine with an H200 and driver 580.159.04,
// on 2026-11-28.
const h200 = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 41\nGPU UUID: \t GPU-b23a4bb5-b8d2-a8d4-4cd8-78ddc638457a\nVideo " +
	"BIOS: \t 96.00.a5.00.1a\n" +
	"Bus Type: \t PCIe\nDMA Size: \t 52 bits\nDMA Mask: \t 0xfffffffffffff\nBus Location: \t 0000:00:06.0\nDevice " +
	"Minor: \t 0\nGPU Firmware: \t 580.159.04\nGPU Excluded:\t No\n"

func TestGPUs(t *testing.T) {
	t.Parallel()
	got, err := cdi.GPUs(fstest.MapFS{
		"proc/driver/nvidia/gpus/0000:00:06.0/information": {Data: []byte(h200)},
		"proc/driver/nvidia/gpus/0000:00:07.0/information": {Data: []byte(
			"GPU UUID: \t GPU-????????-????-????-????-????????????\nDevice Minor: \t 1\n")},
		"proc/driver/nvidia/gpus/0000:00:08.0/information": {Data: []byte("Model: \t\t Unknown\n")},
	})
	want := []cdi.GPU{{Minor: 0, UUID: "GPU-b23a4bb5-b8d2-a8d4-4cd8-78ddc638457a"}, {Minor: 1}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("GPUs: %v (-want +got):\n%s", err, diff)
	}
	if got, err := cdi.GPUs(fstest.MapFS{}); err != nil || got != nil {
		t.Errorf("without a driver: %v, %v", got, err)
	}
}

func node(t *testing.T) (*noderoot.Root, string) {
	t.Helper()
	dir := t.TempDir()
	n, err := noderoot.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Close() })
	// As on COS, /var/run is an absolute link.
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "run"), 0o755), os.Mkdir(filepath.Join(dir, "var"), 0o755),
		os.Symlink("/run", filepath.Join(dir, "var/run"))); err != nil {
		t.Fatal(err)
	}
	return n, dir
}

// TestRuntime checks what a container gets from our CDI description. The test uses the library with which containerd
// and podman read such descriptions. That library looks for the device files on this machine.
func TestRuntime(t *testing.T) {
	t.Parallel()
	n, dir := node(t)
	spec := cdi.Spec([]cdi.GPU{{Minor: 0, UUID: "GPU-b23a4bb5"}, {Minor: 3}}, "/home/kubernetes/bin/nvidia",
		[]string{"nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"})
	for _, want := range []bool{true, false} { // the second Write must change nothing
		if changed, err := cdi.Write(n, spec); err != nil || changed != want {
			t.Fatalf("Write = %t, %v; want %t", changed, err, want)
		}
	}
	cache, err := upstream.NewCache(upstream.WithSpecDirs(filepath.Join(dir, "run/cdi")), upstream.WithAutoRefresh(false))
	if err != nil {
		t.Fatal(err)
	}
	if errs := cache.GetErrors(); len(errs) > 0 {
		t.Fatalf("the runtimes' library: %v", errs)
	}
	want := []string{"nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=GPU-b23a4bb5", "nvidia.com/gpu=all"}
	if diff := cmp.Diff(want, cache.ListDevices()); diff != "" {
		t.Errorf("devices (-want +got):\n%s", diff)
	}
	edits := cache.GetDevice("nvidia.com/gpu=all")
	if edits == nil || len(edits.ContainerEdits.DeviceNodes) != 2 ||
		edits.ContainerEdits.DeviceNodes[1].Path != "/dev/nvidia3" {
		t.Errorf("all GPUs are %+v", edits)
	}
	var container oci.Spec
	if _, err := cache.InjectDevices(&container, "nvidia.com/gpu=1"); err == nil { // only if this machine has such GPUs
		t.Log(container.Linux.Devices)
	}
	general := upstream.ContainerEdits{ContainerEdits: &spec.ContainerEdits}
	general.DeviceNodes = nil // the library would look for the device files on this machine
	if err := general.Apply(&container); err != nil {
		t.Fatal(err)
	}
	if len(container.Mounts) == 0 || container.Mounts[0].Source != "/home/kubernetes/bin/nvidia" ||
		container.Mounts[0].Destination != "/usr/local/nvidia" {
		t.Errorf("a container has the mounts %+v", container.Mounts)
	}
	if err := cdi.Remove(n); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "run/cdi/*")); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// TestThisMachine checks, on a machine with a GPU, that a container gets the device files of that GPU.
func TestThisMachine(t *testing.T) {
	t.Parallel()
	gpus, err := cdi.GPUs(os.DirFS("/"))
	if err != nil {
		t.Fatal(err)
	}
	if len(gpus) == 0 {
		t.Skip("no NVIDIA driver is loaded here")
	}
	n, dir := node(t)
	if _, err := cdi.Write(n,
		cdi.Spec(gpus, "/usr/local/nvidia", []string{"nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"})); err != nil {
		t.Fatal(err)
	}
	cache, err := upstream.NewCache(upstream.WithSpecDirs(filepath.Join(dir, "run/cdi")), upstream.WithAutoRefresh(false))
	if err != nil {
		t.Fatal(err)
	}
	var container oci.Spec
	if missing, err := cache.InjectDevices(&container, "nvidia.com/gpu=all", "nvidia.com/gpu="+gpus[0].UUID); err != nil {
		t.Fatalf("give a container all GPUs: %v, %v", missing, err)
	}
	for _, d := range container.Linux.Devices {
		t.Logf("%s %d:%d", d.Path, d.Major, d.Minor)
	}
	if len(container.Linux.Devices) < 4 || container.Linux.Resources == nil {
		t.Errorf("the container has %d devices", len(container.Linux.Devices))
	}
}

// TestBesideDevicePlugin checks that Write makes our CDI description although NVIDIA's device plugin made one for its
// own kind of device.
func TestBesideDevicePlugin(t *testing.T) {
	t.Parallel()
	n, dir := node(t)
	name := filepath.Join(dir, "run/cdi/k8s.device-plugin.nvidia.com-gpu.json")
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755),
		os.WriteFile(name, []byte(`{"cdiVersion":"0.5.0","kind":"k8s.device-plugin.nvidia.com/gpu","devices":[]}`),
			0o644)); err != nil {
		t.Fatal(err)
	}
	if changed, err := cdi.Write(n, cdi.Spec([]cdi.GPU{{}}, "/nv", nil)); err != nil || !changed {
		t.Errorf("Write = %t, %v; want the description written", changed, err)
	}
}

// TestOthers checks that Write removes our CDI description if another program describes the same kind of device, even
// in a newer file. Two descriptions of one device would conflict.
func TestOthers(t *testing.T) {
	t.Parallel()
	for _, theirs := range []string{"run/cdi/nvidia.yaml", "etc/cdi/nvidia.json"} {
		n, dir := node(t)
		spec := cdi.Spec([]cdi.GPU{{}}, "/nv", nil)
		if changed, err := cdi.Write(n, spec); err != nil || !changed {
			t.Fatalf("Write = %t, %v", changed, err)
		}
		name := filepath.Join(dir, theirs)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755),
			os.WriteFile(name, []byte("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
		if changed, err := cdi.Write(n, spec); err != nil || changed {
			t.Errorf("%s: Write = %t, %v; want the other description kept", theirs, changed, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "run/cdi/prebake-nvidia.json")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the description of this package still exists: %v", theirs, err)
		}
	}
}

func FuzzParseInformation(f *testing.F) {
	f.Add(h200)
	f.Fuzz(func(t *testing.T, text string) {
		if g, ok := cdi.ParseInformation(text); ok && g.Minor >= 254 {
			t.Errorf("ParseInformation(%q) = %+v", text, g)
		}
	})
}
