package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
)

// Switch activates a set. One rename of "current" moves all names at once. The active set becomes the previous one. A
// folder that somebody copied to the place of a pointer is kept in the folder adopted.
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
	case s.copied(previous) != "":
		err = s.point(previous, s.copied(previous))
	default:
		err = s.removePointer("previous")
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
// a killed run must leave no link without a target.
func (s *Store) Restore(before Pointers) error {
	if before.Current == "" {
		if err := s.withdraw(); err != nil {
			return err
		}
	}
	for _, p := range []struct{ name, to string }{{"previous", before.Previous}, {"current", before.Current}} {
		if p.to == "" {
			if err := s.removePointer(p.name); err != nil {
				return err
			}
		} else if err := s.point(path.Join(ownFolder, p.name), p.to); err != nil {
			return err
		}
	}
	if before.Current == "" {
		return s.sync()
	}
	return s.expose()
}

// Recover completes a deactivation that was killed: it removes dangling top-level links, and restores what another
// installer had.
func (s *Store) Recover() error {
	if err := s.root.RemoveAll(removed); err != nil {
		return fmt.Errorf("remove the folder %s: %w", removed, err)
	}
	set, err := s.Current()
	if err != nil || set != nil {
		return err
	}
	return s.withdraw()
}

// Pointers has the current and the previous set as paths below ownFolder, or "".
type Pointers struct {
	Current  string `json:"current,omitempty"`
	Previous string `json:"previous,omitempty"`
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
	p.Previous, err = s.link("previous")
	return p, err
}

// link reads the pointer current or previous. It returns "" if the pointer does not exist. Somebody may have copied the
// install folder without its links, so a folder has a pointer's name. It then counts as a link to the set that it is a
// copy of, or else as no pointer.
func (s *Store) link(name string) (string, error) {
	at := path.Join(ownFolder, name)
	to, err := s.root.Readlink(at)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		if s.isOther(at) {
			return s.copied(at), nil
		}
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return to, nil
}

// copied returns the pointer to the set of which this folder is a copy, or "" if the set is not on the disk.
func (s *Store) copied(folder string) string {
	raw, err := s.readFile(path.Join(folder, "set.json"), maxSet)
	var set Set
	if err != nil || json.Unmarshal(raw, &set) != nil {
		return ""
	}
	name, err := hexOf(set.Digest)
	if err != nil {
		return ""
	}
	to := path.Join("sets", name)
	if _, err := s.root.Stat(path.Join(ownFolder, to, "set.json")); err != nil {
		return ""
	}
	return to
}

// NotLinks returns the pointers whose names a folder or a file has (see [Store.Switch]).
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
		if err := s.swap(name, to, s.asideOf(name)); err != nil {
			return fmt.Errorf("put %s aside, which is no link: %w", name, err)
		}
		return nil
	}
	tmp := path.Join(ownFolder, "tmp-link")
	if err := s.root.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("clear staging link: %w", err)
	}
	if err := s.root.Symlink(to, tmp); err != nil {
		return diskFault(fmt.Errorf("make link: %w", err))
	}
	if err := s.root.Rename(tmp, name); err != nil {
		return fmt.Errorf("make the link %s: %w", name, err)
	}
	return nil
}

// removePointer removes a pointer. A file or a folder that has its name is put aside.
func (s *Store) removePointer(name string) (err error) {
	if at := path.Join(ownFolder, name); s.isOther(at) {
		err = s.root.Rename(at, s.asideOf(at))
	} else {
		err = s.root.Remove(at)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore %s: %w", name, err)
	}
	return nil
}

// asideOf returns a free name for what has the name of a pointer: adopted/<name>, or adopted/<name>-2 and so on.
func (s *Store) asideOf(name string) string {
	first := path.Join(ownFolder, "adopted", path.Base(name))
	aside := first
	for i := 2; ; i++ {
		if _, err := s.root.Lstat(aside); err != nil { // the caller finds other errors than that there is none
			return aside
		}
		aside = fmt.Sprintf("%s-%d", first, i)
	}
}

// swap makes a link at a name, and renames what has this name to the free name aside, in one step if the file system
// can.
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
		return fmt.Errorf("clear %s: %w", aside, err)
	}
	err := s.swap(name, to, aside)
	if errors.Is(err, unix.EBUSY) {
		return fault.Wrap(fault.Busy, fmt.Errorf("adopt %s: %w", name, err),
			"stop the other installer that has mounted something at or below this folder")
	}
	if err != nil {
		return fmt.Errorf("adopt %s: %w", name, err)
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

// Exists reports whether ownFolder is in the install folder.
func (s *Store) Exists() bool {
	_, err := s.root.Lstat(ownFolder)
	return err == nil
}

// Remove removes all files of this program from the install folder, and restores what another installer had. A killed
// call can be repeated.
func (s *Store) Remove() error {
	if _, err := s.root.Lstat(ownFolder); err == nil {
		if err := s.Restore(Pointers{}); err != nil {
			return err
		}
		if err := s.root.RemoveAll(removed); err != nil { // left by a run that was killed
			return fmt.Errorf("remove the folder %s: %w", removed, err)
		}
		if err := s.root.Rename(ownFolder, removed); err != nil {
			return fmt.Errorf("remove the folder %s: %w", ownFolder, err)
		}
	}
	if err := s.flush("."); err != nil { // otherwise a power cut might bring back the removed folder, or a part of it
		return err
	}
	if err := s.root.RemoveAll(removed); err != nil {
		return fmt.Errorf("remove the folder %s: %w", removed, err)
	}
	return s.flush(".")
}

// Sweep removes the leftovers of interrupted runs, and all sets and layers except those of the current, the previous
// and the given sets. It also keeps given layers. It first renames each folder: a final name must never have incomplete
// content.
func (s *Store) Sweep(extra ...string) error {
	keep := map[string]bool{}
	layersKnown := true
	for _, digest := range extra {
		if name, err := hexOf(digest); err == nil {
			keep[path.Join("layers", name)] = true
		}
		set, err := s.Set(digest)
		if err != nil || set == nil {
			continue
		}
		keep[path.Join("sets", strings.TrimPrefix(digest, "sha256:"))] = true
		for _, l := range set.Layers {
			if name, err := hexOf(l.Digest); err == nil {
				keep[path.Join("layers", name)] = true
			}
		}
	}
	for _, pointer := range []string{"current", "previous"} {
		to, err := s.link(pointer)
		if err != nil {
			return err
		}
		set, err := s.readSet(pointer)
		if err != nil {
			return err
		}
		if set == nil {
			continue
		}
		keep[to] = true
		layersKnown = layersKnown && !set.Damaged
		for _, l := range set.Layers {
			if name, err := hexOf(l.Digest); err == nil {
				keep[path.Join("layers", name)] = true
			}
		}
	}
	for _, dir := range []string{"layers", "sets", "."} {
		if dir == "layers" && !layersKnown {
			continue // the layers that a damaged set needs are not known
		}
		d, err := s.root.Open(path.Join(ownFolder, dir))
		if err != nil {
			return fmt.Errorf("delete unused drivers: %w", err)
		}
		entries, err := d.ReadDir(-1)
		if err := errors.Join(err, d.Close()); err != nil {
			return fmt.Errorf("delete unused drivers: %w", err)
		}
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			if keep[name] || (dir == "." && !strings.HasPrefix(e.Name(), "tmp-")) {
				continue
			}
			gone := path.Join(ownFolder, name)
			if dir != "." {
				gone = path.Join(ownFolder, "tmp-sweep-"+e.Name())
				if err := errors.Join(s.root.RemoveAll(gone), s.root.Rename(path.Join(ownFolder, name), gone)); err != nil {
					return fmt.Errorf("delete unused drivers: %w", err)
				}
			}
			if err := s.root.RemoveAll(gone); err != nil {
				return fmt.Errorf("delete unused drivers: %w", err)
			}
		}
	}
	return nil
}

// WriteCacheFile writes the file in which Google's installer notes what it installed.
func (s *Store) WriteCacheFile(set Set) error {
	values := map[string]string{"BUILD_ID": set.Kernel.BuildID, "DRIVER_VERSION": set.Driver.Version}
	if set.Driver.Flavour == "open" {
		values["KERNEL_OPEN"] = "Y"
	}
	text := []byte(host.FormatKeyValues(values, "BUILD_ID", "DRIVER_VERSION", "KERNEL_OPEN"))
	have, err := s.ReadFile(cacheFile)
	if err != nil {
		return err
	}
	ours, err := s.caches()
	if err != nil {
		return err
	}
	// If this program did not record the file's content, the file is the other installer's. One exception: if the content
	// equals the new text, and no folder of the other installer is adopted, the file counts as this program's own.
	_, theirs := s.root.Lstat(path.Join(ownFolder, "adopted", "lib64"))
	if have != nil && !slices.Contains(ours, string(have)) && (!bytes.Equal(have, text) || theirs == nil) {
		if err := s.root.Rename(cacheFile, path.Join(ownFolder, "adopted", cacheFile)); err != nil {
			return fmt.Errorf("keep the file %s of another installer: %w", cacheFile, err)
		}
		have = nil
	}
	if !slices.Contains(ours, string(text)) { // first record the content, so that the file is recognised as ours
		ours = append(ours, string(text))
		raw, err := json.Marshal(ours[max(0, len(ours)-maxCaches):])
		if err != nil {
			return err
		}
		if err := s.WriteFile(savedCache, raw); err != nil {
			return err
		}
	}
	if bytes.Equal(have, text) {
		return nil // a full disk must not cause an error if the file is already right
	}
	return s.WriteFile(cacheFile, text)
}

// maxCaches is the maximum number of contents in savedCache.
const maxCaches = 64

// RemoveFile removes a small file of the install folder, if it exists.
func (s *Store) RemoveFile(name string) error {
	if err := s.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// ReadFile reads a small file of the install folder. It returns nil if the file does not exist.
func (s *Store) ReadFile(name string) ([]byte, error) { return s.readFile(name, maxSet) }

func (s *Store) readFile(name string, limit int64) (_ []byte, err error) {
	f, err := s.root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fault.New(fault.Unverified, fmt.Sprintf("the file has more than %d bytes", limit),
			"remove the file: fetcher never writes that much")
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data, nil
}

// WriteFile replaces a small file of the install folder atomically.
func (s *Store) WriteFile(name string, data []byte) error {
	tmp := path.Join(ownFolder, "tmp-file")
	err := noderoot.Replace(s.root, name, tmp, data)
	if info, lerr := s.root.Lstat(name); err != nil && lerr == nil && info.IsDir() { // never made by this program
		err = errors.Join(s.root.RemoveAll(name), noderoot.Replace(s.root, name, tmp, data))
	}
	if err != nil {
		return diskFault(fmt.Errorf("write %s: %w", name, err))
	}
	return nil
}
