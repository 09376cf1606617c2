package install

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/bundle"
)

// HasLayer reports whether a layer is already unpacked.
func (s *Store) HasLayer(digest string) bool {
	name, err := hexOf(digest)
	if err != nil {
		return false
	}
	info, err := s.root.Lstat(path.Join(ownFolder, "layers", name))
	return err == nil && info.IsDir()
}

// AddLayer lets fill write a layer into a new folder, and renames the folder to its final name. After an error, nothing
// remains. AddLayer keeps files that other programs added to an existing layer, because installers of NCCL plugins
// write into lib64.
func (s *Store) AddLayer(l Layer, fill func(dst *os.Root) error) error {
	name, err := hexOf(l.Digest)
	if err != nil {
		return err
	}
	return s.add(path.Join("layers", name), func(dst *os.Root) error {
		if err := fill(dst); err != nil {
			return err
		}
		names, err := bundle.Names(dst, l.Kind)
		if err != nil {
			return err
		}
		raw, err := json.Marshal(names)
		if err != nil {
			return err
		}
		if err := dst.WriteFile(namesFile, raw, 0o644); err != nil {
			return err
		}
		return s.keepAdded(l, dst, names)
	})
}

// namesFile lists the files that were unpacked into a layer. Other files there are from other programs. The list is not
// trusted.
const namesFile = ".prebake-names"

// maxNames is the maximum size of namesFile in bytes.
const maxNames = 16 << 20

// LayerPrint returns a digest over all inodes of an unpacked layer: names, numbers, sizes, modes and times of change.
// Any write changes it.
func (s *Store) LayerPrint(digest string) (string, error) {
	name, err := hexOf(digest)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	err = fs.WalkDir(s.root.FS(), path.Join(ownFolder, "layers", name), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return errors.New("this filesystem reports no inodes")
		}
		fmt.Fprintf(h, "%q %d %d %d %o %d.%d\n", p, st.Dev, st.Ino, st.Size, st.Mode, st.Ctim.Sec, st.Ctim.Nsec)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("read the metadata of a layer's files: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// LayerNames returns the files that were unpacked into a layer. It returns nil if they are not known, as in layers of
// older releases.
func (s *Store) LayerNames(digest string) ([]string, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	raw, err := s.readFile(path.Join(ownFolder, "layers", name, namesFile), maxNames)
	var names []string
	if err != nil || raw == nil || json.Unmarshal(raw, &names) != nil {
		return nil, nil // callers then treat all files in the folder as the layer's
	}
	return names, nil
}

// addedFiles returns the files of an unpacked layer that are not among the given names.
func (s *Store) addedFiles(digest string, names []string) []string {
	name, err := hexOf(digest)
	if err != nil {
		return nil
	}
	known := map[string]bool{namesFile: true}
	for _, n := range names {
		known[n] = true
	}
	var added []string
	at := path.Join(ownFolder, "layers", name)
	// Ignore files that cannot be read, because they cannot be kept either.
	_ = fs.WalkDir(s.root.FS(), at, func(p string, d fs.DirEntry, err error) error {
		if rel := strings.TrimPrefix(p, at+"/"); err == nil && p != at && !d.IsDir() && !known[rel] {
			added = append(added, rel)
		}
		return nil
	})
	return added
}

// keepAdded links other programs' files into a new user-space layer. It finds these files in the existing layer with
// the same digest, and in the active driver.
func (s *Store) keepAdded(l Layer, dst *os.Root, names []string) error {
	if l.Kind != bundle.LayerUserspace {
		return nil
	}
	from := map[string][]string{l.Digest: names}
	if set, err := s.Current(); err == nil && set != nil {
		for _, old := range set.Layers {
			if ours, err := s.LayerNames(old.Digest); old.Kind == l.Kind && old.Digest != l.Digest && err == nil && ours != nil {
				from[old.Digest] = ours
			}
		}
	}
	for digest, ours := range from {
		hex, err := hexOf(digest)
		if err != nil {
			return err
		}
		for _, file := range s.addedFiles(digest, ours) {
			if err := s.linkOrCopy(path.Join(ownFolder, "layers", hex, file), file, dst); err != nil {
				return err
			}
		}
	}
	return nil
}

// Other programs may have put files into the folder lib64. Before lib64 is put aside, keepForeign links these files
// into the active driver's user-space layer: installers of NCCL plugins copy their files only once. A file that is part
// of a driver stays behind, because the dynamic loader may prefer it to the active driver's file.
func (s *Store) keepForeign() error {
	set, err := s.Current()
	if err != nil || set == nil {
		return err
	}
	i := slices.IndexFunc(set.Layers, func(l Layer) bool { return l.Kind == bundle.LayerUserspace })
	if info, err := s.root.Lstat("lib64"); i < 0 || err != nil || !info.IsDir() {
		return nil
	}
	ours, err := s.LayerNames(set.Layers[i].Digest)
	if err != nil || ours == nil { // in a layer of an older release, an added file would count as damage
		return err
	}
	shipped := map[string]bool{}
	for _, name := range ours {
		shipped[stem(name)] = true
	}
	dst, err := s.LayerRoot(set.Layers[i].Digest)
	if err != nil {
		return err
	}
	defer dst.Close()
	return fs.WalkDir(s.root.FS(), "lib64", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || shipped[stem(file)] || stem(file) == "libcuda" ||
			strings.Contains(path.Base(file), "nvidia") {
			return nil // ignore files that cannot be read, because they cannot be kept either
		}
		return s.linkOrCopy(file, file, dst)
	})
}

// stem returns the name of a library without its version: libcuda for lib64/libcuda.so.535.261.03.
func stem(file string) string {
	stem, _, _ := strings.Cut(path.Base(file), ".so")
	return stem
}

// linkOrCopy gives a file of the install folder a name in another folder, if that name is free. It copies links and
// hard-links regular files.
func (s *Store) linkOrCopy(from, file string, dst *os.Root) error {
	err := s.linkOrCopyOnce(from, file, dst)
	if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("copy the file %s of another installer: %w", file, err)
	}
	return nil
}

func (s *Store) linkOrCopyOnce(from, file string, dst *os.Root) error {
	info, err := s.root.Lstat(from)
	if err != nil {
		return err
	}
	if err := dst.MkdirAll(path.Dir(file), 0o755); err != nil {
		return err
	}
	switch info.Mode().Type() {
	case fs.ModeSymlink:
		to, err := s.root.Readlink(from)
		if err != nil {
			return err
		}
		return dst.Symlink(to, file)
	case 0:
		return s.hardLink(from, dst, file)
	}
	return nil // installers make no pipes or devices, so these are dropped
}

// hardLink gives a file a second name below another folder of the same file system.
func (s *Store) hardLink(from string, dst *os.Root, to string) error {
	a, err := s.root.Open(path.Dir(from))
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := dst.Open(path.Dir(to))
	if err != nil {
		return err
	}
	defer b.Close()
	return unix.Linkat(int(a.Fd()), path.Base(from), int(b.Fd()), path.Base(to), 0)
}

// LayerRoot opens an unpacked layer.
func (s *Store) LayerRoot(digest string) (*os.Root, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	root, err := s.root.OpenRoot(path.Join(ownFolder, "layers", name))
	if err != nil {
		return nil, fmt.Errorf("open an unpacked layer of the driver: %w", err)
	}
	return root, nil
}

// LayerFS returns the files of an unpacked layer.
func (s *Store) LayerFS(digest string) (fs.FS, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	return fs.Sub(s.root.FS(), path.Join(ownFolder, "layers", name))
}
