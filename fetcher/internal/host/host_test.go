package host_test

import (
	"io/fs"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// recorded returns recorded files of a COS node, with the given changes. "" as the text removes a file.
func recorded(t *testing.T, edits map[string]string) fstest.MapFS {
	t.Helper()
	return recordedIn(t, "cos.txtar", edits)
}

func recordedIn(t *testing.T, file string, edits map[string]string) fstest.MapFS {
	t.Helper()
	a, err := txtar.ParseFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	root := fstest.MapFS{}
	for _, f := range a.Files {
		root[f.Name] = &fstest.MapFile{Data: f.Data}
	}
	for name, text := range edits {
		if delete(root, name); text != "" {
			root[name] = &fstest.MapFile{Data: []byte(text)}
		}
	}
	return root
}

func TestObserve(t *testing.T) {
	t.Parallel()
	got, err := host.Observe(recorded(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	want := &host.Facts{
		Kernel: target.Kernel{
			BuildID: "18867.90.97", Board: "lakitu", Milestone: 121, Commit: "0123456789abcdef0123456789abcdef01234567",
			Release: "6.6.105+", Version: "#1 SMP PREEMPT_DYNAMIC Sat Sep 27 08:48:45 UTC 2025",
			Arch: target.Arch(runtime.GOARCH),
		},
		OS:     "cos",
		Policy: host.Policy{SignaturesEnforced: true, LoadPin: true, LoadPinExcludes: []string{"kernel-module", "firmware"}},
		GPUs: []host.GPU{{Address: "0000:00:04.0", Device: "0x2330", SubVendor: "0x10de", SubDevice: "0x16c1",
			Driver: "nvidia"}, {Address: "0000:00:05.0", Device: "0x27b8"}},
		Modules: []host.Module{
			{Name: "nvidia_drm"},
			{Name: "nvidia_modeset", Refs: 1, UsedBy: []string{"nvidia_drm"}},
			{Name: "nvidia_uvm", Version: "580.126.09", Refs: 4},
			{Name: "nvidia", Version: "580.126.09", Refs: 12, UsedBy: []string{"nvidia_modeset", "nvidia_uvm"}},
		},
		Driver:       target.Driver{Version: "580.126.09", Flavour: target.Open},
		FirmwarePath: "/var/lib/nvidia/firmware",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Observe (-want +got):\n%s", diff)
	}
}

func TestObserveOddNodes(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name  string
		edits map[string]string
		kind  fault.Kind // Internal means no error
		check func(*host.Facts) bool
	}{
		{"no os-release", map[string]string{"etc/os-release": ""}, fault.Unsupported, nil},
		{"os-release in usr/lib", map[string]string{"etc/os-release": "", "usr/lib/os-release": "BUILD_ID=1.2.3\n"},
			fault.Internal,
			func(f *host.Facts) bool { return f.Kernel.BuildID == "1.2.3" }},
		{"not COS", map[string]string{"etc/os-release": "ID=debian\n"}, fault.Unsupported, nil},
		{"hostile BUILD_ID", map[string]string{"etc/os-release": "BUILD_ID=../../1\n"}, fault.Unsupported, nil},
		{"no lsb-release", map[string]string{"etc/lsb-release": ""}, fault.Unsupported, nil},
		{"no module support", map[string]string{"proc/modules": ""}, fault.Internal,
			func(f *host.Facts) bool { return len(f.Modules) == 0 }},
		{"nothing loaded", map[string]string{"proc/driver/nvidia/version": ""}, fault.Internal,
			func(f *host.Facts) bool { return f.Driver == target.Driver{} }},
		{"kernel overrides command line", map[string]string{"sys/module/module/parameters/sig_enforce": "N\n"},
			fault.Internal,
			func(f *host.Facts) bool { return !f.Policy.SignaturesEnforced }},
		// A kernel without CONFIG_MODULE_UNLOAD prints such lines (print_unload_info in kernel/module/procfs.c). These are
		// from a machine with an H200.
		{"no unloading", map[string]string{"proc/modules": "nvidia_uvm 3493888 - - Live 0x0 (OE)\nnvidia 62631936 - - Live " +
			"0x0 (OE)\n"}, fault.Internal,
			func(f *host.Facts) bool {
				return len(f.Modules) == 2 && f.Modules[0].Permanent && f.Modules[1].Permanent
			}},
		{"modules of others", map[string]string{"proc/modules": "gdrdrv 36864 0 - Live 0x0\nnvidia_fs 331776 0 - Live " +
			"0x0\nnvidia_cspmu 16384 0 - Live 0x0\nnvidia 62631936 2 gdrdrv,nvidia_fs, Live 0x0\n"}, fault.Internal,
			func(f *host.Facts) bool {
				return len(f.Modules) == 1 && slices.Equal(f.Holders(), []string{"gdrdrv", "nvidia_fs"})
			}},
		{"a driver that says it otherwise",
			map[string]string{"proc/driver/nvidia/version": "NVRM release 580.126.09 (open)\n"}, fault.Internal,
			func(f *host.Facts) bool {
				return len(f.Unread) == 1 && f.Runs(target.Driver{Version: "580.126.09", Flavour: target.Open}) &&
					f.Runs(target.Driver{Version: "580.126.09", Flavour: target.Proprietary}) &&
					!f.Runs(target.Driver{Version: "580.126.20"})
			}},
		{"GPUs for virtual machines", map[string]string{
			"sys/bus/pci/devices/0000:00:05.0/uevent":        "DRIVER=vfio-pci\nPCI_CLASS=30000\n",
			"sys/bus/pci/devices/0000:00:04.4/vendor":        "0x10de\n",
			"sys/bus/pci/devices/0000:00:04.4/class":         "0x030200\n",
			"sys/bus/pci/devices/0000:00:04.4/physfn/vendor": "0x10de\n",
		}, fault.Internal, func(f *host.Facts) bool {
			own := f.ManagedGPUs()
			return len(f.GPUs) == 3 && len(own) == 1 && own[0].Address == "0000:00:04.0" && len(f.Listed()) == 1
		}},
		{"no LoadPin", map[string]string{"proc/sys/kernel/loadpin/enforce": ""}, fault.Internal,
			func(f *host.Facts) bool { return !f.Policy.LoadPin }},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f, err := host.Observe(recorded(t, row.edits))
			switch {
			case row.kind != fault.Internal && (!fault.Is(err, row.kind) || fault.Hint(err) == ""):
				t.Errorf("Observe = %v; want %v with a hint", err, row.kind)
			case row.kind == fault.Internal && (err != nil || !row.check(f)):
				t.Errorf("Observe = %+v, %v", f, err)
			}
		})
	}
}

// TestObserveH200 reads recorded files of a node with a foreign driver, whose kernel cannot unload modules.
func TestObserveH200(t *testing.T) {
	t.Parallel()
	f, err := host.Observe(recordedIn(t, "h200.txtar", nil))
	if err != nil {
		t.Fatal(err)
	}
	own := f.ManagedGPUs()
	if !f.Runs(target.Driver{Version: "580.159.04", Flavour: target.Open}) || len(own) != 1 ||
		own[0].Address != "0000:00:06.0" || len(f.Unread) > 0 {
		t.Errorf("Observe = %+v; want the open 580.159.04 and one GPU", f)
	}
	var names []string
	for _, m := range f.Modules {
		if names = append(names, m.Name); !m.Permanent || m.Refs != 0 || len(m.UsedBy) > 0 {
			t.Errorf("module %+v; want one that is never unloaded", m)
		}
	}
	if !slices.Equal(names, []string{"nvidia_uvm", "nvidia"}) {
		t.Errorf("modules %v", names)
	}
}

// failing is a file system with one unreadable file.
type failing struct {
	fs.FS
	name string
}

func (f failing) Open(name string) (fs.File, error) {
	if name == f.name {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
	}
	return f.FS.Open(name)
}

// TestObserveWithoutSome checks that one unreadable file does not hide the other facts.
func TestObserveWithoutSome(t *testing.T) {
	t.Parallel()
	whole, err := host.Observe(recorded(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"sys/bus/pci/devices/0000:00:03.0/class", "sys/bus/pci/devices/0000:00:04.0/subsystem_device",
		"sys/bus/pci/devices/0000:00:05.0/uevent",
		"proc/driver/nvidia/version", "sys/module/firmware_class/parameters/path",
	} {
		f, err := host.Observe(failing{recorded(t, nil), name})
		if err != nil || len(f.Unread) != 1 || !strings.Contains(f.Unread[0], name) || len(f.GPUs) != len(whole.GPUs) ||
			!f.Runs(whole.Driver) {
			t.Errorf("without %s: %+v, %v; want everything else, and a word about it", name, f, err)
		}
	}
}

func TestPolicyAllows(t *testing.T) {
	t.Parallel()
	rows := []struct {
		cmdline string
		signed  bool
		want    string
	}{
		{"ro", false, ""},
		{"module.sig_enforce=1", false, "enforces module signatures"},
		{"module.sig_enforce", false, "enforces module signatures"},
		{"module.sig_enforce=1 module.sig_enforce=0", false, ""},
		{"module.sig_enforce=1", true, ""},
		{"loadpin.enforce=1", true, "LoadPin"},
		{"loadpin.enforce=1 loadpin.exclude=firmware", true, "LoadPin"},
		{"loadpin.enabled=1 loadpin.exclude=kernel-module", true, ""},
	}
	for _, row := range rows {
		err := host.ParseCmdline(row.cmdline).Allows("nvidia", row.signed)
		if (err == nil) != (row.want == "") || err != nil &&
			(!strings.Contains(err.Error(), row.want) || !fault.Is(err, fault.Rejected) || fault.Hint(err) == "") {
			t.Errorf("ParseCmdline(%q).Allows(signed %v) = %v; want %q", row.cmdline, row.signed, err, row.want)
		}
	}
}

func TestParseDriverVersion(t *testing.T) {
	t.Parallel()
	rows := []struct {
		text string
		want target.Driver
	}{
		{"NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Wed Jul  2 00:00:00 UTC 2025\nGCC version:  x\n",
			target.Driver{Version: "535.261.03", Flavour: target.Proprietary}},
		{"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.261.03  Release Build  (a@b)  x\n",
			target.Driver{Version: "535.261.03", Flavour: target.Open}},
		{"NVRM version: NVIDIA UNIX aarch64 Kernel Module  570.1.2  x",
			target.Driver{Version: "570.1.2", Flavour: target.Proprietary}},
		{"NVRM version: NVIDIA UNIX x86_64 Kernel Module", target.Driver{}},
		{"", target.Driver{}},
	}
	for _, row := range rows {
		got, err := host.ParseDriverVersion(row.text)
		if got != row.want || (err == nil) != (row.want != target.Driver{}) {
			t.Errorf("ParseDriverVersion(%q) = %v, %v; want %v", row.text, got, err, row.want)
		}
	}
}

func FuzzParseKeyValues(f *testing.F) {
	for _, s := range []string{"BUILD_ID=1.2.3\nNAME=\"a b\"\n", "# x=y\n\n=v\nA='b'\nA=c=d", "A=\"'\"", "\x00=\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		values := host.ParseKeyValues(text)
		keys := slices.Sorted(maps.Keys(values))
		for _, k := range keys {
			if strings.ContainsAny(k, "=\n") || strings.ContainsAny(values[k], "\n") || k != strings.TrimSpace(k) {
				t.Errorf("ParseKeyValues(%q) has key %q value %q", text, k, values[k])
			}
		}
		// Printing and parsing the values again must not change them.
		if diff := cmp.Diff(values, host.ParseKeyValues(host.FormatKeyValues(values, keys...))); diff != "" {
			t.Errorf("parse, print, parse of %q (-first +second):\n%s", text, diff)
		}
	})
}

func FuzzParseDriverVersion(f *testing.F) {
	f.Add("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Wed Jul  2 00:00:00 UTC 2025\n")
	f.Add("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
	f.Add("NVRM version: NVIDIA UNIX ")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := host.ParseDriverVersion(text)
		if err == nil {
			if _, err := target.ParseDriver(d.Version, string(d.Flavour)); err != nil {
				t.Errorf("ParseDriverVersion(%q) = %v, which is no driver", text, d)
			}
		}
	})
}

// TestModuleState checks that a module counts as changing while the kernel loads or unloads it.
func TestModuleState(t *testing.T) {
	t.Parallel()
	text := "a 1 0 - Live 0x0\nb 1 1 - Loading 0x0 (OE+)\nc 1 0 - Unloading 0x0 (OE-)\nd 1 0 -\n"
	want := []host.Module{{Name: "a"}, {Name: "b", Refs: 1, Changing: true}, {Name: "c", Changing: true}, {Name: "d"}}
	if diff := cmp.Diff(want, host.ParseModules(text)); diff != "" {
		t.Errorf("ParseModules (-want +got):\n%s", diff)
	}
}

func FuzzParseModules(f *testing.F) {
	f.Add("nvidia 62631936 12 nvidia_modeset,nvidia_uvm, Live 0x0\n")
	f.Add("a 1 0 [permanent], Live\n b 1 x - Live\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, m := range host.ParseModules(text) {
			if m.Name == "" || slices.Contains(m.UsedBy, "") {
				t.Errorf("ParseModules(%q) has %+v", text, m)
			}
		}
	})
}
