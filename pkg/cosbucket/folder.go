package cosbucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/prebake/prebake/pkg/fault"
)

// folder is a bucket in a local folder. os.Root ensures that names and symbolic links do not lead out of it.
type folder struct {
	dir  string
	root *os.Root
}

func openFolder(u *url.URL) (*folder, error) {
	if u.Host != "" && u.Host != "localhost" || !filepath.IsAbs(u.Path) {
		return nil, fault.New(fault.Usage, "want an absolute path after file://", "write file:///FOLDER")
	}
	root, err := os.OpenRoot(filepath.Clean(u.Path))
	if err != nil {
		return nil, missing(err)
	}
	return &folder{filepath.Clean(u.Path), root}, nil
}

func (f *folder) open(_ context.Context, name string, offset int64, _ string) (io.ReadCloser, Attrs, error) {
	info, err := f.root.Stat(name)
	if err != nil {
		return nil, Attrs{}, fileError(err)
	}
	if !info.Mode().IsRegular() {
		return nil, Attrs{}, missing(fmt.Errorf("%s is not a regular file", name))
	}
	r, err := f.root.Open(name)
	if err != nil {
		return nil, Attrs{}, fileError(err)
	}
	if _, err := r.Seek(offset, io.SeekStart); err != nil {
		return nil, Attrs{}, errors.Join(err, r.Close())
	}
	return r, Attrs{Size: info.Size()}, nil
}

// fileError adds a fault kind to an error of opening a file. A file that cannot be opened does not count as missing:
// otherwise an unreadable checksum file would be skipped.
func fileError(err error) error {
	var errno syscall.Errno
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fault.Wrap(fault.Usage, err, "let this user read the bucket's folder")
	case errors.As(err, &errno) && errno != syscall.ENOENT && errno != syscall.ENOTDIR:
		return err
	}
	return missing(err)
}

func (f *folder) list(ctx context.Context, prefix string) ([]string, error) {
	start := "."
	if i := strings.LastIndexByte(prefix, '/'); i > 0 {
		start = prefix[:i]
	}
	var names []string
	err := fs.WalkDir(f.root.FS(), start, func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && name == start:
			return fs.SkipAll
		case err != nil:
			return err
		case d.IsDir():
			return ctx.Err()
		case len(names) == maxListed:
			return tooMany()
		}
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
		return nil
	})
	return names, err
}

func (f *folder) folders(context.Context) ([]string, error) {
	entries, err := fs.ReadDir(f.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (f *folder) sibling(_ context.Context, bucket string) (backend, error) {
	return openFolder(&url.URL{Scheme: "file", Path: filepath.Join(filepath.Dir(f.dir), bucket)})
}

func (f *folder) url(name string) string {
	u := url.URL{Scheme: "file", Path: path.Join(filepath.ToSlash(f.dir), name)}
	return u.String()
}

func (f *folder) close() error { return f.root.Close() }
