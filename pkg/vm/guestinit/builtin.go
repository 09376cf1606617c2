package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// builtin is a step that guestinit runs itself. An errno in its error becomes the step's exit status.
type builtin func(ctx context.Context, args []string, stdout io.Writer) error

// builtins returns the commands that init runs itself, by name. @stop is not among them, because the loop over the
// steps handles it.
func builtins() map[string]builtin {
	return map[string]builtin{
		"@insmod": func(_ context.Context, args []string, _ io.Writer) error { // FILE [PARAMETER...]
			if len(args) < 1 {
				return usage("insmod", "FILE [PARAMETER...]")
			}
			return insmod(args[0], strings.Join(args[1:], " "))
		},
		"@rmmod": func(_ context.Context, args []string, _ io.Writer) error { // NAME
			if len(args) != 1 {
				return usage("rmmod", "NAME")
			}
			return rmmod(args[0])
		},
		"@cat":          cat,         // FILE...
		"@ls":           list,        // FOLDER...: every path below, with kind and size
		"@mknod":        mknod,       // PATH MAJOR MINOR: a character device
		"@nvidia-nodes": nvidiaNodes, // the device nodes that nvidia-modprobe would create
		"@dial":         dial,        // HOST:PORT...: open and close a TCP connection
		"@open":         open,        // FILE...: open for reading and writing, then close
		"@wait":         wait,        // PATH...: wait until all of them exist
		"@mount":        mount,       // DEVICE FOLDER: mount an ext4 file system
	}
}

func usage(name, want string) error {
	return fmt.Errorf("%s: want %s: %w", name, want, unix.EINVAL)
}

func insmod(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	err = unix.FinitModule(int(f.Fd()), params, 0)
	if err != nil {
		err = fmt.Errorf("insmod %s: %w", filepath.Base(path), err)
	}
	return errors.Join(err, f.Close())
}

func rmmod(name string) error {
	name = strings.ReplaceAll(strings.TrimSuffix(name, ".ko"), "-", "_")
	if err := unix.DeleteModule(name, unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("rmmod %s: %w", name, err)
	}
	return nil
}

func mount(_ context.Context, args []string, _ io.Writer) error {
	if len(args) != 2 {
		return usage("mount", "DEVICE FOLDER")
	}
	if err := os.MkdirAll(args[1], 0o755); err != nil {
		return err
	}
	if err := unix.Mount(args[0], args[1], "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", args[0], err)
	}
	return nil
}

func cat(_ context.Context, args []string, stdout io.Writer) error {
	for _, path := range args {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(stdout, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func list(_ context.Context, args []string, stdout io.Writer) error {
	for _, root := range args {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			note := ""
			if info.Mode()&fs.ModeSymlink != 0 {
				target, err := os.Readlink(path)
				if err != nil {
					return err
				}
				note = " -> " + target
			}
			_, err = fmt.Fprintf(stdout, "%v %10d %s%s\n", info.Mode(), info.Size(), path, note)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func mknod(_ context.Context, args []string, _ io.Writer) error {
	if len(args) != 3 {
		return usage("mknod", "PATH MAJOR MINOR")
	}
	major, err := strconv.ParseUint(args[1], 10, 12)
	if err != nil {
		return fmt.Errorf("mknod: parse the major number: %w", err)
	}
	minor, err := strconv.ParseUint(args[2], 10, 20)
	if err != nil {
		return fmt.Errorf("mknod: parse the minor number: %w", err)
	}
	return charDevice(args[0], uint32(major), uint32(minor))
}

// charDevice creates a device node. A device node with the same numbers may exist already.
func charDevice(path string, major, minor uint32) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	dev := unix.Mkdev(major, minor)
	err := unix.Mknod(path, unix.S_IFCHR|0o666, int(dev))
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == dev {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("mknod %s: %w", path, err)
	}
	return os.Chmod(path, 0o666)
}

// Device numbers of NVIDIA's frontend device (nv-frontend.h and nv-chardev-numbers.h of the driver's source). Minors
// below 254 are GPUs.
const (
	nvidiaMajor        = 195
	nvidiaModesetMinor = 254
	nvidiaCtlMinor     = 255
)

// nvidiaNodes creates the device nodes of the loaded modules, as nvidia-modprobe does.
func nvidiaNodes(_ context.Context, _ []string, stdout io.Writer) error {
	text, err := os.ReadFile("/proc/devices")
	if err != nil {
		return err
	}
	majors := charMajors(string(text))
	gpus, err := os.ReadDir("/proc/driver/nvidia/gpus")
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for _, n := range nodes(majors, len(gpus)) {
		if err := charDevice(n.path, n.major, n.minor); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(stdout, "%s %d %d\n", n.path, n.major, n.minor); err != nil {
			return err
		}
	}
	return nil
}

type node struct {
	path         string
	major, minor uint32
}

func nodes(majors map[string]uint32, gpus int) []node {
	list := []node{{"/dev/nvidiactl", nvidiaMajor, nvidiaCtlMinor}}
	for i := range gpus {
		list = append(list, node{"/dev/nvidia" + strconv.Itoa(i), nvidiaMajor, uint32(i)})
	}
	list = append(list, node{"/dev/nvidia-modeset", nvidiaMajor, nvidiaModesetMinor})
	if uvm, ok := majors["nvidia-uvm"]; ok {
		list = append(list, node{"/dev/nvidia-uvm", uvm, 0}, node{"/dev/nvidia-uvm-tools", uvm, 1})
	}
	return list
}

// charMajors returns the major number of each character device in the text of /proc/devices.
func charMajors(text string) map[string]uint32 {
	majors := map[string]uint32{}
	chars := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasSuffix(line, ":") {
			chars = line == "Character devices:"
			continue
		}
		number, name, ok := strings.Cut(line, " ")
		if !chars || !ok {
			continue
		}
		if major, err := strconv.ParseUint(number, 10, 12); err == nil {
			majors[strings.TrimSpace(name)] = uint32(major)
		}
	}
	return majors
}

func open(_ context.Context, args []string, _ io.Writer) error {
	for _, path := range args {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close %s: %w", path, err)
		}
	}
	return nil
}

func dial(ctx context.Context, args []string, _ io.Writer) error {
	var d net.Dialer
	for _, address := range args {
		c, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

func wait(ctx context.Context, args []string, _ io.Writer) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for _, path := range args {
		for {
			_, err := os.Lstat(path)
			if err == nil {
				break
			}
			if !os.IsNotExist(err) {
				return err
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-tick.C:
			}
		}
	}
	return nil
}
