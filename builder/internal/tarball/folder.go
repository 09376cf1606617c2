package tarball

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"

	"github.com/prebake/prebake/pkg/fault"
)

// folder is a destination on a disk. A lock file allows one writer at a time, across all processes. Readers need no
// lock, because objects appear only by link and rename.
type folder struct {
	dir   string
	root  *os.Root
	flush func(*os.File) error
}

// lockPause is the time between two attempts to take a lock that another process holds.
const lockPause = 20 * time.Millisecond

// Files of this package in the folder. No object's name begins with a dot.
const (
	ownFolder = ".prebake"
	lockFile  = ownFolder + "/lock"
	// partFile is the object that is being written. A writer may overwrite the file that a killed writer left.
	partFile = ownFolder + "/part"
)

// openFolder opens a folder, and makes it if it does not exist. flush is (*os.File).Sync, except in tests.
func openFolder(u *url.URL, flush func(*os.File) error) (*folder, error) {
	dir, err := folderPath(u)
	if err != nil {
		return nil, err
	}
	if err := makeFolder(filepath.Join(dir, ownFolder), flush); err != nil {
		return nil, onDisk(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, onDisk(err)
	}
	return &folder{dir, root, flush}, nil
}

func folderPath(u *url.URL) (string, error) {
	if u.Host != "" && u.Host != "localhost" || !filepath.IsAbs(u.Path) {
		return "", fault.New(fault.Usage, "want an absolute path after file://", "write file:///FOLDER")
	}
	return filepath.Clean(u.Path), nil
}

// makeFolder makes a folder and its missing parents. It syncs each new folder's parent, so that the names survive a
// crash.
func makeFolder(dir string, flush func(*os.File) error) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	above := filepath.Dir(dir)
	if err := makeFolder(above, flush); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(above)
	if err != nil {
		return err
	}
	return errors.Join(flush(d), d.Close())
}

func (f *folder) stat(_ context.Context, name string) (attrs, bool, error) {
	info, err := f.root.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return attrs{}, false, nil
	case err != nil:
		return attrs{}, false, onDisk(err)
	case !info.Mode().IsRegular():
		return attrs{}, false, fault.Errorf(fault.PublishRefused, "%s is not a regular file", name)
	}
	return attrs{size: info.Size()}, true, nil
}

// open returns the digest of the content as the token, because a file's time depends on a clock.
func (f *folder) open(_ context.Context, name string) (io.ReadCloser, string, error) {
	token, err := f.digest(name)
	if err != nil {
		return nil, "", err
	}
	file, err := f.root.Open(name)
	if err != nil {
		return nil, "", onDisk(err)
	}
	return file, token, nil
}

func (f *folder) digest(name string) (string, error) {
	file, err := f.root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", errAbsent
	}
	if err != nil {
		return "", onDisk(err)
	}
	defer file.Close()
	h := sha256.New()
	if _, err := io.Copy(h, file); err != nil {
		return "", onDisk(err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (f *folder) create(ctx context.Context, u upload) error {
	return f.locked(ctx, func() error {
		if err := f.write(ctx, u); err != nil {
			return err
		}
		err := f.root.Link(partFile, u.name)
		if errors.Is(err, fs.ErrExist) {
			err = errExists
		} else {
			err = onDisk(err)
		}
		return errors.Join(err, f.root.Remove(partFile), f.sync(u.name))
	})
}

func (f *folder) replace(ctx context.Context, u upload, token string) error {
	return f.locked(ctx, func() error {
		if err := f.checkUnchanged(u.name, token); err != nil {
			return err
		}
		if err := f.write(ctx, u); err != nil {
			return err
		}
		if err := f.root.Rename(partFile, u.name); err != nil {
			return onDisk(err)
		}
		return f.sync(u.name)
	})
}

func (f *folder) remove(ctx context.Context, name, token string) error {
	return f.locked(ctx, func() error {
		if err := f.checkUnchanged(name, token); err != nil {
			return err
		}
		if err := f.root.Remove(name); err != nil {
			return onDisk(err)
		}
		return f.sync(name)
	})
}

// checkUnchanged returns errChanged if a file is not in the state of the token any more.
func (f *folder) checkUnchanged(name, token string) error {
	have, err := f.digest(name)
	if err != nil && !errors.Is(err, errAbsent) {
		return err
	}
	if have != token {
		return errChanged
	}
	return nil
}

func (f *folder) locked(ctx context.Context, do func() error) error {
	l := flock.New(filepath.Join(f.dir, lockFile))
	if _, err := l.TryLockContext(ctx, lockPause); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return onDisk(err)
	}
	return errors.Join(do(), l.Unlock())
}

// write writes the object to partFile and syncs that file to the disk.
func (f *folder) write(ctx context.Context, u upload) error {
	if err := f.root.MkdirAll(path.Dir(u.name), 0o755); err != nil {
		return onDisk(err)
	}
	in, err := u.open()
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := f.root.OpenFile(partFile, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return onDisk(err)
	}
	n, err := io.Copy(out, &ctxReader{ctx, in})
	if err == nil && n != u.size {
		err = fault.Errorf(fault.Internal, "%s changed while it was read: it had %d bytes before, and has %d bytes now",
			u.name, u.size, n)
	}
	return onDisk(errors.Join(err, out.Sync(), out.Close()))
}

// sync syncs an object's folder and all folders above it in the destination, so that the names survive a crash. A
// killed writer may have made a folder without a sync.
func (f *folder) sync(name string) error {
	for dir := path.Dir(name); ; dir = path.Dir(dir) {
		d, err := f.root.Open(dir)
		if err != nil {
			return onDisk(err)
		}
		if err := errors.Join(f.flush(d), d.Close()); err != nil || dir == "." {
			return onDisk(err)
		}
	}
}

func (f *folder) url(name string) string {
	u := url.URL{Scheme: "file", Path: path.Join(filepath.ToSlash(f.dir), name)}
	return u.String()
}

func (f *folder) close() error { return f.root.Close() }

func onDisk(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fault.Wrap(fault.PublishRefused, err, "give this user write access to the folder")
	}
	return fault.Disk(err, "free space on the disk of the folder, or publish to another folder")
}

// ctxReader is a reader that stops when its context ends. It exists for one call only.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, fmt.Errorf("the read was stopped: %w", context.Cause(c.ctx))
	}
	return c.r.Read(p)
}
