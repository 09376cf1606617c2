package localbuild

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// EnterCommand is the first argument with which this program starts itself to call [Enter]. The command line is:
//
//	EnterCommand ROOT FOLDER… -- PROGRAM ARGUMENT…
//
// The program finds each FOLDER of this machine at the same path in the image ROOT.
const EnterCommand = "in-image"

// keptVariables are the environment variables that a program in an image gets.
var keptVariables = []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}

// hostFiles replace files of an image: the name resolution, and the owner's certificate authorities.
var hostFiles = []string{"/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"}

// Enter makes an image the root of this process and executes the program. It returns only on an error. Call it in a
// mount namespace of its own, with which the mounts end. ROOT and the folders must have no symbolic links.
//
// A chroot is not enough: it permits no user namespaces (user_namespaces(7)), and the builder's sandbox needs one.
func Enter(args []string) error {
	end := slices.Index(args, "--")
	if end < 1 || end+1 >= len(args) {
		return fmt.Errorf("%s: want the arguments ROOT FOLDER… -- PROGRAM ARGUMENT…", EnterCommand)
	}
	root, folders, program := args[0], args[1:end], args[end+1:]
	if err := mountAll(root, folders); err != nil {
		return fmt.Errorf("enter image: %w", err)
	}
	if err := pivot(root); err != nil {
		return fmt.Errorf("enter image: %w", err)
	}
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent"}
	for _, name := range keptVariables {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	if err := syscall.Exec(program[0], program, env); err != nil {
		return fmt.Errorf("start %s in the image: %w", program[0], err)
	}
	return nil
}

// mountAll mounts this machine's folders and files into the image.
func mountAll(root string, folders []string) error {
	folders = outermost(append([]string{"/proc", "/dev"}, folders...))
	files := slices.DeleteFunc(slices.Clone(hostFiles), func(file string) bool {
		_, err := os.Stat(file)
		return errors.Is(err, fs.ErrNotExist)
	})
	// Make all mount points before the first mount: after it, a path may lead into a folder of this machine.
	for _, dir := range append(folders, "/tmp") {
		if err := makeMountPoint(root, dir, true); err != nil {
			return err
		}
	}
	for _, file := range files {
		if err := makeMountPoint(root, file, false); err != nil {
			return err
		}
	}
	// The mounts must not be visible outside this process.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private to this process: %w", err)
	}
	if err := bindMount(root, root); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", filepath.Join(root, "tmp"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV,
		"mode=1777"); err != nil {
		return fmt.Errorf("mount /tmp: %w", err)
	}
	for _, dir := range folders {
		at := filepath.Join(root, dir)
		if err := os.MkdirAll(at, 0o755); err != nil { // for folders below /tmp, which is empty now
			return err
		}
		if err := bindMount(dir, at); err != nil {
			return err
		}
	}
	for _, file := range files {
		if err := unix.Mount(file, filepath.Join(root, file), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", file, err)
		}
	}
	return nil
}

// outermost returns the folders that are not below another one.
func outermost(folders []string) []string {
	var all []string
	for _, f := range folders {
		f = filepath.Clean(f)
		if !slices.ContainsFunc(folders, func(other string) bool {
			return f != filepath.Clean(other) && strings.HasPrefix(f, filepath.Clean(other)+"/")
		}) && !slices.Contains(all, f) {
			all = append(all, f)
		}
	}
	return all
}

// makeMountPoint makes a folder or a file in an image as a mount point. It removes symbolic links in the path, because
// the mount must have the same path as outside.
func makeMountPoint(root, path string, dir bool) error {
	at := root
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		at = filepath.Join(at, part)
		if info, err := os.Lstat(at); err == nil && info.Mode()&fs.ModeSymlink != 0 {
			if err := os.Remove(at); err != nil {
				return err
			}
		}
	}
	if dir {
		return os.MkdirAll(at, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// bindMount mounts a folder at another place with exec, because COS mounts its stateful partition noexec.
func bindMount(dir, at string) error {
	if err := unix.Mount(dir, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	if dir == "/proc" || dir == "/dev" {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	// AT_RECURSIVE also covers the mounts below. It needs Linux 5.12.
	if err := unix.MountSetattr(unix.AT_FDCWD, at, unix.AT_RECURSIVE,
		&unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_NOEXEC}); err == nil {
		return nil
	}
	// The low four bits of the flags mean the same in statfs and mount: read-only, nosuid, nodev, noexec.
	keep := uintptr(st.Flags) & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV)
	if st.Flags&unix.ST_NOEXEC == 0 {
		return nil
	}
	if err := unix.Mount("none", at, "", unix.MS_REMOUNT|unix.MS_BIND|keep, ""); err != nil {
		return fmt.Errorf("mount %s with exec: %w", dir, err)
	}
	return nil
}

// pivot makes the image the root and unmounts the old root.
func pivot(root string) error {
	old := filepath.Join(root, ".old-root")
	if err := os.MkdirAll(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("make %s the root: %w", root, err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	if err := unix.Unmount("/.old-root", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the former root: %w", err)
	}
	return os.Remove("/.old-root")
}
