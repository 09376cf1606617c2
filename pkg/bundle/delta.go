package bundle

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"

	"github.com/prebake/prebake/pkg/fault"
)

// A delta turns the archive of one layer into that of another. The archive that is made
// is cut into chunks of deltaChunk bytes. Each is one zstd frame (RFC 8878) behind its
// length, which is 4 bytes, little endian. The frame's dictionary is raw content without
// an id: the bytes of the other archive about the chunk's own place, as [window] says.
// `zstd --patch-from` makes and reads such frames. Nobody needs to hold an archive in
// memory or on the disk for it.
const (
	// ArtifactTypeDelta is the type under which a delta is attached to the artifact whose
	// layer it makes.
	ArtifactTypeDelta = "application/vnd.prebake.delta.v1"
	// AnnotationDeltaFrom holds the diff id of the layer that is needed for it.
	AnnotationDeltaFrom = "dev.prebake.delta.from"

	deltaChunk  = 2 << 20
	deltaMargin = 1 << 20
	// maxFrame bounds a frame: what zstd makes of bytes that cannot be compressed.
	maxFrame = deltaChunk + deltaChunk>>8 + 64
	// deltaSlack is how much more a delta may make than twice of what there was. Anybody may
	// attach one, and its result is compared at its end.
	deltaSlack = 16 << 20
)

// WriteDelta writes a delta that makes one archive out of another. Equal input gives equal
// bytes.
func WriteDelta(ctx context.Context, from, to io.Reader, w io.Writer) error {
	win := &window{r: &ctxReader{ctx: ctx, r: from}}
	to = &ctxReader{ctx: ctx, r: to}
	chunk := make([]byte, deltaChunk)
	for {
		n, err := io.ReadFull(to, chunk)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("make delta: %w", err)
		}
		dict, err := win.next()
		if err != nil {
			return fmt.Errorf("make delta: read former layer: %w", err)
		}
		// The diff id says more than a checksum. One thread: equal bytes on any machine.
		options := []zstd.EOption{
			zstd.WithEncoderLevel(
				zstd.SpeedBetterCompression,
			), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(windowSize), zstd.WithSingleSegment(true),
		}
		if len(dict) > 0 {
			options = append(options, zstd.WithEncoderDictRaw(0, dict))
		}
		enc, err := zstd.NewWriter(nil, options...)
		if err != nil {
			return fmt.Errorf("make delta: %w", err)
		}
		frame := enc.EncodeAll(chunk[:n], make([]byte, 4, 64<<10))
		binary.LittleEndian.PutUint32(frame, uint32(len(frame)-4)) //nolint:gosec // a frame of one chunk
		if _, err := w.Write(frame); err != nil {
			return fmt.Errorf("make delta: %w", diskFull(err))
		}
	}
}

// UnpackDelta is [Unpack] for a delta: it makes the layer out of the archive of another
// one, which need not be verified. It succeeds only when the delta has this size and
// digest, and its result has the diff id.
func UnpackDelta(
	ctx context.Context,
	delta io.Reader,
	wantDigest string,
	size int64,
	from io.Reader,
	wantDiffID string,
	dst *os.Root,
) error {
	packed := &meter{r: &ctxReader{ctx: ctx, r: delta}, h: sha256.New(), limit: size}
	err := unpackPlain(&deltaReader{r: packed, win: &window{r: from}}, wantDiffID, dst, maxBytes)
	if ctx.Err() != nil {
		return fmt.Errorf("unpack delta: %w", context.Cause(ctx))
	}
	if err := packed.check(wantDigest, size); err != nil {
		return fmt.Errorf("unpack delta: %w", err)
	}
	if err != nil {
		return fmt.Errorf("unpack delta %s: %w", wantDigest, diskFull(err))
	}
	return nil
}

// deltaReader reads what a delta makes.
type deltaReader struct {
	r    io.Reader
	win  *window
	buf  []byte // one frame
	out  []byte // one chunk
	left []byte // of out
	made int64  // chunks
	last bool
}

func (d *deltaReader) Read(p []byte) (int, error) {
	for len(d.left) == 0 {
		if err := d.chunk(); err != nil {
			return 0, err
		}
	}
	n := copy(p, d.left)
	d.left = d.left[n:]
	return n, nil
}

// chunk reads and decodes the next frame.
func (d *deltaReader) chunk() error {
	var head [4]byte
	if _, err := io.ReadFull(d.r, head[:]); err != nil {
		return err // io.EOF is the end
	}
	n := binary.LittleEndian.Uint32(head[:])
	if d.last || n == 0 || n > maxFrame {
		return fault.Errorf(fault.Unverified, "delta has a frame of %d bytes in a wrong place", n)
	}
	if d.buf == nil {
		d.buf, d.out = make([]byte, 0, maxFrame), make([]byte, 0, deltaChunk)
	}
	d.buf = d.buf[:n]
	if _, err := io.ReadFull(d.r, d.buf); err != nil {
		return fmt.Errorf("read frame: %w", noEOF(err))
	}
	dict, err := d.win.next()
	if err != nil {
		return fmt.Errorf("read former layer: %w", err)
	}
	if d.made++; d.win.ended && d.made*deltaChunk > 2*d.win.size()+deltaSlack {
		return fault.Errorf(
			fault.Unverified,
			"delta makes more than twice as much as the former layer has, %d bytes",
			d.win.size(),
		)
	}
	options := []zstd.DOption{
		zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.IgnoreChecksum(true),
		zstd.WithDecoderMaxWindow(windowSize), zstd.WithDecoderMaxMemory(deltaChunk),
	}
	if len(dict) > 0 {
		options = append(options, zstd.WithDecoderDictRaw(0, dict))
	}
	dec, err := zstd.NewReader(nil, options...)
	if err != nil {
		return fault.Wrap(fault.Unverified, err, "")
	}
	defer dec.Close()
	if d.out, err = dec.DecodeAll(d.buf, d.out[:0]); err != nil {
		return fault.Errorf(fault.Unverified, "read frame: %w", err)
	}
	if len(d.out) == 0 {
		return fault.Errorf(fault.Unverified, "delta has an empty frame")
	}
	d.left, d.last = d.out, len(d.out) < deltaChunk
	return nil
}

// window is what the dictionary of each chunk is: the bytes of an archive from deltaMargin
// before the chunk's place to deltaMargin behind it. Where the archive ends earlier it is
// as many bytes of its end.
type window struct {
	r     io.Reader
	buf   []byte
	start int64 // of buf, in the archive
	i     int64 // of the next chunk
	piece []byte
	ended bool
}

// next returns the window of the next chunk. It is good until the call after.
func (w *window) next() ([]byte, error) {
	if w.buf == nil {
		w.buf, w.piece = make([]byte, 0, deltaChunk+2*deltaMargin), make([]byte, 256<<10)
	}
	end := (w.i+1)*deltaChunk + deltaMargin
	w.i++
	for !w.ended && w.start+int64(len(w.buf)) < end {
		n, err := io.ReadFull(w.r, w.piece[:min(end-w.start-int64(len(w.buf)), int64(len(w.piece)))])
		w.push(w.piece[:n])
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			w.ended = true
		case err != nil:
			return nil, err
		}
	}
	return w.buf, nil
}

// size is that of the archive, once it has ended.
func (w *window) size() int64 { return w.start + int64(len(w.buf)) }

// push appends bytes and drops as many of the oldest as are too many.
func (w *window) push(p []byte) {
	if over := len(w.buf) + len(p) - cap(w.buf); over > 0 {
		w.buf = w.buf[:copy(w.buf, w.buf[over:])]
		w.start += int64(over)
	}
	w.buf = append(w.buf, p...)
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// OpenArchive returns the archive inside a packed layer, for [WriteDelta].
func OpenArchive(packed io.Reader) (io.ReadCloser, error) {
	zr, err := newDecoder(packed)
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, err, "")
	}
	return zr.IOReadCloser(), nil
}

// TreeArchive returns the archive of an unpacked layer as [Unpack] once read it, for
// [UnpackDelta]: of these names, or of all that there is. The caller closes it.
func TreeArchive(ctx context.Context, root *os.Root, kind LayerKind, names []string) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := packTree(ctx, root, kind, names, w)
		_ = w.CloseWithError(err) // it never fails
	}()
	return &treeArchive{PipeReader: r, stop: func() { cancel(); <-done }}
}

type treeArchive struct {
	*io.PipeReader
	stop func()
}

func (t *treeArchive) Close() error {
	err := t.PipeReader.Close()
	t.stop()
	return err
}
