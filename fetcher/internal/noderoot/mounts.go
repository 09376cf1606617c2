package noderoot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNamespace is that the node's mount namespace cannot be told from here.
var ErrNamespace = errors.New("the node's mounts cannot be reached from this container")

// Mounts does something that sees and changes the node's own mounts, with the node's own
// names for files: what is mounted in a container stays there. Where this program is in the
// node's namespace, do is called as it is, and inside is false. The error is
// [ErrNamespace] where do was not called.
func (r *Root) Mounts(do func() error) (inside bool, err error) {
	theirs, err := r.namespace()
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrNamespace, err)
	}
	defer theirs.Close()
	ours, err := os.Stat("/proc/self/ns/mnt")
	if err != nil {
		return false, fmt.Errorf("look at mount namespace: %w", err)
	}
	info, err := theirs.Stat()
	if err != nil {
		return false, fmt.Errorf("look at the node's mount namespace: %w", err)
	}
	if os.SameFile(ours, info) && r.dir == "/" {
		return false, do()
	}
	done := make(chan error, 1)
	go func() {
		// The thread ends with this: it must not come back to others from another namespace.
		runtime.LockOSThread()
		done <- within(theirs, do)
	}()
	return true, <-done
}

// namespace opens the node's. A link of /proc leads out of every root, to what it stands
// for, so that the folder that has it is opened first.
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

// within does something in another mount namespace, on this thread.
func within(namespace *os.File, do func() error) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // the root and folder of this thread alone
		return fmt.Errorf("%w: unshare: %w", ErrNamespace, err)
	}
	if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("%w: setns: %w", ErrNamespace, err)
	}
	return do()
}
