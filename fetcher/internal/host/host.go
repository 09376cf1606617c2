// Package host reads the facts of a node: COS build, kernel, the kernel's rules for modules, NVIDIA devices and the
// loaded driver. It reads only below one root folder and changes nothing. Facts that the node does not report stay
// empty.
package host

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
)

// maxFile is the maximum size of a file in bytes. The largest real one, /proc/modules, has some tens of kilobytes.
const maxFile = 1 << 20

// Facts describe a node, as its files report it.
type Facts struct {
	Kernel target.Kernel `json:"kernel"`
	// OS is the value of ID in os-release; on COS it is "cos".
	OS     string `json:"os"`
	Policy Policy `json:"policy"`
	// GPUs are the NVIDIA display devices on the PCI bus, usable or not.
	GPUs []GPU `json:"gpus"`
	// Modules are the NVIDIA modules that are loaded now.
	Modules []Module `json:"modules"`
	// Driver is the loaded driver. Its Version is "" if none is loaded.
	Driver target.Driver `json:"loadedDriver"`
	// Users are the processes that have the driver open. Observe leaves this field empty.
	Users []User `json:"users,omitempty"`
	// FirmwarePath is the extra folder in which the kernel looks for firmware.
	FirmwarePath string `json:"firmwarePath,omitempty"`
	// Unread lists what could not be read or understood. The other facts are valid.
	Unread []string `json:"unread,omitempty"`
}

// Runs reports whether d is the loaded driver. It ignores an edition's suffix, such as -grid, which modules do not
// report, and a flavour that is not known.
func (f *Facts) Runs(d target.Driver) bool {
	d = d.Modules()
	return f.Driver.Version != "" && f.Driver.Version == d.Version &&
		(f.Driver.Flavour == "" || f.Driver.Flavour == d.Flavour)
}

// ManagedGPUs returns the GPUs that the NVIDIA driver must drive.
func (f *Facts) ManagedGPUs() []GPU {
	return slices.DeleteFunc(slices.Clone(f.GPUs), func(g GPU) bool { return !g.Managed() })
}

// Holders returns the loaded modules of others that use the driver, such as gdrdrv or nvidia_fs. They must be unloaded
// before the driver.
func (f *Facts) Holders() []string {
	var all []string
	for _, m := range f.Modules {
		for _, user := range m.UsedBy {
			if !driverModule(user) && !slices.Contains(all, user) {
				all = append(all, user)
			}
		}
	}
	return all
}

// Open reports whether a process has a device of the driver open.
func (f *Facts) Open() bool {
	return slices.ContainsFunc(f.Modules, func(m Module) bool { return m.Refs > len(m.UsedBy) })
}

// driverModules are the modules of NVIDIA's driver, in the kernel's spelling. Other modules have similar names, such as
// nvidia_cspmu, nvidia_fs and nvidiafb.
var driverModules = []string{"nvidia", "nvidia_uvm", "nvidia_modeset", "nvidia_drm", "nvidia_peermem"}

func driverModule(name string) bool { return slices.Contains(driverModules, name) }

// GPU is one NVIDIA display device.
type GPU struct {
	// Address is the PCI address: domain:bus:device.function.
	Address string `json:"address"`
	// Device is the PCI device id, such as 0x1eb8.
	Device string `json:"device"`
	// SubVendor and SubDevice are the board's ids; "" means unknown.
	SubVendor string `json:"subVendor,omitempty"`
	SubDevice string `json:"subDevice,omitempty"`
	// Driver is the kernel driver that is bound to the device, such as nvidia or vfio-pci; "" means none.
	Driver string `json:"driver,omitempty"`
	// VirtualFunction means that this is a virtual function of another device.
	VirtualFunction bool `json:"virtualFunction,omitempty"`
}

// Managed reports whether the node's driver must drive the GPU. It is false for a virtual function, or a GPU that is
// reserved for a virtual machine.
func (g GPU) Managed() bool {
	return !g.VirtualFunction && !strings.Contains(g.Driver, "vfio") && g.Driver != "pci-stub"
}

// Listed returns the managed GPUs in the type of package gpulist.
func (f *Facts) Listed() []gpulist.GPU {
	own := f.ManagedGPUs()
	all := make([]gpulist.GPU, len(own))
	for i, g := range own {
		all[i] = gpulist.GPU{Address: g.Address, Device: g.Device, SubVendor: g.SubVendor, SubDevice: g.SubDevice}
	}
	return all
}

// Module is one line of /proc/modules.
type Module struct {
	// Name has the kernel's spelling, with underscores.
	Name string `json:"name"`
	// Version is the module's own version, or "".
	Version string `json:"version,omitempty"`
	// BuildID identifies the content of the loaded module. It is "" if the kernel does not report it.
	BuildID string   `json:"buildId,omitempty"`
	Refs    int      `json:"refs"`
	UsedBy  []string `json:"usedBy,omitempty"`
	// Permanent means that the kernel never unloads the module: it has no exit function, or the kernel lacks
	// CONFIG_MODULE_UNLOAD. On a kernel without CONFIG_MODULE_UNLOAD, Refs is 0.
	Permanent bool `json:"permanent,omitempty"`
	// Changing means that the kernel is still loading or unloading the module.
	Changing bool `json:"changing,omitempty"`
}

// Observe reads the facts below a node's root folder. The error is of kind Unsupported if the COS build is not known.
func Observe(root fs.FS) (*Facts, error) {
	f := &Facts{}
	osRelease, err := readFirst(root, "etc/os-release", "usr/lib/os-release")
	if err != nil {
		return nil, fault.Wrap(fault.Unsupported, fmt.Errorf("read os-release: %w", err),
			"run this on a Container-Optimized OS node, or set the folder where its root is mounted: --host-root /root")
	}
	values := ParseKeyValues(osRelease)
	lsb, err := readFirst(root, "etc/lsb-release")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read lsb-release: %w", err)
	}
	board := ParseKeyValues(lsb)["CHROMEOS_RELEASE_BOARD"]
	kernel, err := target.ParseKernel(values["BUILD_ID"], board)
	if err != nil {
		return nil, fault.Wrap(fault.Unsupported, fmt.Errorf("identify the node's COS build: %w", err),
			"run this on a Container-Optimized OS node, or set the folder where its root is mounted: --host-root /root")
	}
	f.OS = values["ID"]
	kernel.Milestone, _ = strconv.Atoi(values["VERSION"])
	if c := values["KERNEL_COMMIT_ID"]; target.ValidCommit(c) {
		kernel.Commit = c
	}
	kernel.Arch = target.Arch(runtime.GOARCH)
	if kernel.Release, err = readLine(root, "proc/sys/kernel/osrelease"); err != nil {
		return nil, fmt.Errorf("read kernel release: %w", err)
	}
	if kernel.Version, err = readOptional(root, "proc/sys/kernel/version"); err != nil {
		return nil, fmt.Errorf("read kernel version: %w", err)
	}
	f.Kernel = kernel
	if f.Policy, err = readPolicy(root); err != nil {
		return nil, err
	}
	if f.GPUs, err = f.readGPUs(root); err != nil {
		return nil, err
	}
	if f.Modules, err = LoadedModules(root); err != nil {
		return nil, err
	}
	f.Driver, err = loadedDriver(root)
	if err != nil {
		// A version text of an unknown format is no error, because the module reports its version, too. Only the flavour
		// stays unknown.
		f.unread(err)
		for _, m := range f.Modules {
			if m.Name == "nvidia" {
				f.Driver = target.Driver{Version: m.Version}
			}
		}
	}
	if f.FirmwarePath, err = readOptional(root, "sys/module/firmware_class/parameters/path"); err != nil {
		f.unread(err)
	}
	return f, nil
}

// BootedFirmwarePath returns the firmware folder of the kernel command line, or "" for the default folders.
func BootedFirmwarePath(root fs.FS) string {
	line, err := readFirst(root, "proc/cmdline")
	if err != nil {
		return ""
	}
	for word := range strings.FieldsSeq(line) {
		if path, ok := strings.CutPrefix(word, "firmware_class.path="); ok {
			return path
		}
	}
	return ""
}

func (f *Facts) unread(err error) { f.Unread = append(f.Unread, err.Error()) }

// LoadedModules returns the driver's modules in the order of /proc/modules: the last loaded comes first.
func LoadedModules(root fs.FS) ([]Module, error) {
	text, err := readFirst(root, "proc/modules")
	if errors.Is(err, fs.ErrNotExist) {
		return []Module{}, nil // a kernel without loadable modules has no such file
	}
	if err != nil {
		return nil, fmt.Errorf("read loaded modules: %w", err)
	}
	mods := []Module{}
	for _, m := range ParseModules(text) {
		if !driverModule(m.Name) {
			continue
		}
		if m.Version, err = readOptional(root, "sys/module/"+m.Name+"/version"); err != nil {
			return nil, err
		}
		note, err := readBounded(root, "sys/module/"+m.Name+"/notes/"+modinfo.BuildIDNote)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) { // only root may read the note
			return nil, err
		}
		m.BuildID = modinfo.BuildID([]byte(note))
		mods = append(mods, m)
	}
	return mods, nil
}

// ParseModules parses /proc/modules: name, size, references, users, state. It skips other lines.
func ParseModules(text string) []Module {
	var mods []Module
	for line := range strings.Lines(text) {
		field := strings.Fields(line)
		if len(field) < 4 {
			continue
		}
		m := Module{Name: field[0]}
		// Without CONFIG_MODULE_UNLOAD, the kernel writes "- -" here (print_unload_info in kernel/module/procfs.c).
		if m.Permanent = field[2] == "-"; !m.Permanent {
			refs, err := strconv.Atoi(field[2])
			if err != nil {
				continue
			}
			m.Refs = refs
		}
		for user := range strings.SplitSeq(field[3], ",") {
			switch user {
			case "", "-":
			case "[permanent]":
				m.Permanent = true
			default:
				m.UsedBy = append(m.UsedBy, user)
			}
		}
		m.Changing = len(field) > 4 && (field[4] == "Loading" || field[4] == "Unloading")
		mods = append(mods, m)
	}
	return mods
}

// loadedDriver returns the loaded driver, or the zero value.
func loadedDriver(root fs.FS) (target.Driver, error) {
	text, err := readFirst(root, "proc/driver/nvidia/version")
	if errors.Is(err, fs.ErrNotExist) {
		return target.Driver{}, nil
	}
	if err != nil {
		return target.Driver{}, fmt.Errorf("read loaded driver: %w", err)
	}
	return ParseDriverVersion(text)
}

// ParseDriverVersion parses /proc/driver/nvidia/version. The first line has one of two formats, one for each flavour:
//
//	NVRM version: NVIDIA UNIX x86_64 Kernel Module  <version>  <date>
//	NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  <version>  <more>
func ParseDriverVersion(text string) (target.Driver, error) {
	line, _, _ := strings.Cut(text, "\n")
	rest, ok := strings.CutPrefix(line, "NVRM version: NVIDIA UNIX ")
	if !ok {
		return target.Driver{}, fmt.Errorf("read loaded driver: first line %q is not from the NVIDIA driver", cut(line, 80))
	}
	d := target.Driver{Flavour: target.Proprietary}
	if strings.HasPrefix(rest, "Open Kernel Module") {
		d.Flavour = target.Open
	}
	for word := range strings.FieldsSeq(rest) {
		if strings.Contains(word, ".") && target.ValidVersion(word) {
			d.Version = target.ModuleVersion(word)
			return d, nil
		}
	}
	return target.Driver{}, fmt.Errorf("read loaded driver: the line %q has no driver version", cut(line, 80))
}

// readGPUs lists the PCI devices of vendor 10de with a display class: VGA (0300) or 3D controller (0302).
func (f *Facts) readGPUs(root fs.FS) ([]GPU, error) {
	const dir = "sys/bus/pci/devices"
	entries, err := fs.ReadDir(root, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return []GPU{}, nil // no PCI bus at all
	}
	if err != nil {
		return nil, fmt.Errorf("list PCI devices: %w", err)
	}
	gpus := []GPU{}
	for _, e := range entries {
		var id [6]string
		for i, name := range []string{"vendor", "class", "device", "subsystem_vendor", "subsystem_device", "uevent"} {
			if id[i], err = readOptional(root, dir+"/"+e.Name()+"/"+name); err != nil {
				f.unread(err)
			}
		}
		if id[0] != "0x10de" || !strings.HasPrefix(id[1], "0x0300") && !strings.HasPrefix(id[1], "0x0302") {
			continue
		}
		_, err := fs.Stat(root, dir+"/"+e.Name()+"/physfn") // Documentation/ABI/testing/sysfs-bus-pci
		gpus = append(gpus, GPU{
			Address: e.Name(), Device: id[2], SubVendor: id[3], SubDevice: id[4],
			Driver: ParseKeyValues(id[5])["DRIVER"], VirtualFunction: err == nil,
		})
	}
	return gpus, nil
}

func readFirst(root fs.FS, names ...string) (text string, err error) {
	for _, name := range names {
		if text, err = readBounded(root, name); !errors.Is(err, fs.ErrNotExist) {
			return text, err
		}
	}
	return text, err
}

// readLine returns a file's text without surrounding white space.
func readLine(root fs.FS, name string) (string, error) {
	text, err := readBounded(root, name)
	return strings.TrimSpace(text), err
}

// readOptional does the same as readLine, but returns "" for a missing file.
func readOptional(root fs.FS, name string) (string, error) {
	text, err := readLine(root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return text, err
}

func cut(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
