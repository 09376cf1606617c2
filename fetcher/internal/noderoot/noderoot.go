// Package noderoot is the one handle on a node's file system, which is mounted somewhere
// in the container that this program runs in. It names files as the node does, and follows
// links as the node does: one that is absolute begins at the node's root. It refuses to
// leave that root, whatever a link says and whoever changes it meanwhile.
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

// Open opens the folder where a node's root is mounted; "/" is the node that this program
// runs on.
func Open(dir string) (*Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Root{dir: filepath.Clean(dir), root: root}, nil
}

// Close releases the folder.
func (r *Root) Close() error { return r.root.Close() }

// Dir is the folder where the node's root is mounted, for a change of root.
func (r *Root) Dir() string { return r.dir }

// Path returns what a file or folder of the node is called on this side, for programs that
// this one starts here. Links in it are followed now, and not again.
func (r *Root) Path(name string) (string, error) {
	at, err := r.follow(name)
	return filepath.Join(r.dir, at), err
}

// Folder opens a folder of the node.
func (r *Root) Folder(name string) (*os.Root, error) { return through(r, name, r.root.OpenRoot) }

// MakeFolder makes a folder, and those above it, where it is missing.
func (r *Root) MakeFolder(name string, mode fs.FileMode) error {
	at, err := r.follow(name)
	if err != nil {
		return err
	}
	return r.root.MkdirAll(at, mode)
}

// Exists reports whether there is something of that name, at the end of any links.
func (r *Root) Exists(name string) bool {
	_, err := through(r, name, r.root.Stat)
	return err == nil
}

// OpenFile opens or makes a file as [os.OpenFile] does.
func (r *Root) OpenFile(name string, flag int, mode fs.FileMode) (*os.File, error) {
	return through(r, name, func(at string) (*os.File, error) { return r.root.OpenFile(at, flag, mode) })
}

// Lstat examines a name and not at what it leads to.
func (r *Root) Lstat(name string) (fs.FileInfo, error) { return inParent(r, name, r.root.Lstat) }

// Set writes a file that is there, such as a parameter of the kernel.
func (r *Root) Set(name string, value []byte) error {
	f, err := r.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	return errors.Join(err, f.Close())
}

// FS are the node's files, to be read.
func (r *Root) FS() fs.FS { return files{r} }

// clean makes a name of the node one below the root.
func clean(name string) string { return path.Join(".", path.Clean("/" + name)[1:]) }

// follow returns the name at the end of all links, below the root. What does not exist is
// named all the same.
func (r *Root) follow(name string) (string, error) {
	at, err := securejoin.SecureJoinVFS("", name, links{r.root})
	if err != nil {
		return "", err
	}
	return clean(at), nil
}

// links are what [securejoin] asks about.
type links struct{ root *os.Root }

func (l links) Lstat(name string) (fs.FileInfo, error) { return l.root.Lstat(clean(name)) }
func (l links) Readlink(name string) (string, error)   { return l.root.Readlink(clean(name)) }

// through does something with a name, and where that does not lead there, as over an
// absolute link, with the name at the end of all links. The [os.Root] holds either below
// the node's root.
func through[T any](r *Root, name string, do func(string) (T, error)) (T, error) {
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

// inParent does something with a name whose last part is not followed.
func inParent[T any](r *Root, name string, do func(string) (T, error)) (T, error) {
	name = clean(name)
	return through(r, path.Dir(name), func(dir string) (T, error) { return do(path.Join(dir, path.Base(name))) })
}

// files is a [fs.FS] that follows links as the node does.
type files struct{ r *Root }

func (f files) Open(name string) (fs.File, error) {
	file, err := through(f.r, name, f.r.root.Open)
	if err != nil {
		return nil, err // not a nil pointer in an interface
	}
	return file, nil
}

func (f files) Stat(name string) (fs.FileInfo, error)  { return through(f.r, name, f.r.root.Stat) }
func (f files) Lstat(name string) (fs.FileInfo, error) { return f.r.Lstat(name) }
func (f files) ReadFile(name string) ([]byte, error)   { return through(f.r, name, f.r.root.ReadFile) }

func (f files) ReadLink(name string) (string, error) { return inParent(f.r, name, f.r.root.Readlink) }

func (f files) ReadDir(name string) ([]fs.DirEntry, error) {
	return through(f.r, name, func(at string) ([]fs.DirEntry, error) { return fs.ReadDir(f.r.root.FS(), at) })
}

var _ interface {
	fs.ReadDirFS
	fs.ReadFileFS
	fs.ReadLinkFS
	fs.StatFS
} = files{}
