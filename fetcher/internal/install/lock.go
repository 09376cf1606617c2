package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Lock takes this program's lock. google is the path of the lock file of Google's installer. If the folder of that file
// exists, Lock takes that lock, too, because the two installers must never work at the same time. Lock does not wait: a
// held lock is a fault of kind Busy.
func (s *Store) Lock(google string) (unlock func() error, err error) {
	var held []*os.File
	unlock = func() error {
		var errs []error
		for _, f := range held {
			// Close alone may not release the lock: a child process may have a copy of the descriptor between fork and exec.
			errs = append(errs, unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
		}
		return errors.Join(errs...)
	}
	ours, err := s.root.OpenFile(path.Join(ownFolder, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, diskFault(fmt.Errorf("open fetcher's lock file: %w", err))
	}
	held = append(held, ours)
	if s.node.Exists(path.Dir(google)) {
		theirs, err := s.openLock(google)
		if err != nil {
			return nil, errors.Join(err, unlock())
		}
		held = append(held, theirs)
	}
	for _, f := range held {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fault.New(fault.Busy, fmt.Sprintf("%s is locked: another installer works on this node", f.Name()),
				"wait until the other installer has finished, then run fetcher again")
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock this node against other installers: %w", err), unlock())
		}
	}
	return unlock, nil
}

// openLock opens the lock file of Google's installer. It refuses a link: everybody may write into that folder, and a
// planted link would lead to another file.
func (s *Store) openLock(name string) (*os.File, error) {
	planted := func(what string) error {
		return fault.New(fault.Busy, fmt.Sprintf("open lock file /%s: this file is %s", name, what),
			"remove /"+name+": Google's installer uses an empty file there")
	}
	folder, err := s.node.Folder(path.Dir(name))
	if err != nil {
		return nil, fmt.Errorf("open lock file /%s: %w", name, err)
	}
	dir, err := folder.Open(".")
	if err := errors.Join(err, folder.Close()); err != nil {
		return nil, fmt.Errorf("open lock file /%s: %w", name, err)
	}
	defer dir.Close()
	// Opening a device may have effects, and opening a pipe may block: NONBLOCK and NOCTTY.
	open := func(flags int) (*os.File, error) {
		fd, err := unix.Openat(int(dir.Fd()), path.Base(name),
			flags|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), "/"+name), nil
	}
	var st unix.Stat_t
	err = unix.Fstatat(int(dir.Fd()), path.Base(name), &st, unix.AT_SYMLINK_NOFOLLOW)
	var f *os.File
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return nil, planted("a link")
	case err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, planted("not a regular file")
	case errors.Is(err, unix.ENOENT):
		if f, err = open(unix.O_CREAT | unix.O_EXCL); errors.Is(err, unix.EEXIST) { // Google's installer made it just now
			f, err = open(0)
		}
	case err == nil:
		f, err = open(0)
	}
	if err != nil {
		return nil, fmt.Errorf("open lock file /%s: %w", name, err)
	}
	info, err := f.Stat()
	if err == nil {
		var named fs.FileInfo
		named, err = s.node.Lstat(name)
		if err == nil && (!info.Mode().IsRegular() || !os.SameFile(info, named)) {
			err = planted("not a regular file, or was replaced just now")
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
