// Package noderoot gives access to a node's file system, which is mounted in this program's container. Absolute links
// are followed from the node's root. The package never leaves that root, even if links change meanwhile.
package noderoot

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	securejoin "github.com/cyphar/filepath-securejoin"
)

// Root is a node's root folder.
type Root struct {
	dir  string
	root *os.Root
}

// Open opens the folder where a node's root is mounted. "/" means the machine on which this program runs.
func Open(dir string) (*Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Root{dir: filepath.Clean(dir), root: root}, nil
}

// Close closes the folder.
func (r *Root) Close() error { return r.root.Close() }

// Dir returns the folder where the node's root is mounted, for chroot.
func (r *Root) Dir() string { return r.dir }

// Path returns the path of a node's file or folder in this program's root, for child processes. It has no links, so a
// link that changes later has no effect.
func (r *Root) Path(name string) (string, error) {
	at, err := r.follow(name)
	return filepath.Join(r.dir, at), err
}

// Folder opens a folder of the node.
func (r *Root) Folder(name string) (*os.Root, error) { return callWith(r, name, r.root.OpenRoot) }

// MakeFolder makes a folder and its missing parents.
func (r *Root) MakeFolder(name string, mode fs.FileMode) error {
	at, err := r.follow(name)
	if err != nil {
		return err
	}
	return r.root.MkdirAll(at, mode)
}

// Exists reports whether a file of that name exists. It follows links.
func (r *Root) Exists(name string) bool {
	_, err := callWith(r, name, r.root.Stat)
	return err == nil
}

// OpenFile opens or makes a file as [os.OpenFile] does.
func (r *Root) OpenFile(name string, flag int, mode fs.FileMode) (*os.File, error) {
	return callWith(r, name, func(at string) (*os.File, error) { return r.root.OpenFile(at, flag, mode) })
}

// Lstat examines a name itself, without following a link.
func (r *Root) Lstat(name string) (fs.FileInfo, error) { return inParent(r, name, r.root.Lstat) }

// Set writes an existing file, such as a parameter of the kernel.
func (r *Root) Set(name string, value []byte) error {
	f, err := r.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	return errors.Join(err, f.Close())
}

// FS returns a read-only view of the node's files.
func (r *Root) FS() fs.FS { return files{r} }

// clean converts a name of the node to a relative path below the root.
func clean(name string) string { return path.Join(".", path.Clean("/" + name)[1:]) }

// follow returns the path to which a name leads when all links are followed, relative to the root. The file need not
// exist.
func (r *Root) follow(name string) (string, error) {
	at, err := securejoin.SecureJoinVFS("", name, links{r.root})
	if err != nil {
		return "", err
	}
	return clean(at), nil
}

// links implements the file system interface of [securejoin].
type links struct{ root *os.Root }

func (l links) Lstat(name string) (fs.FileInfo, error) { return l.root.Lstat(clean(name)) }
func (l links) Readlink(name string) (string, error)   { return l.root.Readlink(clean(name)) }

// callWith calls a function with the name of a node's file. After a failure, for example on an absolute link, it
// follows all links itself and tries again.
func callWith[T any](r *Root, name string, do func(string) (T, error)) (T, error) {
	name = clean(name)
	v, err := do(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return v, err
	}
	at, ferr := r.follow(name)
	if ferr != nil || at == name {
		return v, err
	}
	return do(at)
}

// inParent works as callWith does, but follows links in the parent folders only, and not a link in the last name.
func inParent[T any](r *Root, name string, do func(string) (T, error)) (T, error) {
	name = clean(name)
	return callWith(r, path.Dir(name), func(dir string) (T, error) { return do(path.Join(dir, path.Base(name))) })
}

// files is an [fs.FS] that follows links as the node does.
type files struct{ r *Root }

func (f files) Open(name string) (fs.File, error) {
	file, err := callWith(f.r, name, f.r.root.Open)
	if err != nil {
		return nil, err // a nil *os.File in an interface would not equal nil
	}
	return file, nil
}

func (f files) Stat(name string) (fs.FileInfo, error)  { return callWith(f.r, name, f.r.root.Stat) }
func (f files) Lstat(name string) (fs.FileInfo, error) { return f.r.Lstat(name) }
func (f files) ReadFile(name string) ([]byte, error)   { return callWith(f.r, name, f.r.root.ReadFile) }

func (f files) ReadLink(name string) (string, error) { return inParent(f.r, name, f.r.root.Readlink) }

func (f files) ReadDir(name string) ([]fs.DirEntry, error) {
	return callWith(f.r, name, func(at string) ([]fs.DirEntry, error) { return fs.ReadDir(f.r.root.FS(), at) })
}

var _ interface {
	fs.ReadDirFS
	fs.ReadFileFS
	fs.ReadLinkFS
	fs.StatFS
} = files{}
