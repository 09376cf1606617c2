package local

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

// EnterCommand is the first argument by which this program starts another one with an
// unpacked image as its root: EnterCommand ROOT FOLDER… -- PROGRAM ARGUMENT…
// The folders are there as well, at their own paths. See [Enter].
const EnterCommand = "in-image"

// kept are variables of the environment that a program in an image sees.
var kept = []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"}

// hostFiles are files of this container that an image has to go by: names, and the
// authorities that its owner trusts.
var hostFiles = []string{"/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"}

// Enter makes an image the root of this process, and becomes the program. It only returns
// an error. It has to be called in a mount namespace of its own: what is mounted goes with it.
//
// A chroot would be less work, but the kernel gives a process in a chroot no user
// namespaces (user_namespaces(7)), and the builder's sandbox needs one.
func Enter(args []string) error {
	end := slices.Index(args, "--")
	if end < 1 || end+1 >= len(args) {
		return fmt.Errorf("%s: want ROOT FOLDER… -- PROGRAM ARGUMENT…", EnterCommand)
	}
	root, folders, program := args[0], args[1:end], args[end+1:]
	if err := mounts(root, folders); err != nil {
		return fmt.Errorf("enter image: %w", err)
	}
	if err := pivot(root); err != nil {
		return fmt.Errorf("enter image: %w", err)
	}
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent"}
	for _, name := range kept {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	if err := syscall.Exec(program[0], program, env); err != nil {
		return fmt.Errorf("start %s in the image: %w", program[0], err)
	}
	return nil
}

// mounts puts into an image what its programs need of this machine.
func mounts(root string, folders []string) error {
	// Nothing of this is to be seen outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", root, err)
	}
	tmp := filepath.Join(root, "tmp")
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", tmp, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("mount /tmp: %w", err)
	}
	for _, dir := range slices.Concat([]string{"/proc", "/dev"}, folders) {
		if err := bind(root, dir, true); err != nil {
			return err
		}
	}
	for _, file := range hostFiles {
		if err := bind(root, file, false); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// bind shows a folder or file of this machine at the same path in the image. The image's
// links are not followed: what it has there goes.
func bind(root, path string, dir bool) error {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	at := filepath.Join(root, path)
	for up := root; ; {
		info, err := os.Lstat(up)
		if err == nil && info.Mode()&fs.ModeSymlink != 0 {
			if err := os.Remove(up); err != nil {
				return err
			}
		}
		rest := strings.TrimPrefix(strings.TrimPrefix(at, up), "/")
		if rest == "" {
			break
		}
		next, _, _ := strings.Cut(rest, "/")
		up = filepath.Join(up, next)
	}
	if dir {
		if err := os.MkdirAll(at, 0o755); err != nil {
			return err
		}
	} else {
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	if err := unix.Mount(path, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// pivot makes the image the root, and lets the old one go.
func pivot(root string) error {
	old := filepath.Join(root, ".old-root")
	if err := os.MkdirAll(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount("/.old-root", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let the former root go: %w", err)
	}
	return os.Remove("/.old-root")
}
