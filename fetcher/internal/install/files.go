package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
)

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

// Sweep removes the leftovers of interrupted runs, and all sets and layers that are not needed. It keeps the current
// set, the previous set, their layers, and what extra names: each digest is that of a set, which stays with its layers,
// or of a layer. Sweep renames a folder before it removes it, because a final name must never have incomplete content.
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
		if to == "" {
			continue
		}
		set, err := s.readSet(to)
		if err != nil {
			return err
		}
		if set == nil { // removed just now
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
			return fmt.Errorf("copy the file %s, which another installer wrote: %w", cacheFile, err)
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

// WriteFile replaces a small file of the install folder atomically. Goroutines may call it at the same time; other
// stores of the same folder must not, because the temporary name is the same.
func (s *Store) WriteFile(name string, data []byte) error {
	s.files.Lock()
	defer s.files.Unlock()
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

// Reserve prepares a small file for [Store.WriteReserved] with this size in bytes: it makes a second file, the spare,
// whose space the next content takes. A missing file gets the given content; nil means that it stays missing.
func (s *Store) Reserve(name string, content []byte, size int) error {
	have, err := s.ReadFile(name)
	if err != nil {
		return err
	}
	if have == nil {
		have = content
	}
	if have != nil && len(have) < size { // this file becomes the next spare
		if err := s.WriteFile(name, padded(have, size)); err != nil {
			return err
		}
	}
	spare := spareOf(name)
	if info, err := s.root.Lstat(spare); err == nil && info.Mode().IsRegular() && info.Size() >= int64(size) {
		return nil
	}
	return s.WriteFile(spare, padded(nil, size))
}

// WriteReserved replaces a small file atomically, as WriteFile does. If [Store.Reserve] was called before with this
// size, and the content is not larger, a full disk is no obstacle: the content goes to the spare, which then changes
// names with the file. The file may end with spaces.
func (s *Store) WriteReserved(name string, data []byte, size int) error {
	if len(data) > size || s.exchangeSpare(name, padded(data, size)) != nil {
		return s.WriteFile(name, data)
	}
	spare := spareOf(name)
	if _, err := s.root.Lstat(spare); errors.Is(err, fs.ErrNotExist) { // it became the file (see exchangeSpare)
		_ = s.WriteFile(spare, padded(nil, size)) // if the disk is full, the next Reserve tries again
	}
	return nil
}

// padded returns a text with spaces at its end, so that it has the given size.
func padded(text []byte, size int) []byte {
	return slices.Concat(text, bytes.Repeat([]byte{' '}, max(0, size-len(text))))
}

func spareOf(name string) string { return name + ".spare" }

// exchangeSpare writes the spare of a file and then lets both change their names. A crash leaves the former or the new
// content under the file's name.
func (s *Store) exchangeSpare(name string, data []byte) error {
	s.files.Lock()
	defer s.files.Unlock()
	spare := spareOf(name)
	if info, err := s.root.Lstat(spare); err != nil || !info.Mode().IsRegular() || info.Size() < int64(len(data)) {
		return errors.Join(err, fs.ErrInvalid)
	}
	f, err := s.root.OpenFile(spare, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err = errors.Join(err, f.Truncate(int64(len(data))), f.Sync(), f.Close()); err != nil {
		return err
	}
	if _, err := s.root.Lstat(name); err == nil {
		err = s.exchange(spare, name)
		if err == nil {
			return s.syncFolder(path.Dir(name))
		}
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
			return err
		}
	}
	if err := s.root.Rename(spare, name); err != nil { // the file system cannot exchange names, or there is no file
		return err
	}
	return s.syncFolder(path.Dir(name))
}

func (s *Store) syncFolder(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
