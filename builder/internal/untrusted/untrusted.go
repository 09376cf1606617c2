// Package untrusted reads files from a folder to which a sandboxed program could write, after that program has ended.
// Everything in that folder is hostile: a name may be a link to a secret of the host, a pipe that never ends, or a file
// of unlimited size. The package returns only regular files below the folder, follows no link, and limits each read.
//
// The package never writes into the folder and returns no path in it. Copy a file to a place that no sandbox can reach
// before you work on it.
package untrusted

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// ErrKind means that a name is not a regular file, or that one of its parents is not a folder.
var ErrKind = errors.New("not a regular file")

// ErrLarge means that the size of a file, or the number of names in a folder, exceeds the limit.
var ErrLarge = errors.New("larger than allowed")

// Limits of Files: the number of names, and the depth of nested folders.
const (
	maxNames = 100_000
	maxDepth = 32
)

// Dir is a folder that a sandboxed program could write to.
type Dir struct{ root *os.Root }

// Open opens the folder. dir must be a folder and not a link to one.
func Open(dir string) (*Dir, error) {
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: ErrKind}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	now, err := root.Lstat(".")
	if err == nil && !os.SameFile(info, now) {
		err = &fs.PathError{Op: "open", Path: dir, Err: ErrKind}
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return &Dir{root}, nil
}

// Close closes the folder.
func (d *Dir) Close() error { return d.root.Close() }

// Open opens the regular file with this slash path. A file of more than max bytes is an error. Open never waits, even
// for a pipe. If the name does not exist, the error is fs.ErrNotExist.
func (d *Dir) Open(name string, max int64) (*os.File, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	for i, c := range name {
		if c != '/' {
			continue
		}
		if info, err := d.root.Lstat(name[:i]); err != nil {
			return nil, err
		} else if !info.IsDir() {
			return nil, &fs.PathError{Op: "open", Path: name, Err: ErrKind}
		}
	}
	info, err := d.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if err := check(name, info, max); err != nil {
		return nil, err
	}
	// The program may have replaced the file since Lstat, so the open file is checked too.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	now, err := f.Stat()
	if err == nil {
		err = check(name, now, max)
	}
	if err == nil && !os.SameFile(info, now) {
		err = &fs.PathError{Op: "open", Path: name, Err: ErrKind}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func check(name string, info fs.FileInfo, max int64) error {
	if !info.Mode().IsRegular() {
		return &fs.PathError{Op: "open", Path: name, Err: ErrKind}
	}
	if info.Size() > max {
		return &fs.PathError{Op: "open", Path: name,
			Err: fmt.Errorf("the file has %d bytes, which is %w", info.Size(), ErrLarge)}
	}
	return nil
}

// Read returns the content of a regular file. A file of more than max bytes is an error.
func (d *Dir) Read(name string, max int64) ([]byte, error) {
	f, err := d.Open(name, max)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, max+1))
	if err == nil && int64(len(text)) > max {
		err = &fs.PathError{Op: "read", Path: name, Err: ErrLarge}
	}
	return text, err
}

// Copy copies a regular file of at most max bytes to a new file of the host with mode 0644. It returns the SHA-256 of
// the copied bytes in hex.
func (d *Dir) Copy(to, name string, max int64) (sum string, err error) {
	in, err := d.Open(name, max)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(in, max+1))
	if err == nil && n > max {
		err = &fs.PathError{Op: "copy", Path: name, Err: ErrLarge}
	}
	return hex.EncodeToString(h.Sum(nil)), err
}

// Files returns the regular files below the folder as sorted slash paths. It skips everything else, such as links.
func (d *Dir) Files() ([]string, error) {
	var files []string
	seen := 0
	var walk func(dir string, depth int) error
	walk = func(dir string, depth int) error {
		f, err := d.root.OpenFile(dir, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			entries, err := f.ReadDir(1024)
			if errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			for _, e := range entries {
				if seen++; seen > maxNames {
					return &fs.PathError{Op: "list", Path: dir, Err: ErrLarge}
				}
				name := path.Join(dir, e.Name())
				switch {
				case e.Type().IsRegular():
					files = append(files, name)
				case !e.IsDir():
				case depth == maxDepth:
					return &fs.PathError{Op: "list", Path: name, Err: ErrLarge}
				default:
					if err := walk(name, depth+1); err != nil {
						return err
					}
				}
			}
		}
	}
	if err := walk(".", 0); err != nil {
		return nil, err
	}
	slices.Sort(files)
	return files, nil
}

// Named returns the regular files directly in the folder whose names end in the suffix.
func (d *Dir) Named(suffix string) ([]string, error) {
	files, err := d.Files()
	return slices.DeleteFunc(files, func(name string) bool {
		return strings.Contains(name, "/") || !strings.HasSuffix(name, suffix)
	}), err
}

// ReadFile reads one file of a folder as [Dir.Read] does.
func ReadFile(dir, name string, max int64) (text []byte, err error) {
	d, err := Open(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Read(filepath.ToSlash(name), max)
}
