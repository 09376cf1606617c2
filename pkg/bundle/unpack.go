package bundle

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	ocidigest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Unpack reads one compressed layer and writes its files below dst, in one pass. It succeeds only if all of this is
// true:
//
//   - The compressed bytes have this size and digest.
//   - The tar in them has this diff ID, and nothing follows it.
//   - Every entry is a folder, a regular file or a link to a path in the layer.
//
// Modes become 0644 or 0755. Owners and times are not restored. After an error, the caller must remove the content of
// dst, because nothing in it is verified.
//
// Several layers may be unpacked into the same dst. Folders may exist already, but files and links may not.
func Unpack(ctx context.Context, r io.Reader, wantDigest, wantDiffID string, size int64, dst *os.Root) error {
	return unpack(ctx, r, wantDigest, wantDiffID, size, dst, maxBytes)
}

func unpack(ctx context.Context, r io.Reader, wantDigest, wantDiffID string, size int64, dst *os.Root,
	limit int64) error {
	packed := &meter{r: &ctxReader{ctx: ctx, r: r}, h: sha256.New(), limit: size}
	coming := readAhead(packed)
	defer coming.Close()
	err := unpackStream(coming, wantDiffID, dst, limit)
	if ctx.Err() != nil {
		return fmt.Errorf("unpack layer: %w", context.Cause(ctx))
	}
	if err != nil && !fault.Is(err, fault.Unverified) { // files could not be written: the rest of the stream is useless
		return fmt.Errorf("unpack layer %s: %w", wantDigest, diskFull(err))
	}
	_, _ = io.Copy(io.Discard, coming) // read the rest; the meter keeps the error
	coming.Close()
	if err := packed.check(wantDigest, size); err != nil {
		return fmt.Errorf("unpack layer: %w", err)
	}
	if err != nil {
		return fmt.Errorf("unpack layer %s: %w", wantDigest, diskFull(err))
	}
	return nil
}

// check reads the stream to its end, and compares the bytes with the digest and size in the manifest.
func (m *meter) check(wantDigest string, size int64) error {
	if m.err != nil {
		// The source failed, so an error of the parsers is only a consequence.
		return fmt.Errorf("read the stream: %w", m.err)
	}
	// Bytes that were changed in transit first cause a parse error. Compare the digest nevertheless, because an error
	// about the digest names the real cause.
	if _, err := io.Copy(io.Discard, m); err != nil && !m.over {
		return fmt.Errorf("read the stream: %w", err)
	}
	switch got := m.digest(); {
	case m.over:
		return fault.Errorf(fault.Unverified, "the stream is longer than the %d bytes that the manifest says", size)
	case m.n != size:
		return fault.Errorf(fault.Unverified, "the stream has %d bytes; the manifest says %d bytes", m.n, size)
	case got != wantDigest:
		return fault.Errorf(fault.Unverified, "the stream has digest %s; the manifest says %s", got, wantDigest)
	}
	return nil
}

func unpackStream(packed io.Reader, wantDiffID string, dst *os.Root, limit int64) error {
	zr, err := newDecoder(packed)
	if err != nil {
		return fault.Wrap(fault.Unverified, err, "")
	}
	defer zr.Close()
	plain := readAhead(zr)
	defer plain.Close() // runs before zr.Close
	return unpackPlain(plain, wantDiffID, dst, limit)
}

// newDecoder returns a reader that decompresses a packed layer. It starts no threads and uses limited memory, because
// nodes have other work. The frame's checksum is ignored, because the diff ID proves more.
func newDecoder(packed io.Reader) (*zstd.Decoder, error) {
	return zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.IgnoreChecksum(true),
		zstd.WithDecoderMaxWindow(windowSize), zstd.WithDecoderMaxMemory(64<<20))
}

// unpackPlain writes the files of an archive to dst.
func unpackPlain(archive io.Reader, wantDiffID string, dst *os.Root, limit int64) error {
	plain := &meter{r: archive, h: sha256.New(), limit: limit}
	x := &extractor{dst: dst, seen: map[string]byte{}}
	err := x.run(tar.NewReader(plain))
	if err == nil {
		err = onlyZeros(plain)
	}
	if plain.over {
		return fault.Errorf(fault.Unverified, "the layer unpacks to more than %d bytes", limit)
	}
	if err != nil {
		return err
	}
	if got := plain.digest(); got != wantDiffID {
		return fault.Errorf(fault.Unverified, "the unpacked layer has digest %s; the image config says %s", got, wantDiffID)
	}
	return nil
}

// onlyZeros reads r to its end. Only zero bytes may follow a tar archive.
func onlyZeros(r io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		for _, b := range buf[:n] {
			if b != 0 {
				return fault.New(fault.Unverified, "there is data after the end of the archive", "")
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Wrap(fault.Unverified, err, "")
		}
	}
}

// extractor writes the entries of one archive.
type extractor struct {
	dst  *os.Root
	seen map[string]byte // from an entry's name to its tar type
	buf  []byte
}

func (x *extractor) run(tr *tar.Reader) error {
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Errorf(fault.Unverified, "read archive: %w", err)
		}
		if len(x.seen) >= maxEntries {
			return fault.Errorf(fault.Unverified, "the archive has more than %d entries", maxEntries)
		}
		name, err := x.check(hdr)
		if err != nil {
			return fault.Wrap(fault.Unverified, err, "")
		}
		x.seen[name] = hdr.Typeflag
		if err := x.write(name, hdr, tr); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
}

// check checks one header before anything is written, and returns the entry's name.
func (x *extractor) check(hdr *tar.Header) (string, error) {
	name := hdr.Name
	if hdr.Typeflag == tar.TypeDir {
		name = strings.TrimSuffix(name, "/")
	}
	if err := checkName(name); err != nil {
		return "", err
	}
	for key := range hdr.PAXRecords {
		if key != "path" && key != "linkpath" {
			return "", fmt.Errorf("%s has the extended header %.40q; want only path and linkpath", name, key)
		}
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeDir:
	case tar.TypeSymlink:
		if err := checkLink(name, hdr.Linkname); err != nil {
			return "", err
		}
	default:
		return "", fmt.Errorf("%s has type %q: only folders, regular files and links may be in a layer", name, hdr.Typeflag)
	}
	if _, dup := x.seen[name]; dup {
		return "", fmt.Errorf("%s is in the archive twice", name)
	}
	// The parent must be a folder that this code has created or checked. So no entry is written through a link.
	if parent := path.Dir(name); parent != "." && x.seen[parent] != tar.TypeDir {
		return "", fmt.Errorf("no earlier entry of the archive is the folder of %s", name)
	}
	return name, nil
}

func (x *extractor) write(name string, hdr *tar.Header, r io.Reader) error {
	switch hdr.Typeflag {
	case tar.TypeDir:
		if err := x.dst.Mkdir(name, 0o755); errors.Is(err, fs.ErrExist) {
			if info, serr := x.dst.Lstat(name); serr != nil || !info.IsDir() {
				return err
			}
			return nil
		} else if err != nil {
			return err
		}
		return x.dst.Chmod(name, 0o755) // set the mode again, because of the umask
	case tar.TypeSymlink:
		return x.dst.Symlink(hdr.Linkname, name)
	}
	mode := fs.FileMode(fileMode(fs.FileMode(hdr.Mode & 0o777)))
	f, err := x.dst.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	if x.buf == nil {
		x.buf = make([]byte, 256<<10)
	}
	_, err = io.CopyBuffer(&earlyWriter{f: f}, &archiveReader{r: r}, x.buf)
	return errors.Join(err, f.Chmod(mode), f.Close())
}

// earlyWriter makes the kernel write a large file to the disk during unpacking, so the sync afterwards takes less time.
type earlyWriter struct {
	f     *os.File
	n, at int64 // bytes that were written, and bytes whose write to the disk was started
}

// earlyPiece is the number of bytes after which a write to the disk is started.
const earlyPiece = 4 << 20

func (e *earlyWriter) Write(p []byte) (int, error) {
	n, err := e.f.Write(p)
	if e.n += int64(n); e.n-e.at >= earlyPiece {
		// An error does not matter: the file system then writes the bytes later.
		_ = unix.SyncFileRange(int(e.f.Fd()), e.at, e.n-e.at, unix.SYNC_FILE_RANGE_WRITE)
		e.at = e.n
	}
	return n, err
}

// archiveReader adds a fault kind to errors of the archive, so that they differ from errors of the disk.
type archiveReader struct{ r io.Reader }

func (b *archiveReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fault.Wrap(fault.Unverified, err, "")
	}
	return n, err
}

// meter counts and hashes the bytes that are read through it. It returns an error if the stream is longer than limit.
type meter struct {
	r     io.Reader
	h     hash.Hash
	n     int64
	limit int64
	over  bool
	err   error // error of the source, except io.EOF
}

var errTooLong = errors.New("the stream is longer than its limit")

func (m *meter) Read(p []byte) (int, error) {
	if m.over {
		return 0, errTooLong
	}
	// Read one byte more than the limit, because a stream of exactly limit bytes is allowed.
	if room := m.limit - m.n + 1; int64(len(p)) > room {
		p = p[:room]
	}
	n, err := m.r.Read(p)
	if m.n+int64(n) > m.limit {
		m.over = true
		return 0, errTooLong
	}
	m.n += int64(n)
	m.h.Write(p[:n]) // a hash never returns an error
	if err != nil && !errors.Is(err, io.EOF) {
		m.err = err
	}
	return n, err
}

func (m *meter) digest() string { return ocidigest.NewDigest(ocidigest.SHA256, m.h).String() }
