// Package devnode makes the device files of a loaded NVIDIA driver, and their links in /dev/char. It makes nvidia-uvm
// last, because GKE's device plugin treats the driver as ready when nvidiactl and nvidia-uvm exist. The package never
// replaces a file that is not a device.
package devnode

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Node is one character device file.
type Node struct {
	// Name is the path below /dev, such as nvidia0 or nvidia-caps/nvidia-cap1.
	Name         string
	Major, Minor uint32
	Mode         fs.FileMode
	UID, GID     int
}

// These are the fixed numbers of NVIDIA's driver (nv.h, NV_MAJOR_DEVICE_NUMBER and the following). Minor 255 is the
// control device, 254 is modesetting.
const (
	major        = 195
	minorControl = 255
	minorModeset = 254
)

// Plan lists the device files for the loaded modules. It reads the node's /proc.
func Plan(root fs.FS, modules map[string]bool) ([]Node, error) {
	raw, err := fs.ReadFile(root, "proc/devices")
	if err != nil {
		return nil, fmt.Errorf("read the node's device numbers: %w", err)
	}
	majors := ParseMajors(string(raw))
	params, err := fs.ReadFile(root, "proc/driver/nvidia/params")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the parameters of the loaded driver: %w", err)
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
	if caps, ok := majors["nvidia-caps"]; ok && modules["nvidia"] {
		nodes = append(nodes, capabilities(root, caps)...)
	}
	if uvm, ok := majors["nvidia-uvm"]; ok && modules["nvidia_uvm"] {
		nodes = append(nodes, node("nvidia-uvm-tools", uvm, 1), node("nvidia-uvm", uvm, 0))
	}
	return nodes, nil
}

// ParseMajors returns the major numbers of the character devices in the text of /proc/devices.
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

// ParseParams reads owner and mode of device files from /proc/driver/nvidia/params. The defaults are root and 0666.
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

// capsFolder is the folder below /dev for the device files of capabilities.
const capsFolder = "nvidia-caps"

// capabilities lists the device files that guard MIG and IMEX. Each file below /proc/driver/nvidia/capabilities has a
// minor and a mode (NVIDIA's MIG user guide, "/dev based nvidia-capabilities").
func capabilities(root fs.FS, major uint32) (nodes []Node) {
	_ = fs.WalkDir(root, "proc/driver/nvidia/capabilities", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // a MIG instance may disappear at any time, and the driver works without its device file
		}
		if raw, err := fs.ReadFile(root, name); err == nil {
			if minor, mode, ok := ParseCapability(string(raw)); ok {
				nodes = append(nodes, Node{Name: fmt.Sprintf("%s/nvidia-cap%d", capsFolder, minor), Major: major, Minor: minor,
					Mode: mode})
			}
		}
		return nil
	})
	return nodes
}

// ParseCapability returns minor and mode from a capability's file. The result ok is false without a minor.
func ParseCapability(text string) (minor uint32, mode fs.FileMode, ok bool) {
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		v, err := strconv.ParseUint(value, 10, 20) // the kernel's minors have 20 bits
		switch {
		case err != nil:
		case key == "DeviceFileMinor":
			minor, ok = uint32(v), true
		case key == "DeviceFileMode":
			mode = fs.FileMode(v) & fs.ModePerm
		}
	}
	return minor, mode, ok
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

// System makes and removes device files. The only real implementation is [Linux].
type System interface {
	// Make makes n in the folder dev, or corrects the existing device file.
	Make(dev *os.Root, n Node) error
	// Clear removes the driver's device files from the folder dev. As long as they exist, GKE's device plugin would treat
	// the driver as ready.
	Clear(dev *os.Root) error
}

// Clear implements [System]. It removes only character devices with a driver's names, and links to them.
func (Linux) Clear(dev *os.Root) error {
	for _, folder := range []string{".", capsFolder} {
		entries, err := fs.ReadDir(dev.FS(), folder)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list device files: %w", err)
		}
		for _, e := range entries {
			name := path.Join(folder, e.Name())
			if !nodeName.MatchString(name) || e.Type()&fs.ModeCharDevice == 0 {
				continue
			}
			if err := dev.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove device file: %w", err)
			}
		}
	}
	_ = dev.Remove(capsFolder) // this fails if the folder has other files, and then it stays
	links, err := fs.ReadDir(dev.FS(), charFolder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list links to device files: %w", err)
	}
	for _, l := range links {
		name := path.Join(charFolder, l.Name())
		to, err := dev.Readlink(name)
		if err != nil || !nodeName.MatchString(strings.TrimPrefix(to, "../")) {
			continue
		}
		if err := dev.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove link to device file: %w", err)
		}
	}
	return nil
}

// nodeName matches the names that Plan returns.
var nodeName = regexp.MustCompile(`^nvidia([0-9]{1,3}|ctl|-modeset|-uvm|-uvm-tools|-caps/nvidia-cap[0-9]{1,7})$`)

// charFolder is the folder below /dev with a link MAJOR:MINOR to each device file. Without its link, a container loses
// the device at a reload of systemd (NVIDIA's container toolkit, "nvidia-ctk system create-dev-char-symlinks").
const charFolder = "char"

// Linux makes device files by system calls.
type Linux struct{}

// Make implements [System].
func (Linux) Make(dev *os.Root, n Node) error {
	if err := dev.MkdirAll(path.Dir(n.Name), 0o755); err != nil {
		return fmt.Errorf("make folder of device files: %w", err)
	}
	dir, err := dev.Open(path.Dir(n.Name))
	if err != nil {
		return fmt.Errorf("open the folder of device files: %w", err)
	}
	defer dir.Close()
	at, base, full := int(dir.Fd()), path.Base(n.Name), "/dev/"+n.Name
	want := unix.Mkdev(n.Major, n.Minor)
	var st unix.Stat_t
	err = unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil && st.Mode&unix.S_IFMT != unix.S_IFCHR:
		return fault.New(fault.Busy, fmt.Sprintf("make device file %s: a file of another type has this name", full),
			"remove "+full)
	case err == nil && st.Rdev != want:
		// A module that was reloaded may have another major number.
		if err := unix.Unlinkat(at, base, 0); err != nil {
			return fmt.Errorf("replace device file %s: %w", full, err)
		}
	case err != nil && !errors.Is(err, unix.ENOENT):
		return fmt.Errorf("read the metadata of device file %s: %w", full, err)
	}
	link(dev, n) // the link comes first, so that it exists when the file appears
	if err := unix.Mknodat(at, base, unix.S_IFCHR|uint32(n.Mode), int(want)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fault.Wrap(fault.Unusable, fmt.Errorf("make device file %s: %w", full, err),
			"run as root with CAP_MKNOD (privileged: true)")
	}
	// Mknod applies the umask, so the mode is set again here.
	if err := errors.Join(unix.Fchmodat(at, base, uint32(n.Mode), 0),
		unix.Fchownat(at, base, n.UID, n.GID, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
		return fmt.Errorf("set owner and mode of %s: %w", full, err)
	}
	return nil
}

// link makes the link to a device file in /dev/char. It ignores errors, because a driver works without the link. Only a
// link is replaced.
func link(dev *os.Root, n Node) {
	name, to := fmt.Sprintf("%s/%d:%d", charFolder, n.Major, n.Minor), "../"+n.Name
	have, err := dev.Readlink(name)
	if err == nil && have == to {
		return
	}
	if err == nil { // the link is from a driver with other device numbers
		err = dev.Remove(name)
	}
	if (err == nil || errors.Is(err, fs.ErrNotExist)) && dev.MkdirAll(charFolder, 0o755) == nil {
		_ = dev.Symlink(to, name)
	}
}
