package devnode_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/pkg/fault"
)

func file(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }

func TestPlan(t *testing.T) {
	t.Parallel()
	devices :=
		"Character devices:\n  1 mem\n195 nvidia\n195 nvidia-modeset\n195 nvidiactl\n236 nvidia-uvm\n\nBlock devices:\n 99 " +
			"nvidia-uvm\n"
	all := map[string]bool{"nvidia": true, "nvidia_uvm": true, "nvidia_modeset": true}
	node := func(name string, major, minor uint32) devnode.Node {
		return devnode.Node{Name: name, Major: major, Minor: minor, Mode: 0o666}
	}
	capability := func(minor uint32, mode fs.FileMode) devnode.Node {
		return devnode.Node{Name: fmt.Sprintf("nvidia-caps/nvidia-cap%d", minor), Major: 241, Minor: minor, Mode: mode}
	}
	owned := node("nvidiactl", 195, 255)
	owned.Mode, owned.UID, owned.GID = 0o660, 7, 8
	rows := []struct {
		name    string
		root    fstest.MapFS
		modules map[string]bool
		want    []devnode.Node
	}{
		{"everything, nvidia-uvm last", fstest.MapFS{
			"proc/devices": file(devices),
			"proc/driver/nvidia/gpus/0001:00:00.0/information": file("Model: \t\t Tesla T4\nDevice Minor: \t 0\n"),
			"proc/driver/nvidia/gpus/0002:00:00.0/information": file("Model: \t\t Tesla T4\nDevice Minor: \t 3\n"),
		}, all, []devnode.Node{
			node("nvidia0", 195, 0), node("nvidia3", 195, 3), node("nvidiactl", 195, 255), node("nvidia-modeset", 195, 254),
			node("nvidia-uvm-tools", 236, 1), node("nvidia-uvm", 236, 0),
		}},
		// These files were read on a machine with an H200 and driver 580.159.04, on 2026-11-28. The MIG instance is from
		// NVIDIA's MIG user guide.
		{"capabilities of MIG and IMEX", fstest.MapFS{
			"proc/devices": file("Character devices:\n195 nvidia\n195 nvidiactl\n238 nvidia-uvm\n239 nvidia-nvswitch\n240 " +
				"nvidia-nvlink\n241 nvidia-caps\n242 nvidia-caps-imex-channels\n"),
			"proc/driver/nvidia/gpus/0000:00:06.0/information": file("Model: \t\t NVIDIA H200\nIRQ:   \t\t " +
				"41\nDevice Minor: \t 0\nGPU Firmware: \t 580.159.04\n"),
			"proc/driver/nvidia/capabilities/mig/config": file("DeviceFileMinor: 1\nDeviceFileMode: " +
				"256\nDeviceFileModify: 1\n"),
			"proc/driver/nvidia/capabilities/mig/monitor": file("DeviceFileMinor: 2\nDeviceFileMode: " +
				"292\nDeviceFileModify: 1\n"),
			"proc/driver/nvidia/capabilities/fabric-imex-mgmt": file("DeviceFileMinor: 4323\nDeviceFileMode: " +
				"256\nDeviceFileModify: 1\n"),
			"proc/driver/nvidia/capabilities/gpu0/mig/gi1/access": file("DeviceFileMinor: 12\nDeviceFileMode: " +
				"292\nDeviceFileModify: 1\n"),
			"proc/driver/nvidia/capabilities/gpu0/mig/gi1/ci0/access": file("DeviceFileMinor: 13\nDeviceFileMode: " +
				"292\nDeviceFileModify: 1\n"),
			"proc/driver/nvidia/capabilities/gpu0/mig/gi2/of-another-day": file("nothing known\n"),
		}, map[string]bool{"nvidia": true, "nvidia_uvm": true}, []devnode.Node{
			node("nvidia0", 195, 0), node("nvidiactl", 195, 255), capability(4323, 0o400), capability(12, 0o444),
			capability(13, 0o444), capability(1, 0o400), capability(2, 0o444),
			node("nvidia-uvm-tools", 238, 1), node("nvidia-uvm", 238, 0),
		}},
		{"nothing loaded", fstest.MapFS{"proc/devices": file(devices)}, nil, nil},
		{"uvm without a number", fstest.MapFS{"proc/devices": file("Character devices:\n195 nvidia\n")}, all,
			[]devnode.Node{node("nvidiactl", 195, 255), node("nvidia-modeset", 195, 254)}},
		{"owner and mode", fstest.MapFS{
			"proc/devices": file(devices),
			"proc/driver/nvidia/params": file("ModifyDeviceFiles: 1\nDeviceFileUID: 7\nDeviceFileGID: 8\nDeviceFileMode: " +
				"432\nRegistryDwords: \"\"\n"),
		}, map[string]bool{"nvidia": true}, []devnode.Node{owned}},
	}
	for _, row := range rows {
		got, err := devnode.Plan(row.root, row.modules)
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", row.name, diff)
		}
	}
}

// TestMake makes a device file with the numbers of /dev/null, so that the test needs no GPU.
func TestMake(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	dev, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	n := devnode.Node{Name: "twin", Major: 1, Minor: 3, Mode: 0o666, UID: os.Getuid(), GID: os.Getgid()}
	if err := (devnode.Linux{}).Make(dev, n); errors.Is(err, unix.EPERM) && os.Getuid() != 0 {
		t.Skip("making device files needs root")
	} else if err != nil {
		t.Fatal(err)
	}
	for _, minor := range []uint32{3, 3, 5} { // the same number again, and then another number
		n.Minor = minor
		if err := (devnode.Linux{}).Make(dev, n); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, "twin"), &st); err != nil || st.Rdev != unix.Mkdev(1, minor) ||
			fs.FileMode(st.Mode).Perm() != 0o666 {
			t.Errorf("Make(minor %d): device %x mode %o, %v", minor, st.Rdev, st.Mode, err)
		}
		if to, err := os.Readlink(filepath.Join(dir, fmt.Sprintf("char/1:%d", minor))); err != nil || to != "../twin" {
			t.Errorf("Make(minor %d): /dev/char leads to %q, %v", minor, to, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	n.Name = "file"
	if err := (devnode.Linux{}).Make(dev, n); !fault.Is(err, fault.Busy) {
		t.Errorf("Make over a file = %v; want busy", err)
	}
}

// TestClear checks that Clear removes NVIDIA's device files, but no other files, even with such names.
func TestClear(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	dev, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for i, name := range []string{"nvidia-caps/nvidia-cap2", "nvidia0", "nvidia15", "nvidiactl", "nvidia-uvm",
		"nvidia-uvm-tools", "nvidia-modeset", "nvidia-fs0", "null"} {
		if err := (devnode.Linux{}).Make(dev,
			devnode.Node{Name: name, Major: 1, Minor: uint32(i), Mode: 0o666, UID: os.Getuid(),
				GID: os.Getgid()}); errors.Is(err, unix.EPERM) && os.Getuid() != 0 {
			t.Skip("making device files needs root")
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "nvidia1"), nil, 0o644),
		os.Symlink("../sda", filepath.Join(dir, "char/8:0"))); err != nil {
		t.Fatal(err)
	}
	if err := (devnode.Linux{}).Clear(dev); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := "char null nvidia-fs0 nvidia1"; strings.Join(left, " ") != want {
		t.Errorf("left are %v; want %s", left, want)
	}
	links, err := filepath.Glob(filepath.Join(dir, "char/*"))
	if err != nil || len(links) != 3 { // the links of the disk, of nvidia-fs0 and of null stay
		t.Errorf("links left are %v, %v; want those of others", links, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("Character devices:\n  1 mem\n195 nvidia\nBlock devices:\n")
	f.Add("DeviceFileMode: 438\nDeviceFileUID: 4294967295\n")
	f.Fuzz(func(t *testing.T, text string) {
		for name, major := range devnode.ParseMajors(text) {
			if major >= 1<<12 {
				t.Errorf("ParseMajors(%q)[%q] = %d; want 12 bits", text, name, major)
			}
		}
		if minor, mode, ok := devnode.ParseCapability(text); ok && (minor >= 1<<20 || mode&^fs.ModePerm != 0) {
			t.Errorf("ParseCapability(%q) = %d, %o", text, minor, mode)
		}
		if n := devnode.ParseParams(text); n.Mode&^fs.ModePerm != 0 || n.UID < 0 || n.GID < 0 {
			t.Errorf("ParseParams(%q) = %+v", text, n)
		}
	})
}
