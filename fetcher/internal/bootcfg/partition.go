package bootcfg

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
)

// label is the name of COS's EFI partition in the partition table.
const label = "EFI-SYSTEM"

// Partition mounts the node's EFI partition for this program only. The function closed ends the mount.
func Partition(node *noderoot.Root) (esp *os.Root, closed func() error, err error) {
	device, err := find(node.FS())
	if err != nil {
		return nil, nil, err
	}
	block, err := node.OpenFile("dev/"+device, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open EFI partition: %w", err)
	}
	defer func() { err = errors.Join(err, block.Close()) }()
	fsfd, err := unix.Fsopen("vfat", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, nil, mountFault(device, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fsfd)) }()
	err = unix.FsconfigSetString(fsfd, "source", "/proc/self/fd/"+strconv.Itoa(int(block.Fd())))
	if err == nil {
		err = unix.FsconfigCreate(fsfd)
	}
	if err != nil {
		return nil, nil, mountFault(device, err)
	}
	mount, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC,
		unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, nil, mountFault(device, err)
	}
	top := os.NewFile(uintptr(mount), device)
	esp, err = os.OpenRoot("/proc/self/fd/" + strconv.Itoa(mount))
	if err != nil {
		return nil, nil, errors.Join(mountFault(device, err), top.Close())
	}
	return esp, func() error { return errors.Join(esp.Close(), top.Close()) }, nil
}

func mountFault(device string, err error) error {
	return fault.Wrap(fault.Unusable, fmt.Errorf("mount EFI partition %s: %w", device, err),
		"run as root with CAP_SYS_ADMIN (privileged: true) on kernel 5.2 or newer with vfat, or edit the boot "+
			"configuration by hand")
}

// find returns the name of the EFI partition's device below /dev, from sysfs.
func find(root fs.FS) (string, error) {
	const dir = "sys/class/block"
	entries, err := fs.ReadDir(root, dir)
	if err != nil {
		return "", fmt.Errorf("list the disks and their partitions: %w", err)
	}
	var found []string
	for _, e := range entries {
		raw, err := fs.ReadFile(root, path.Join(dir, e.Name(), "uevent"))
		if err != nil {
			continue // the device disappeared
		}
		values := host.ParseKeyValues(string(raw))
		if name := values["DEVNAME"]; values["PARTNAME"] == label && name != "" && !strings.Contains(name, "..") {
			found = append(found, name)
		}
	}
	if len(found) != 1 {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("find EFI partition: %d partitions have the name %s; want one", len(found), label),
			"mount the EFI partition and edit efi/boot/grub.cfg by hand")
	}
	return found[0], nil
}
