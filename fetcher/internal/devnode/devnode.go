// Package devnode makes the device files of a loaded NVIDIA driver. It makes
// nvidia-uvm last: GKE's device plugin takes nvidiactl and nvidia-uvm together
// as the sign that a driver is ready. It refuses to replace a file that is not
// a device.
package devnode

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Node is one character device file.
type Node struct {
	Name         string
	Major, Minor uint32
	Mode         fs.FileMode
	UID, GID     int
}

// The fixed numbers of NVIDIA's driver: major 195, with 255 for the control
// device and 254 for modesetting (nv.h: NV_MAJOR_DEVICE_NUMBER and friends).
const (
	major        = 195
	minorControl = 255
	minorModeset = 254
)

// Plan lists the nodes for the modules that are loaded, reading /proc below
// the node's root.
func Plan(root fs.FS, modules map[string]bool) ([]Node, error) {
	raw, err := fs.ReadFile(root, "proc/devices")
	if err != nil {
		return nil, fmt.Errorf("read device numbers: %w", err)
	}
	majors := ParseMajors(string(raw))
	params, err := fs.ReadFile(root, "proc/driver/nvidia/params")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read driver parameters: %w", err)
	}
	base := ParseParams(string(params))
	node := func(name string, major, minor uint32) Node {
		n := base
		n.Name, n.Major, n.Minor = name, major, minor
		return n
	}
	var nodes []Node
	if modules["nvidia"] {
		minors, err := gpuMinors(root)
		if err != nil {
			return nil, err
		}
		for _, minor := range minors {
			nodes = append(nodes, node("nvidia"+strconv.FormatUint(uint64(minor), 10), major, minor))
		}
		nodes = append(nodes, node("nvidiactl", major, minorControl))
	}
	if modules["nvidia_modeset"] {
		nodes = append(nodes, node("nvidia-modeset", major, minorModeset))
	}
	if uvm, ok := majors["nvidia-uvm"]; ok && modules["nvidia_uvm"] {
		nodes = append(nodes, node("nvidia-uvm-tools", uvm, 1), node("nvidia-uvm", uvm, 0))
	}
	return nodes, nil
}

// ParseMajors reads the character devices of /proc/devices.
func ParseMajors(text string) map[string]uint32 {
	majors := map[string]uint32{}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "Block devices") {
			break
		}
		number, name, ok := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(number, 10, 12); ok && err == nil {
			majors[name] = uint32(n)
		}
	}
	return majors
}

// ParseParams reads owner and mode from /proc/driver/nvidia/params; where it
// says nothing, they are root's and 0666.
func ParseParams(text string) Node {
	n := Node{Mode: 0o666}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		v, err := strconv.ParseUint(value, 10, 31)
		if err != nil {
			continue
		}
		switch key {
		case "DeviceFileUID":
			n.UID = int(v)
		case "DeviceFileGID":
			n.GID = int(v)
		case "DeviceFileMode":
			n.Mode = fs.FileMode(v) & fs.ModePerm
		}
	}
	return n
}

// gpuMinors reads the minor number of each GPU that the driver knows.
func gpuMinors(root fs.FS) ([]uint32, error) {
	const dir = "proc/driver/nvidia/gpus"
	entries, err := fs.ReadDir(root, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list GPUs of the driver: %w", err)
	}
	var minors []uint32
	for _, e := range entries {
		raw, err := fs.ReadFile(root, dir+"/"+e.Name()+"/information")
		if err != nil {
			return nil, fmt.Errorf("read GPU %s: %w", e.Name(), err)
		}
		for line := range strings.Lines(string(raw)) {
			key, value, _ := strings.Cut(line, ":")
			if strings.TrimSpace(key) != "Device Minor" {
				continue
			}
			if n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 8); err == nil {
				minors = append(minors, uint32(n))
			}
		}
	}
	return minors, nil
}

// System is what makes device files. The one real implementation is [Linux].
type System interface {
	// Make makes n in the folder dev, or corrects what is there.
	Make(dev *os.Root, n Node) error
	// Clear removes the driver's device files from the folder dev: GKE's device plugin
	// takes them for a driver.
	Clear(dev *os.Root) error
}

// Clear implements [System]. It removes no name that a driver does not have, and
// nothing but character devices.
func (Linux) Clear(dev *os.Root) error {
	entries, err := fs.ReadDir(dev.FS(), ".")
	if err != nil {
		return fmt.Errorf("list device files: %w", err)
	}
	for _, e := range entries {
		if !nodeName.MatchString(e.Name()) || e.Type()&fs.ModeCharDevice == 0 {
			continue
		}
		if err := dev.Remove(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove device file: %w", err)
		}
	}
	return nil
}

// nodeName are the names that Plan gives.
var nodeName = regexp.MustCompile(`^nvidia([0-9]{1,3}|ctl|-modeset|-uvm|-uvm-tools)$`)

// Linux makes real device files.
type Linux struct{}

// Make implements [System].
func (Linux) Make(dev *os.Root, n Node) error {
	dir, err := dev.Open(".")
	if err != nil {
		return fmt.Errorf("open device files: %w", err)
	}
	defer dir.Close()
	at, path := int(dir.Fd()), "/dev/"+n.Name
	want := unix.Mkdev(n.Major, n.Minor)
	var st unix.Stat_t
	err = unix.Fstatat(at, n.Name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil && st.Mode&unix.S_IFMT != unix.S_IFCHR:
		return fault.New(fault.Busy, fmt.Sprintf("make device file %s: something else is there", path), "remove "+path)
	case err == nil && st.Rdev != want:
		// A module that was loaded again may have got another major number.
		if err := unix.Unlinkat(at, n.Name, 0); err != nil {
			return fmt.Errorf("replace device file %s: %w", path, err)
		}
	case err != nil && !errors.Is(err, unix.ENOENT):
		return fmt.Errorf("look at device file %s: %w", path, err)
	}
	if err := unix.Mknodat(at, n.Name, unix.S_IFCHR|uint32(n.Mode), int(want)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fault.Wrap(fault.Unusable, fmt.Errorf("make device file %s: %w", path, err), "run as root with CAP_MKNOD (privileged: true)")
	}
	// The process's umask has no say in this.
	if err := errors.Join(unix.Fchmodat(at, n.Name, uint32(n.Mode), 0), unix.Fchownat(at, n.Name, n.UID, n.GID, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
		return fmt.Errorf("set owner and mode of %s: %w", path, err)
	}
	return nil
}
