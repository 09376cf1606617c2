package install

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
)

// EnsureExec mounts the install folder over itself with exec, because COS mounts its stateful partition without exec.
// EnsureExec makes the mount in the node's mount namespace, and in this container if necessary. Just before it makes
// the node's mount, it calls beforeMount. The result mounted is true if this call made the node's mount.
func (s *Store) EnsureExec(beforeMount func()) (mounted bool, err error) {
	here, err := s.node.Path(s.dir)
	if err != nil {
		return false, fmt.Errorf("find install folder: %w", err)
	}
	inside, err := s.inNode(here, func() (err error) {
		mounted, err = allowExec(s.dir, beforeMount)
		return err
	})
	switch {
	case errors.Is(err, noderoot.ErrNamespace) && (s.node.Dir() == "/" || mayExec(here)):
		mounted, err = allowExec(here, beforeMount)
	case err == nil && inside:
		_, err = allowExec(here, func() {})
	}
	if err != nil {
		return mounted, s.execFault(err)
	}
	return mounted, nil
}

// RevokeExec removes the mount that EnsureExec made.
func (s *Store) RevokeExec() error {
	here, err := s.node.Path(s.dir)
	if err != nil {
		return fmt.Errorf("find install folder: %w", err)
	}
	unmount := func(dir string) error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: no mount
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return nil
	}
	inside, err := s.inNode(here, func() error { return unmount(s.dir) })
	if errors.Is(err, noderoot.ErrNamespace) || err == nil && inside {
		return unmount(here)
	}
	return err
}

// inNode calls do in the node's mount namespace. If the install folder's path leads to another folder there than in
// this container, the error is [noderoot.ErrNamespace].
func (s *Store) inNode(here string, do func() error) (inside bool, err error) {
	ours, err := os.Stat(here)
	if err != nil {
		return false, fmt.Errorf("read the metadata of the install folder: %w", err)
	}
	return s.node.Mounts(func() error {
		if theirs, err := os.Stat(s.dir); err != nil || !os.SameFile(ours, theirs) {
			return fmt.Errorf("%w: %s on the node is not the install folder of this container", noderoot.ErrNamespace, s.dir)
		}
		return do()
	})
}

func mayExec(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Flags&unix.ST_NOEXEC == 0
}

// allowExec mounts the folder over itself with exec, if the folder is mounted without exec. Just before that, it calls
// beforeMount. allowExec reports whether the mount was necessary.
func allowExec(dir string, beforeMount func()) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("read the mount flags of the install folder: %w", err)
	}
	if st.Flags&unix.ST_NOEXEC == 0 {
		return false, nil
	}
	beforeMount()
	// Set the flags before the mount is attached: other mount namespaces get a copy then, but no later change of flags
	// (mount_namespaces(7)).
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return true, allowExecOld(dir, st.Flags)
	}
	if err != nil {
		return false, fmt.Errorf("clone the mount of the install folder: %w", err)
	}
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_NOEXEC})
	if err == nil {
		err = unix.MoveMount(tree, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	closed := unix.Close(tree)
	if errors.Is(err, unix.ENOSYS) { // mount_setattr needs Linux 5.12; open_tree needs 5.2
		return true, allowExecOld(dir, st.Flags)
	}
	return true, errors.Join(err, closed)
}

// allowExecOld makes the mount of allowExec on kernels before Linux 5.12, by a bind mount and a remount.
func allowExecOld(dir string, flags int64) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	// The low four bits of the flags mean the same in statfs and mount. A remount keeps the access time mode.
	keep := uintptr(flags) & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV)
	if err := unix.Mount("none", dir, "", unix.MS_REMOUNT|unix.MS_BIND|keep, ""); err != nil {
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	return nil
}

func (s *Store) execFault(err error) error {
	return fault.Wrap(fault.Unusable, fmt.Errorf("remount %s with exec: %w", s.dir, err),
		"run as root with CAP_SYS_ADMIN (privileged: true) and with the node's processes (hostPID: true), or mount that "+
			"folder on the node without noexec")
}
