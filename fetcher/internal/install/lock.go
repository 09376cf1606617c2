package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Lock takes our lock and, where its folder exists, the lock file that
// Google's installer takes, so that the two never work at the same time. It
// does not wait: a lock that is held is a fault of kind Busy.
func (s *Store) Lock(google string) (unlock func() error, err error) {
	var held []*flock.Flock
	unlock = func() error {
		var errs []error
		for _, l := range held {
			errs = append(errs, l.Close())
		}
		return errors.Join(errs...)
	}
	paths := []string{s.Path("lock")}
	if _, err := os.Stat(filepath.Dir(google)); err == nil {
		paths = append(paths, google)
	}
	for _, path := range paths {
		l := flock.New(path, flock.SetPermissions(0o600))
		ok, err := l.TryLock()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), unlock())
		}
		if !ok {
			return nil, errors.Join(fault.New(fault.Busy, fmt.Sprintf("lock %s: another installer works on this node", path),
				"wait until it has finished and run this again"), unlock())
		}
		held = append(held, l)
	}
	return unlock, nil
}

// EnsureExec mounts the install folder over itself with exec allowed, when its
// filesystem forbids it as COS's stateful partition does. Without it neither
// the tools nor the libraries can be used. It reports whether it did anything.
func (s *Store) EnsureExec() (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return false, fmt.Errorf("look at install folder's filesystem: %w", err)
	}
	if st.Flags&unix.ST_NOEXEC == 0 {
		return false, nil
	}
	if err := unix.Mount(s.dir, s.dir, "", unix.MS_BIND, ""); err != nil {
		return false, s.execFault(err)
	}
	// The low four bits of statfs's flags and of mount's are the same:
	// read-only, nosuid, nodev, noexec. A remount keeps the access time mode.
	keep := uintptr(st.Flags) & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV)
	if err := unix.Mount("none", s.dir, "", unix.MS_REMOUNT|unix.MS_BIND|keep, ""); err != nil {
		return false, s.execFault(errors.Join(err, unix.Unmount(s.dir, unix.MNT_DETACH)))
	}
	return true, nil
}

func (s *Store) execFault(err error) error {
	return fault.Wrap(fault.Unusable, fmt.Errorf("remount %s with exec: %w", s.dir, err),
		"run as root with CAP_SYS_ADMIN (privileged: true), or mount the install folder without noexec")
}
