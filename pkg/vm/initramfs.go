package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

// folders are the folders that every guest has, in addition to the parent folders of its files.
var folders = []string{"/dev", "/proc", "/sys", "/tmp", "/run", "/root", "/etc"}

// Tree returns a [File] for every regular file, link and folder below dir. In the guest, these files are below the
// folder with the path in name.
func Tree(name, dir string) ([]File, error) {
	var files []File
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		f := File{Name: path.Join(name, filepath.ToSlash(rel))}
		switch kind := d.Type(); {
		case kind.IsDir():
		case kind.IsRegular():
			f.Path = p
		case kind&fs.ModeSymlink != 0:
			if f.Link, err = os.Readlink(p); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s has file type %v; want a file, a link or a folder", p, kind)
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list %s for the guest: %w", dir, err)
	}
	return files, nil
}

// writeInitramfs writes the guest's whole root as a cpio archive. It does not compress, because decompressing is slow
// under emulation. The same config gives the same bytes.
func writeInitramfs(w io.Writer, c Config) error {
	files, err := guestFiles(c)
	if err != nil {
		return err
	}
	files, err = arrangeFiles(files)
	if err != nil {
		return err
	}
	out := cpio.Newc.Writer(w)
	for i, f := range files {
		if err := writeFile(out, f, uint64(i+1)); err != nil {
			return fmt.Errorf("write %s into the initramfs: %w", f.Name, err)
		}
	}
	// The kernel opens /dev/console for process 1 before /dev is mounted.
	console := cpio.CharDev("dev/console", 0o600, 5, 1)
	console.Ino, console.NLink = uint64(len(files)+1), 1
	if err := out.WriteRecord(console); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	if err := out.WriteRecord(cpio.TrailerRecord); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

// guestFiles returns the files that every machine needs, and the caller's files.
func guestFiles(c Config) ([]File, error) {
	script, err := json.Marshal(c.script())
	if err != nil {
		return nil, fmt.Errorf("write the guest's script: %w", err)
	}
	files := []File{
		{Name: "/init", Mode: 0o755, Path: c.Init},
		{Name: wire.ScriptPath, Data: script},
	}
	for _, name := range folders {
		files = append(files, File{Name: name})
	}
	if c.GPU {
		files = append(files, File{Name: wire.GPUModule, Path: filepath.Join(c.Boot, BootGPU)})
	}
	modules := filepath.Join(c.Boot, BootModules)
	if _, err := os.Stat(modules); err == nil {
		tree, err := Tree(wire.ModulesDir, modules)
		if err != nil {
			return nil, err
		}
		files = append(files, tree...)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the folder with the machine's boot files: %w", err)
	}
	return append(files, c.Files...), nil
}

// arrangeFiles checks the names, adds missing folders, and sorts every folder before its content.
func arrangeFiles(files []File) ([]File, error) {
	byName := map[string]File{}
	var errs []error
	for _, f := range files {
		if !path.IsAbs(f.Name) || path.Clean(f.Name) != f.Name || strings.ContainsRune(f.Name, 0) {
			errs = append(errs, fmt.Errorf("guest file %q: want a clean absolute path", f.Name))
			continue
		}
		if f.Name == "/" || f.Name == "/dev/console" {
			continue
		}
		if old, ok := byName[f.Name]; ok && !(old.isFolder() && f.isFolder()) {
			errs = append(errs, fmt.Errorf("guest file %q is given twice", f.Name))
			continue
		}
		byName[f.Name] = f
	}
	for _, f := range files {
		for dir := path.Dir(f.Name); path.IsAbs(dir) && dir != "/"; dir = path.Dir(dir) {
			above, ok := byName[dir]
			if !ok {
				byName[dir] = File{Name: dir}
			} else if !above.isFolder() && above.Link == "" {
				errs = append(errs, fmt.Errorf("guest file %q: %s is not a folder", f.Name, dir))
			} else if above.Link != "" {
				errs = append(errs, fmt.Errorf("guest file %q: %s is a link; give the path without the link", f.Name, dir))
			}
		}
	}
	if len(errs) > 0 {
		return nil, fault.Wrap(fault.Usage, errors.Join(errs...), "")
	}
	all := make([]File, 0, len(byName))
	for _, f := range byName {
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func (f File) isFolder() bool { return f.Path == "" && f.Data == nil && f.Link == "" }

func (f File) perm(fallback fs.FileMode) uint64 {
	if f.Mode != 0 {
		fallback = f.Mode
	}
	return uint64(fallback.Perm())
}

func writeFile(out cpio.RecordWriter, f File, ino uint64) error {
	name := strings.TrimPrefix(f.Name, "/")
	info := cpio.Info{Ino: ino, NLink: 1, Name: name}
	switch {
	case f.Link != "":
		info.Mode, info.FileSize = cpio.S_IFLNK|0o777, uint64(len(f.Link))
		return out.WriteRecord(cpio.Record{ReaderAt: strings.NewReader(f.Link), Info: info})
	case f.Path != "":
		return copyFile(out, f, info)
	case f.Data != nil:
		info.Mode, info.FileSize = cpio.S_IFREG|f.perm(0o644), uint64(len(f.Data))
		return out.WriteRecord(cpio.Record{ReaderAt: bytes.NewReader(f.Data), Info: info})
	}
	info.Mode = cpio.S_IFDIR | f.perm(0o755)
	return out.WriteRecord(cpio.Record{Info: info})
}

func copyFile(out cpio.RecordWriter, f File, info cpio.Info) (err error) {
	in, err := os.Open(f.Path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s has file type %v; want a regular file", f.Path, st.Mode().Type())
	}
	mode := fs.FileMode(0o644)
	if st.Mode()&0o111 != 0 {
		mode = 0o755
	}
	info.Mode, info.FileSize = cpio.S_IFREG|f.perm(mode), uint64(st.Size())
	return out.WriteRecord(cpio.Record{ReaderAt: io.NewSectionReader(in, 0, st.Size()), Info: info})
}
