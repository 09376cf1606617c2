// Package archive unpacks a foreign tar below a folder. The tar may be plain, or compressed with gzip, xz or zstd.
//
// The package trusts no byte of the archive. It refuses:
//   - names that are absolute, contain "..", or pass through a link
//   - links that could lead out of the folder
//   - hard links to anything but an earlier file of the same archive
//   - devices and pipes
//   - a second entry with the same name
//   - more entries, more bytes or longer names than its bounds allow
//
// Folders get mode 0755, files 0644 or 0755. Owners, times and extended attributes are ignored. After an error, the
// caller removes the files that were unpacked.
package archive

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Options configure an Unpack.
type Options struct {
	// Entries is the largest number of entries; 0 means 500,000.
	Entries int
	// Bytes is the largest sum of file sizes; 0 means 16 GiB.
	Bytes int64
	// Name is the longest path in bytes; 0 means 1024.
	Name int
	// Outside is called for each symbolic link that could lead out of the folder, and the link is left out. If Outside is
	// nil, the link is an error.
	Outside func(name, target string)
	// Root is true if the archive is a root file system. Absolute links then become relative to the archive's root, and
	// devices and pipes are left out.
	Root bool
	// XZTool is the path of an xz program for xz archives; "" means the decoder in Go.
	XZTool string
}

func (o Options) withDefaults() Options {
	if o.Entries == 0 {
		o.Entries = 500_000
	}
	if o.Bytes == 0 {
		o.Bytes = 16 << 30
	}
	if o.Name == 0 {
		o.Name = 1024
	}
	return o
}

// Stats counts what was unpacked.
type Stats struct {
	Format               Format
	Files, Links, Folder int
	Bytes                int64
}

// Unpack unpacks a tar into the folder root, which should be empty. A refused archive is an error of kind Unverified.
func Unpack(ctx context.Context, r io.Reader, root *os.Root, o Options) (Stats, error) {
	o = o.withDefaults()
	src, format, err := Decompress(ctx, r, o.XZTool)
	if err != nil {
		return Stats{}, err
	}
	stats, err := unpack(ctx, src, root, o, format)
	if cerr := src.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("end the %s decoder: %w", format, cerr)
	}
	return stats, err
}

// UnpackTar unpacks an uncompressed tar. A program that calls only UnpackTar does not link the decoders.
func UnpackTar(ctx context.Context, r io.Reader, root *os.Root, o Options) (Stats, error) {
	return unpack(ctx, r, root, o.withDefaults(), Plain)
}

func unpack(ctx context.Context, r io.Reader, root *os.Root, o Options, format Format) (Stats, error) {
	u := &unpacker{root: root, o: o, dirs: map[string]bool{".": true}, files: map[string]bool{},
		buf: make([]byte, 256<<10)}
	u.stats.Format = format
	err := u.run(ctx, tar.NewReader(r))
	return u.stats, err
}

// UnpackFile unpacks the archive at the path file into the folder dir, as Unpack does.
func UnpackFile(ctx context.Context, file, dir string, o Options) (stats Stats, err error) {
	f, err := os.Open(file)
	if err != nil {
		return Stats{}, err
	}
	defer f.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Stats{}, err
	}
	defer root.Close()
	return Unpack(ctx, f, root, o)
}

type unpacker struct {
	root  *os.Root
	o     Options
	dirs  map[string]bool // folders that exist and are no links
	files map[string]bool // regular files that were made: the only permitted targets of hard links
	buf   []byte
	stats Stats
	count int // number of entries, plus the folders that exist only because an entry's name contains them
}

func (u *unpacker) run(ctx context.Context, tr *tar.Reader) error {
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return readError(ctx, fmt.Errorf("read tar: %w", err))
		}
		if err := u.countEntry(); err != nil {
			return err
		}
		if err := u.entry(ctx, h, tr); err != nil {
			return err
		}
	}
}

// countEntry counts one entry, or one folder without an entry of its own, because such a folder takes space on the disk
// too.
func (u *unpacker) countEntry() error {
	if u.count++; u.count > u.o.Entries {
		return refuse("read tar: the archive has more than %d entries, including folders without an entry of their own",
			u.o.Entries)
	}
	return nil
}

func (u *unpacker) entry(ctx context.Context, h *tar.Header, body io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(h.Name, u.o.Name)
	if err != nil {
		return err
	}
	if h.Size < 0 || h.Size > u.o.Bytes-u.stats.Bytes {
		return refuse("unpack %q: the archive contains more than %d bytes", name, u.o.Bytes)
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return refuse("unpack %q: the archive's root is not a folder", h.Name)
		}
		return nil
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.folder(name)
	case tar.TypeReg:
		return u.file(ctx, name, h, body)
	case tar.TypeSymlink:
		return u.symlink(name, h.Linkname)
	case tar.TypeLink:
		return u.hardlink(name, h.Linkname)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if u.o.Root {
			return nil
		}
	}
	return refuse("unpack %q: entry type %q is neither folder, file nor link", name, h.Typeflag)
}

// cleanName turns the name of a tar entry into a slash-separated path below the root.
func cleanName(name string, limit int) (string, error) {
	if len(name) > limit {
		return "", refuse("unpack %.60q…: the name is longer than %d bytes", name, limit)
	}
	if name == "" || strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) {
		return "", refuse("unpack %q: the name is not a path below the folder", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", refuse("unpack %q: the name contains ..", name)
		}
		if len(part) > 255 {
			return "", refuse("unpack %.60q…: a part of the name is longer than 255 bytes", name)
		}
	}
	return path.Clean(name), nil
}

// folder makes a folder and its missing parents. If the folder or a parent exists as a file or link, folder returns an
// error.
func (u *unpacker) folder(name string) error {
	if u.dirs[name] {
		return nil
	}
	if err := u.makeImplied(path.Dir(name)); err != nil {
		return err
	}
	err := u.root.Mkdir(name, 0o755)
	switch {
	case err == nil:
		err = u.root.Chmod(name, 0o755) // independent of the umask
		u.stats.Folder++
	case errors.Is(err, fs.ErrExist):
		fi, lerr := u.root.Lstat(name)
		if lerr == nil && !fi.IsDir() {
			return refuse("unpack %q: the archive's folder already exists as a file or link", name)
		}
		err = lerr
	}
	if err != nil {
		return writeError(name, err)
	}
	u.dirs[name] = true
	return nil
}

// makeImplied makes a folder that the name of an entry contains, if no entry made it before.
func (u *unpacker) makeImplied(name string) error {
	if u.dirs[name] {
		return nil
	}
	if err := u.countEntry(); err != nil {
		return err
	}
	return u.folder(name)
}

func (u *unpacker) file(ctx context.Context, name string, h *tar.Header, body io.Reader) error {
	if err := u.makeImplied(path.Dir(name)); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if h.Mode&0o111 != 0 {
		mode = 0o755
	}
	f, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return writeError(name, err)
	}
	n, err := u.copy(ctx, f, body)
	if err == nil && n != h.Size {
		err = refuse("unpack %q: the entry has %d bytes; its header says %d bytes", name, n, h.Size)
	}
	u.stats.Bytes += n
	if err == nil {
		err = f.Chmod(mode)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return writeError(name, err)
	}
	u.files[name] = true
	u.stats.Files++
	return nil
}

// copy is io.CopyBuffer that stops when ctx ends. It separates errors of the source from errors of the disk.
func (u *unpacker) copy(ctx context.Context, w io.Writer, r io.Reader) (n int64, err error) {
	for {
		if err := context.Cause(ctx); err != nil {
			return n, err
		}
		k, rerr := r.Read(u.buf)
		if k > 0 {
			if _, err := w.Write(u.buf[:k]); err != nil {
				return n, err
			}
			n += int64(k)
		}
		if errors.Is(rerr, io.EOF) {
			return n, nil
		}
		if rerr != nil {
			return n, readError(ctx, rerr)
		}
	}
}

func (u *unpacker) symlink(name, target string) error {
	if u.o.Root && strings.HasPrefix(target, "/") {
		target = strings.Repeat("../", strings.Count(name, "/")) + strings.TrimLeft(path.Clean(target), "/")
		target = cmp.Or(target, ".")
	}
	if !linkStays(name, target, u.o.Name) {
		if u.o.Outside == nil {
			return refuse("unpack %q: the link to %.200q leads out of the folder", name, target)
		}
		u.o.Outside(name, target)
		return nil
	}
	if err := u.makeImplied(path.Dir(name)); err != nil {
		return err
	}
	if err := u.root.Symlink(target, name); err != nil {
		return writeError(name, err)
	}
	u.stats.Links++
	return nil
}

// linkStays reports whether a link can never lead out of the folder, whatever other links the folder has. Each leading
// ".." of the target leads to the parent of a real folder. A ".." after another name could lead out of the folder if
// that name is a link, so linkStays returns false for such a target.
func linkStays(name, target string, limit int) bool {
	if target == "" || len(target) > limit || strings.HasPrefix(target, "/") || strings.ContainsRune(target, 0) {
		return false
	}
	depth, down := strings.Count(name, "/"), false
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "", ".":
		case "..":
			if depth--; down || depth < 0 {
				return false
			}
		default:
			down = true
		}
	}
	return true
}

func (u *unpacker) hardlink(name, target string) error {
	old, err := cleanName(target, u.o.Name)
	if err != nil {
		return err
	}
	if !u.files[old] {
		return refuse("unpack %q: this is a hard link to %q, which is not an earlier file of the archive", name, old)
	}
	if err := u.makeImplied(path.Dir(name)); err != nil {
		return err
	}
	if err := u.root.Link(old, name); err != nil {
		return writeError(name, err)
	}
	u.files[name] = true
	u.stats.Files++
	return nil
}

// readError adds the kind Unverified to an error about damaged bytes. It does not change an error that has a kind, or
// an error of a file on the disk. If ctx has ended, it returns the cause of that end.
func readError(ctx context.Context, err error) error {
	var f *fault.Error
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if errors.As(err, &f) || errors.As(err, new(*fs.PathError)) {
		return err
	}
	return fault.Wrap(fault.Unverified, err, hintReplace)
}

// writeError classifies an error of the local file system. If a name exists already, the archive contains it twice.
func writeError(name string, err error) error {
	switch {
	case fault.NoSpace(err):
		return fault.CacheDisk(fmt.Errorf("unpack %q: %w", name, err))
	case errors.Is(err, fs.ErrExist):
		return refuse("unpack %q: the archive contains this name twice", name)
	}
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fmt.Errorf("unpack %q: %w", name, err)
}
