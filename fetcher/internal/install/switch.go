package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Switch activates a set. All top-level links lead through the link "current", so one rename of "current" changes them
// all at once. The set that was active becomes the previous one. If somebody copied a folder to the place of a pointer,
// Switch moves it into the folder adopted.
func (s *Store) Switch(digest string) error {
	name, err := hexOf(digest)
	if err != nil {
		return err
	}
	next := path.Join("sets", name)
	if _, err := s.root.Stat(path.Join(ownFolder, next, "set.json")); err != nil {
		return fmt.Errorf("make artifact %s the active driver: %w", digest, err)
	}
	was, err := s.link("current")
	if err != nil {
		return err
	}
	previous := path.Join(ownFolder, "previous")
	switch {
	case was != "" && was != next:
		err = s.point(previous, was)
	case !s.isOther(previous):
	default: // a folder or a file has the name of the link
		var to string
		if to, err = s.link("previous"); err == nil && to != "" {
			err = s.point(previous, to)
		} else if err == nil {
			err = s.removePointer("previous")
		}
	}
	if err != nil {
		return err
	}
	if err := s.point(path.Join(ownFolder, "current"), next); err != nil {
		return err
	}
	return s.expose()
}

// Restore sets the pointers current and previous. Without a current set, it first removes the top-level links, because
// a killed run must leave no link without a target. But if before.Copy names a folder, Restore moves this folder back,
// and the top-level links stay.
func (s *Store) Restore(before Pointers) error {
	copied, err := s.putBack(before.Copy)
	if err != nil {
		return fmt.Errorf("restore the folder current: %w", err)
	}
	without := before.Current == "" && !copied
	if without {
		if err := s.withdraw(); err != nil {
			return err
		}
	}
	for _, p := range []struct{ name, to string }{{"previous", before.Previous}, {"current", before.Current}} {
		switch {
		case p.to != "":
			err = s.point(path.Join(ownFolder, p.name), p.to)
		case p.name == "previous" || !copied:
			err = s.removePointer(p.name)
		}
		if err != nil {
			return err
		}
	}
	if without {
		return s.sync()
	}
	return s.expose()
}

// putBack moves a folder with this name in the folder adopted to the place of the link current. It reports whether a
// folder is there now. The name comes from a file that is not trusted.
func (s *Store) putBack(name string) (bool, error) {
	current, aside := path.Join(ownFolder, "current"), path.Join(ownFolder, "adopted", name)
	switch {
	case !asideNames.MatchString(name):
		return false, nil
	case s.isOther(current): // Switch failed before it moved the folder
		return s.exposed(), nil
	case !s.isOther(aside):
		return false, nil
	}
	err := s.exchange(aside, current)
	if err == nil {
		return true, s.root.Remove(aside) // the link
	}
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := s.root.Remove(current); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, s.root.Rename(aside, current)
}

// Recover completes a deactivation that was killed: it removes dangling top-level links, and restores what another
// installer had. If somebody put a folder in place of the link current, the top-level links that lead to its files
// stay, because programs use these files.
func (s *Store) Recover() error {
	if err := s.root.RemoveAll(removed); err != nil {
		return fmt.Errorf("remove the folder %s: %w", removed, err)
	}
	set, err := s.Current()
	if err != nil || set != nil || s.isOther(path.Join(ownFolder, "current")) && s.exposed() {
		return err
	}
	return s.withdraw()
}

// exposed reports whether a top-level link of this program leads to files.
func (s *Store) exposed() bool {
	return slices.ContainsFunc(names, func(name string) bool {
		to, err := s.root.Readlink(name)
		if err != nil || !strings.HasPrefix(to, ownFolder+"/") {
			return false
		}
		_, err = s.root.Stat(name)
		return err == nil
	})
}

// Pointers has the current and the previous set as paths below ownFolder, or "".
type Pointers struct {
	Current  string `json:"current,omitempty"`
	Previous string `json:"previous,omitempty"`
	// Copy is set if a folder is in place of the link current, counts as no set, and has files to which a top-level link
	// leads. It is the name in the folder adopted that Switch gives to this folder.
	Copy string `json:"copy,omitempty"`
}

// Has reports whether a pointer leads to the set of this artifact.
func (p Pointers) Has(digest string) bool {
	name, err := hexOf(digest)
	to := path.Join("sets", name)
	return err == nil && (p.Current == to || p.Previous == to)
}

// Pointers returns the current and the previous set, for [Store.Restore].
func (s *Store) Pointers() (p Pointers, err error) {
	if p.Current, err = s.link("current"); err != nil {
		return p, err
	}
	if at := path.Join(ownFolder, "current"); p.Current == "" && s.isOther(at) && s.exposed() {
		p.Copy = path.Base(s.asideOf(at))
	}
	p.Previous, err = s.link("previous")
	return p, err
}

// link returns the set to which the pointer current or previous leads, as a path below ownFolder. All other functions
// read the pointers through link. It returns "" if there is no such pointer, or if its set is not on the disk. If
// somebody copied the install folder without its links, a folder has the pointer's name. link treats such a folder as a
// link to the set of which it is a copy.
func (s *Store) link(name string) (string, error) {
	at := path.Join(ownFolder, name)
	to, err := s.root.Readlink(at)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err == nil:
		return s.present("sha256:" + path.Base(to)), nil
	case s.isOther(at):
		raw, err := s.readFile(path.Join(at, "set.json"), maxSet)
		var set Set
		if err != nil || json.Unmarshal(raw, &set) != nil {
			return "", nil
		}
		return s.present(set.Digest), nil
	}
	return "", fmt.Errorf("read %s: %w", name, err)
}

// present returns the path of a set, in the form that pointers have, or "" if the set is not on the disk. A set whose
// set.json cannot be read counts as present.
func (s *Store) present(digest string) string {
	name, err := hexOf(digest)
	if err != nil {
		return ""
	}
	to := path.Join("sets", name)
	if _, err := s.root.Stat(path.Join(ownFolder, to, "set.json")); errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	return to
}

// NotLinks returns the names of the pointers that are a folder or a file instead of a link (see [Store.Switch]).
func (s *Store) NotLinks() (names []string) {
	for _, name := range []string{"current", "previous"} {
		if s.isOther(path.Join(ownFolder, name)) {
			names = append(names, name)
		}
	}
	return names
}

// isOther reports whether a name exists and is no link.
func (s *Store) isOther(name string) bool {
	info, err := s.root.Lstat(name)
	return err == nil && info.Mode().Type() != fs.ModeSymlink
}

// point makes or replaces a link atomically. It never deletes a file or a folder that has the link's name, but puts it
// aside. A link that is right stays, because a full disk has no space for another one.
func (s *Store) point(name, to string) error {
	if got, err := s.root.Readlink(name); err == nil && got == to {
		return nil
	}
	if s.isOther(name) {
		aside := s.asideOf(name)
		if err := s.swap(name, to, aside); err != nil {
			return fmt.Errorf("move %s, which is not a link, into .prebake/adopted: %w", name, err)
		}
		s.moved(aside)
		return nil
	}
	tmp := path.Join(ownFolder, "tmp-link")
	if err := s.root.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the old temporary link: %w", err)
	}
	if err := s.root.Symlink(to, tmp); err != nil {
		return diskFault(fmt.Errorf("make a temporary link: %w", err))
	}
	if err := s.root.Rename(tmp, name); err != nil {
		return fmt.Errorf("make the link %s: %w", name, err)
	}
	return nil
}

// removePointer removes a pointer. A file or a folder that has its name is put aside.
func (s *Store) removePointer(name string) (err error) {
	if at := path.Join(ownFolder, name); s.isOther(at) {
		aside := s.asideOf(at)
		if err = s.root.Rename(at, aside); err == nil {
			s.moved(aside)
		}
	} else {
		err = s.root.Remove(at)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore %s: %w", name, err)
	}
	return nil
}

// asideOf returns a free name to which a file or folder with the name of a pointer can be moved: adopted/<name>, or
// adopted/<name>-2 and so on.
func (s *Store) asideOf(name string) string {
	first := path.Join(ownFolder, "adopted", path.Base(name))
	aside := first
	for i := 2; ; i++ {
		if _, err := s.root.Lstat(aside); err != nil { // if it is not ErrNotExist, the caller's next call fails
			return aside
		}
		aside = fmt.Sprintf("%s-%d", first, i)
	}
}

// moved calls PutAside with the path of a file or folder below the install folder.
func (s *Store) moved(aside string) {
	if s.PutAside != nil {
		s.PutAside(path.Join(s.dir, aside))
	}
}

// asideNames matches the names of [Store.asideOf] in the folder adopted.
var asideNames = regexp.MustCompile(`^(current|previous)(-[0-9]+)?$`)

// Aside returns the names of the files and folders in the folder adopted that once had the name of a pointer.
func (s *Store) Aside() (all []string, err error) {
	entries, err := fs.ReadDir(s.root.FS(), path.Join(ownFolder, "adopted"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the files of others in .prebake/adopted: %w", err)
	}
	for _, e := range entries {
		if asideNames.MatchString(e.Name()) {
			all = append(all, e.Name())
		}
	}
	return all, nil
}

// RemoveAside removes names that Aside returned.
func (s *Store) RemoveAside(all []string) (err error) {
	for _, name := range all {
		if rerr := s.root.RemoveAll(path.Join(ownFolder, "adopted", name)); rerr != nil {
			err = errors.Join(err, fmt.Errorf("remove a file of others from .prebake/adopted: %w", rerr))
		}
	}
	return err
}

// swap puts a link in place of a file or folder, and keeps this under the free name aside. It does both in one step if
// the file system can.
func (s *Store) swap(name, to, aside string) error {
	if err := s.point(aside, to); err != nil { // the exchange below puts the former content here
		return err
	}
	err := s.exchange(aside, name)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if err = s.root.Remove(aside); err == nil {
			if err = s.root.Rename(name, aside); err == nil {
				err = s.point(name, to)
			}
		}
	}
	return err
}

// expose makes the top-level names lead into the current set. The folder adopted keeps what another installer had
// there.
func (s *Store) expose() error {
	for _, name := range names {
		to := path.Join(ownFolder, "current", name)
		_, err := s.root.Stat(to)
		if errors.Is(err, fs.ErrNotExist) {
			if err := s.hide(name); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("find the files of the installed driver: %w", err)
		}
		if got, err := s.root.Readlink(name); err == nil && got == to {
			continue
		}
		_, err = s.root.Lstat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = s.point(name, to)
		case err != nil:
			err = fmt.Errorf("read the metadata of %s: %w", name, err)
		default:
			if name == "lib64" {
				err = s.keepForeign()
			}
			if err == nil {
				err = s.adopt(name, to)
			}
		}
		if err != nil {
			return err
		}
	}
	return s.sync()
}

// adopt replaces an existing name by this program's link, in one step if the file system can. The folder adopted keeps
// the former content.
func (s *Store) adopt(name, to string) error {
	aside := path.Join(ownFolder, "adopted", name)
	if err := s.root.RemoveAll(aside); err != nil {
		return fmt.Errorf("remove the old %s: %w", aside, err)
	}
	err := s.swap(name, to, aside)
	if errors.Is(err, unix.EBUSY) {
		return fault.Wrap(fault.Busy, fmt.Errorf("replace %s by a link: %w", name, err),
			"stop the other installer that has mounted something at or below this folder")
	}
	if err != nil {
		return fmt.Errorf("replace %s by a link: %w", name, err)
	}
	return nil
}

func (s *Store) exchange(a, b string) error {
	d, err := s.root.Open(".")
	if err != nil {
		return err
	}
	fd := int(d.Fd())
	return errors.Join(unix.Renameat2(fd, a, fd, b, unix.RENAME_EXCHANGE), d.Close())
}

// hide removes a top-level link of this program and restores the adopted content.
func (s *Store) hide(name string) error {
	to, err := s.root.Readlink(name)
	if err == nil && strings.HasPrefix(to, ownFolder+"/") {
		if err := s.root.Remove(name); err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
	} else if _, err := s.root.Lstat(name); err == nil {
		return nil // the name is another installer's
	}
	err = s.root.Rename(path.Join(ownFolder, "adopted", name), name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore %s: %w", name, err)
	}
	return nil
}

// withdraw restores the install folder's content from before this program.
func (s *Store) withdraw() error {
	for _, name := range names {
		if err := s.hide(name); err != nil {
			return err
		}
	}
	if err := s.hideCache(); err != nil {
		return err
	}
	return s.sync()
}

// cacheFile is the file in which Google's installer notes what it installed. This program writes it, too, and keeps its
// own contents in savedCache to recognise them.
const (
	cacheFile  = ".cache"
	savedCache = ownFolder + "/cache"
)

// hideCache removes cacheFile if this program wrote it, and restores the file of the other installer.
func (s *Store) hideCache() error {
	ours, err := s.caches()
	if err != nil {
		return err
	}
	have, err := s.ReadFile(cacheFile)
	if err != nil {
		return err
	}
	if have != nil && slices.Contains(ours, string(have)) {
		if err := s.root.Remove(cacheFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove %s: %w", cacheFile, err)
		}
		have = nil
	}
	if have == nil {
		if err := s.root.Rename(path.Join(ownFolder, "adopted", cacheFile), cacheFile); err != nil &&
			!errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("restore %s: %w", cacheFile, err)
		}
	}
	return s.RemoveFile(savedCache)
}

// caches returns the contents that this program wrote into cacheFile, the newest last.
func (s *Store) caches() (ours []string, err error) {
	raw, err := s.ReadFile(savedCache)
	if err != nil || raw == nil {
		return nil, err
	}
	if json.Unmarshal(raw, &ours) != nil {
		return nil, nil // if the list is damaged, every content counts as another installer's
	}
	return ours, nil
}

// removed is the name of ownFolder during its removal.
const removed = ".prebake-removed"
