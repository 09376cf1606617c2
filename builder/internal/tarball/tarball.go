package tarball

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"crypto/md5" //nolint:gosec // COS's buckets use md5 sums; only the sha256 is signed
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	ocidigest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Recipe is the version of the packing method. Change it whenever the same files would give a different tarball. After
// such a change, a published driver cannot be published again, because Publish never replaces a tarball.
const Recipe = "tgz-1"

// level is the compression level of gzip. The tarball's bytes depend on it.
const level = 6

// maxFiles is the maximum number of files in a tarball, and maxBytes their maximum size together, before compression.
// Both are several times what a release of 2026 needs.
const (
	maxFiles = 1000
	maxBytes = 4 << 30
)

// File is one file of a tarball.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// source is a file to pack into a tarball.
type source struct {
	name, path string
	info       fs.FileInfo
}

// sources returns the files that go into the tarball, sorted by their names in the tarball.
func (r Release) sources() ([]source, error) {
	var all []source
	add := func(name, file string) error {
		info, err := os.Lstat(file)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fault.Errorf(fault.Usage, "%s is not a regular file", file)
		}
		all = append(all, source{name, file, info})
		return nil
	}
	modules, err := filepath.Glob(filepath.Join(r.Modules, "*.ko"))
	if err != nil {
		return nil, err
	}
	for _, file := range modules {
		if err := add("drivers/"+filepath.Base(file), file); err != nil {
			return nil, err
		}
	}
	if !slices.ContainsFunc(all, func(s source) bool { return s.name == "drivers/nvidia.ko" }) {
		return nil, fault.Errorf(fault.Usage, "folder %s has no nvidia.ko", r.Modules)
	}
	if r.Firmware != "" {
		want := path.Join("firmware/nvidia", r.Driver.Modules().Version)
		err := filepath.WalkDir(r.Firmware, func(file string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			name, err := filepath.Rel(r.Firmware, file)
			if err != nil {
				return err
			}
			if name = filepath.ToSlash(name); path.Dir(name) != want {
				return fault.Errorf(fault.Usage, "firmware file %s is not in %s", name, want)
			}
			return add(name, file)
		})
		if err != nil {
			return nil, err
		}
	}
	var total int64
	for _, s := range all {
		total += s.info.Size()
	}
	if len(all) > maxFiles || total > maxBytes {
		return nil, fault.Errorf(fault.Usage,
			"the tarball would have %d files with %d bytes in all; want at most %d files with %d bytes", len(all), total,
			maxFiles, int64(maxBytes))
	}
	slices.SortFunc(all, func(a, b source) int { return cmp.Compare(a.name, b.name) })
	return all, nil
}

// keptXattrs are the extended attributes that go into the tarball. security.ima has the hash or signature with which
// the kernel's integrity subsystem (IMA) checks a firmware file.
var keptXattrs = []string{"security.ima"}

// readXattr returns an extended attribute of a file, or nil.
func readXattr(f *os.File, name string) ([]byte, error) {
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX of Linux
	n, err := unix.Fgetxattr(int(f.Fd()), name, value)
	switch {
	case errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read attribute %s of %s: %w", name, f.Name(), err)
	}
	return value[:n], nil
}

// pack writes the tarball to dst. The same files and attributes give the same tarball on any machine: names are sorted,
// times are zero, owners are root, and modes are fixed. The compressor runs in one thread, and its version is pinned.
func pack(ctx context.Context, files []source, dst string, xattr func(*os.File, string) ([]byte, error)) (_ object,
	list []File, err error) {
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return object{}, nil, fault.TempDisk(err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	sums := newSums()
	buffered := bufio.NewWriterSize(io.MultiWriter(out, sums), 1<<20)
	zw, err := gzip.NewWriterLevel(buffered, level)
	if err != nil {
		return object{}, nil, err
	}
	zw.ModTime = time.Unix(0, 0) // 0 means "no time" in gzip
	tw := tar.NewWriter(zw)
	made := map[string]bool{}
	for _, s := range files {
		if err := folders(tw, made, path.Dir(s.name)); err != nil {
			return object{}, nil, fault.TempDisk(err)
		}
		f, err := packOne(ctx, tw, s, xattr)
		if err != nil {
			return object{}, nil, fmt.Errorf("pack the file %s: %w", s.name, fault.TempDisk(err))
		}
		list = append(list, f)
	}
	for _, finish := range []func() error{tw.Close, zw.Close, buffered.Flush} {
		if err := finish(); err != nil {
			return object{}, nil, fault.TempDisk(err)
		}
	}
	o := sums.object()
	o.open = func() (io.ReadCloser, error) { return os.Open(dst) }
	return o, list, nil
}

// folders writes the tar entries of a folder and of its parents, except those in made.
func folders(tw *tar.Writer, made map[string]bool, dir string) error {
	if dir == "." || made[dir] {
		return nil
	}
	if err := folders(tw, made, path.Dir(dir)); err != nil {
		return err
	}
	made[dir] = true
	return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(0, 0)})
}

func packOne(ctx context.Context, tw *tar.Writer, s source, xattr func(*os.File, string) ([]byte, error)) (File,
	error) {
	in, err := os.Open(s.path)
	if err != nil {
		return File{}, err
	}
	defer in.Close()
	hdr := &tar.Header{Typeflag: tar.TypeReg, Name: s.name, Mode: 0o644, ModTime: time.Unix(0, 0), Size: s.info.Size()}
	for _, name := range keptXattrs {
		value, err := xattr(in, name)
		if err != nil {
			return File{}, err
		}
		if value != nil {
			hdr.Format = tar.FormatPAX
			hdr.PAXRecords = map[string]string{"SCHILY.xattr." + name: string(value)} // GNU tar --xattrs uses this key
		}
	}
	if err := tw.WriteHeader(hdr); err != nil {
		return File{}, err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(tw, h), &ctxReader{ctx, in})
	if err == nil && n != hdr.Size {
		err = fmt.Errorf("the file changed while it was read: it had %d bytes before, and has %d bytes now", hdr.Size, n)
	}
	return File{Name: s.name, Size: n, SHA256: ocidigest.NewDigest(ocidigest.SHA256, h).String()}, err
}

// sums is a writer that counts the bytes written to it, and computes their checksums.
type sums struct {
	w    io.Writer
	done func() object
}

func newSums() sums {
	sha, md, crc := sha256.New(), md5.New(), crc32.New(crc32.MakeTable(crc32.Castagnoli))
	n := &counter{}
	return sums{io.MultiWriter(sha, md, crc, n), func() object {
		o := object{sha256: ocidigest.NewDigest(ocidigest.SHA256, sha).String()}
		o.size, o.crc32c = n.n, crc.Sum32()
		copy(o.md5[:], md.Sum(nil))
		return o
	}}
}

func (s sums) Write(p []byte) (int, error) { return s.w.Write(p) }
func (s sums) object() object              { return s.done() }

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// fileObject returns the object for a file that is published unchanged.
func fileObject(ctx context.Context, file string) (object, error) {
	in, err := os.Open(file)
	if err != nil {
		return object{}, err
	}
	defer in.Close()
	s := newSums()
	if _, err := io.Copy(s, &ctxReader{ctx, in}); err != nil {
		return object{}, err
	}
	o := s.object()
	o.open = func() (io.ReadCloser, error) { return os.Open(file) }
	return o, nil
}

// bytesObject returns an object whose content is data.
func bytesObject(name, contentType string, data []byte) object {
	s := newSums()
	_, _ = s.Write(data) // a hash never returns an error
	o := s.object()
	o.name, o.contentType = name, contentType
	o.open = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(string(data))), nil }
	return o
}
