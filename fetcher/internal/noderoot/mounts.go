package noderoot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNamespace means that this program cannot enter the node's mount namespace.
var ErrNamespace = errors.New("the node's mounts cannot be reached from this container")

// Mounts calls do in the node's mount namespace. If this program is in that namespace already, the result inside is
// false. If the namespace cannot be entered, Mounts returns [ErrNamespace] and does not call do.
func (r *Root) Mounts(do func() error) (inside bool, err error) {
	theirs, err := r.namespace()
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrNamespace, err)
	}
	defer theirs.Close()
	ours, err := os.Stat("/proc/self/ns/mnt")
	if err != nil {
		return false, fmt.Errorf("read the mount namespace of this process: %w", err)
	}
	info, err := theirs.Stat()
	if err != nil {
		return false, fmt.Errorf("read the node's mount namespace: %w", err)
	}
	if os.SameFile(ours, info) && r.dir == "/" {
		return false, do()
	}
	done := make(chan error, 1)
	go func() {
		// The goroutine never unlocks its thread, so the thread ends with it. No other goroutine must run in the node's
		// namespace.
		runtime.LockOSThread()
		done <- inNamespace(theirs, do)
	}()
	return true, <-done
}

// namespace opens the node's mount namespace. It opens the link's folder first, because [os.Root] refuses the magic
// links of /proc.
func (r *Root) namespace() (*os.File, error) {
	dir, err := r.root.Open("proc/1/ns")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), "mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: "proc/1/ns/mnt", Err: err}
	}
	return os.NewFile(uintptr(fd), "proc/1/ns/mnt"), nil
}

// inNamespace calls do in another mount namespace, on this thread.
func inNamespace(namespace *os.File, do func() error) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // give this thread its own root and working directory
		return fmt.Errorf("%w: unshare: %w", ErrNamespace, err)
	}
	if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("%w: setns: %w", ErrNamespace, err)
	}
	return do()
}
