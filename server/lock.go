package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gofrs/flock"

	"github.com/prebake/prebake/pkg/fault"
)

// lock locks the data folder, and the SQLite files of the catalogue and the queue, so that no other server uses one of
// them. Otherwise two servers with two data folders could share a database without its blobs. It returns a function
// that releases the locks; the end of the process releases them, too. Builders that use the queue's file take no lock.
func (s *settings) lock() (release func() error, err error) {
	var held []*flock.Flock
	release = func() error {
		var errs []error
		for _, l := range held {
			errs = append(errs, l.Close())
		}
		return errors.Join(errs...)
	}
	take := func(file, what, hint string) error {
		if slices.ContainsFunc(held, func(l *flock.Flock) bool { return l.Path() == file }) {
			return nil // catalogue and queue are one file
		}
		l := flock.New(file)
		locked, err := l.TryLock()
		if err != nil {
			return fault.Wrap(fault.Transient, fmt.Errorf("lock %s: %w", what, err),
				"check that this user may write to the folder "+filepath.Dir(file))
		}
		if !locked {
			return fault.New(fault.Busy, what+" is in use by another server", hint)
		}
		held = append(held, l)
		return nil
	}
	err = take(filepath.Join(s.Data, "lock"), "data folder "+s.Data, "stop that server, or give --data another folder")
	for _, d := range []struct{ flag, url string }{{"database", s.Database}, {"queue", s.Queue}} {
		file, ok := strings.CutPrefix(d.url, "sqlite://")
		if err != nil || !ok || !filepath.IsAbs(file) { // a wrong URL is refused when it is opened
			continue
		}
		err = take(lockFile(file), d.flag+" "+file, "stop that server, or give --"+d.flag+
			" another file; several servers can share a PostgreSQL database")
	}
	if err != nil {
		return nil, errors.Join(err, release())
	}
	return release, nil
}

// lockFile returns the path of the servers' lock for an SQLite file. It is not the file itself, because a process that
// closes a file loses SQLite's own locks on it. Symbolic links to the file have the same lock. FILE.lock is the lock of
// pkg/queue for migrations.
func lockFile(file string) string {
	if real, err := filepath.EvalSymlinks(file); err == nil {
		return real + ".server-lock"
	}
	for range 40 { // Linux follows as many links
		if dir, err := filepath.EvalSymlinks(filepath.Dir(file)); err == nil {
			file = filepath.Join(dir, filepath.Base(file))
		}
		target, err := os.Readlink(file)
		if err != nil { // file is no link, or does not exist yet
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Dir(file) + "/" + target
		}
		file = target
	}
	return file + ".server-lock"
}
