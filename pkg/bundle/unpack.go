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

// Unpack reads one compressed layer and writes its files below dst, in one
// pass. It succeeds only when the compressed bytes have this size and digest,
// the tar inside has this diff id, nothing follows the archive, and every
// entry is a folder, a regular file or a link that stays inside. Modes become
// 0644 or 0755; owners and times are not restored. After an error the caller
// removes what dst holds: nothing in it may be trusted.
//
// Several layers may go into one dst: folders that exist are taken over,
// everything else has to be new.
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
	_, _ = io.Copy(io.Discard, coming) // the rest; the meter keeps what went wrong
	coming.Close()
	if err := packed.check(wantDigest, size); err != nil {
		return fmt.Errorf("unpack layer: %w", err)
	}
	if err != nil {
		return fmt.Errorf("unpack layer %s: %w", wantDigest, diskFull(err))
	}
	return nil
}

// check reads to the end, and compares what was read with what a manifest says.
func (m *meter) check(wantDigest string, size int64) error {
	if m.err != nil {
		// The source failed, so what the parsers said is only a consequence.
		return fmt.Errorf("read: %w", m.err)
	}
	// Bytes that changed on the way show first as a broken frame or header:
	// say the cause, not the symptom.
	if _, err := io.Copy(io.Discard, m); err != nil && !m.over {
		return fmt.Errorf("read: %w", err)
	}
	switch got := m.digest(); {
	case m.over:
		return fault.Errorf(fault.Unverified, "it is longer than the %d bytes that the manifest says", size)
	case m.n != size:
		return fault.Errorf(fault.Unverified, "it has %d bytes; the manifest says %d", m.n, size)
	case got != wantDigest:
		return fault.Errorf(fault.Unverified, "it has digest %s; the manifest says %s", got, wantDigest)
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
	defer plain.Close() // before the decoder's
	return unpackPlain(plain, wantDiffID, dst, limit)
}

// newDecoder reads a packed layer. It starts no thread of its own, and its window is bounded: this
// runs on nodes with work to do. The frame's own checksum says less than the diff id does.
func newDecoder(packed io.Reader) (*zstd.Decoder, error) {
	return zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.IgnoreChecksum(true),
		zstd.WithDecoderMaxWindow(windowSize), zstd.WithDecoderMaxMemory(64<<20))
}

// unpackPlain writes what an archive holds.
func unpackPlain(archive io.Reader, wantDiffID string, dst *os.Root, limit int64) error {
	plain := &meter{r: archive, h: sha256.New(), limit: limit}
	x := &extractor{dst: dst, seen: map[string]byte{}}
	err := x.run(tar.NewReader(plain))
	if err == nil {
		err = onlyZeros(plain)
	}
	if plain.over {
		return fault.Errorf(fault.Unverified, "layer unpacks to more than %d bytes", limit)
	}
	if err != nil {
		return err
	}
	if got := plain.digest(); got != wantDiffID {
		return fault.Errorf(fault.Unverified, "unpacked layer has digest %s; the config says %s", got, wantDiffID)
	}
	return nil
}

// onlyZeros reads to the end: behind a tar archive there may be padding only.
func onlyZeros(r io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		for _, b := range buf[:n] {
			if b != 0 {
				return fault.New(fault.Unverified, "data behind the end of the archive", "")
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
	seen map[string]byte // name -> tar type
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
			return fault.Errorf(fault.Unverified, "archive has more than %d entries", maxEntries)
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

// check decides about one header before anything is written.
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
			return "", fmt.Errorf("%s has an extended header %.40q", name, key)
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
		return "", fmt.Errorf("%s is there twice", name)
	}
	// A parent that is a folder of this archive was made or checked by us; so
	// no entry can pass through a link.
	if parent := path.Dir(name); parent != "." && x.seen[parent] != tar.TypeDir {
		return "", fmt.Errorf("%s comes without its folder", name)
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
		return x.dst.Chmod(name, 0o755) // whatever the umask is
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
	_, err = io.CopyBuffer(&early{f: f}, &archiveReader{r: r}, x.buf)
	return errors.Join(err, f.Chmod(mode), f.Close())
}

// early has the kernel begin to write a large file to the disk while more of it is being
// unpacked, so that the flush at the end waits for less.
type early struct {
	f     *os.File
	n, at int64 // written, and begun
}

// earlyPiece is how much is begun at a time.
const earlyPiece = 4 << 20

func (e *early) Write(p []byte) (int, error) {
	n, err := e.f.Write(p)
	if e.n += int64(n); e.n-e.at >= earlyPiece {
		// A filesystem that cannot do it does it later.
		_ = unix.SyncFileRange(int(e.f.Fd()), e.at, e.n-e.at, unix.SYNC_FILE_RANGE_WRITE)
		e.at = e.n
	}
	return n, err
}

// archiveReader marks errors of the archive as such, so that they can be told from
// errors of the disk.
type archiveReader struct{ r io.Reader }

func (b *archiveReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fault.Wrap(fault.Unverified, err, "")
	}
	return n, err
}

// meter counts and hashes what is read through it, and ends the stream with an
// error when it is longer than its limit.
type meter struct {
	r     io.Reader
	h     hash.Hash
	n     int64
	limit int64
	over  bool
	err   error // of the source, other than its end
}

var errTooLong = errors.New("stream is longer than it may be")

func (m *meter) Read(p []byte) (int, error) {
	if m.over {
		return 0, errTooLong
	}
	// One byte beyond the limit is asked for, to tell "exactly" from "more".
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
