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

// A delta makes the archive of one layer from the archive of a former layer. The new archive is split into chunks of
// deltaChunk bytes. For each chunk, the delta has the length of a zstd frame (4 bytes, little endian) and the frame
// (RFC 8878). The frame's dictionary is raw content without an ID: the former archive's bytes around the chunk, as
// [window] defines. `zstd --patch-from` writes and reads these frames.
const (
	// ArtifactTypeDelta is the artifact type of a delta. The delta is attached to the artifact that has the new layer.
	ArtifactTypeDelta = "application/vnd.prebake.delta.v1"
	// AnnotationDeltaFrom has the diff ID of the former layer.
	AnnotationDeltaFrom = "dev.prebake.delta.from"

	deltaChunk  = 2 << 20
	deltaMargin = 1 << 20
	// maxFrame is the maximum size of a frame in bytes, for a chunk that zstd cannot compress.
	maxFrame = deltaChunk + deltaChunk>>8 + 64
	// deltaSlack is a number of bytes. The result of a delta may have at most twice the former layer's size plus
	// deltaSlack. Without this bound, a hostile delta could fill the disk before the result is verified.
	deltaSlack = 16 << 20
)

// WriteDelta writes to w a delta that turns the archive oldTar into the archive newTar. Equal input gives equal bytes.
func WriteDelta(ctx context.Context, oldTar, newTar io.Reader, w io.Writer) error {
	win := &window{r: &ctxReader{ctx: ctx, r: oldTar}}
	newTar = &ctxReader{ctx: ctx, r: newTar}
	chunk := make([]byte, deltaChunk)
	for {
		n, err := io.ReadFull(newTar, chunk)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("make delta: %w", err)
		}
		dict, err := win.next()
		if err != nil {
			return fmt.Errorf("make delta: read the layer that the delta starts from: %w", err)
		}
		// The frame needs no checksum, because the diff ID is verified. With one thread, the bytes are the same on any
		// machine.
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

// UnpackDelta is like [Unpack], for a layer that is made of a delta and the former layer's archive. It succeeds only if
// the delta has this size and digest, and the result has this diff ID. So the caller need not verify the former
// archive.
func UnpackDelta(
	ctx context.Context,
	delta io.Reader,
	wantDigest string,
	size int64,
	oldTar io.Reader,
	wantDiffID string,
	dst *os.Root,
) error {
	packed := &meter{r: &ctxReader{ctx: ctx, r: delta}, h: sha256.New(), limit: size}
	err := unpackPlain(&deltaReader{r: packed, win: &window{r: oldTar}}, wantDiffID, dst, maxBytes)
	if ctx.Err() != nil {
		return fmt.Errorf("unpack delta: %w", context.Cause(ctx))
	}
	if err != nil && !fault.Is(err, fault.Unverified) { // files could not be written: the rest of the delta is useless
		return fmt.Errorf("unpack delta %s: %w", wantDigest, diskFull(err))
	}
	if err := packed.check(wantDigest, size); err != nil {
		return fmt.Errorf("unpack delta: %w", err)
	}
	if err != nil {
		return fmt.Errorf("unpack delta %s: %w", wantDigest, diskFull(err))
	}
	return nil
}

// deltaReader reads the archive that a delta makes.
type deltaReader struct {
	r    io.Reader
	win  *window
	buf  []byte // one frame
	out  []byte // one chunk
	left []byte // the unread rest of out
	made int64  // number of chunks
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
		return err // io.EOF if there are no more frames
	}
	n := binary.LittleEndian.Uint32(head[:])
	if d.last || n == 0 || n > maxFrame {
		return fault.Errorf(fault.Unverified,
			"the delta has a frame of %d bytes; want frames of 1 to %d bytes, and none after the last chunk", n, maxFrame)
	}
	if d.buf == nil {
		d.buf, d.out = make([]byte, 0, maxFrame), make([]byte, 0, deltaChunk)
	}
	d.buf = d.buf[:n]
	if _, err := io.ReadFull(d.r, d.buf); err != nil {
		return fmt.Errorf("read a frame of the delta: %w", noEOF(err))
	}
	dict, err := d.win.next()
	if err != nil {
		return fmt.Errorf("read the layer that the delta starts from: %w", err)
	}
	if d.made++; d.win.ended && d.made*deltaChunk > 2*d.win.size()+deltaSlack {
		return fault.Errorf(
			fault.Unverified,
			"the delta unpacks to more than twice the size of the former layer, which has %d bytes",
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
		return fault.Errorf(fault.Unverified, "decompress a frame of the delta: %w", err)
	}
	if len(d.out) == 0 {
		return fault.Errorf(fault.Unverified, "the delta has an empty frame")
	}
	d.left, d.last = d.out, len(d.out) < deltaChunk
	return nil
}

// window provides the dictionary of each chunk: the former archive from deltaMargin before the chunk to deltaMargin
// after it. If the archive ends earlier, the dictionary is its last deltaChunk+2*deltaMargin bytes.
type window struct {
	r     io.Reader
	buf   []byte
	start int64 // position of buf in the archive
	i     int64 // index of the next chunk
	piece []byte
	ended bool
}

// next returns the dictionary of the next chunk. The dictionary is valid until the next call of next.
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

// size returns the size of the archive. The result is right only after the archive has ended.
func (w *window) size() int64 { return w.start + int64(len(w.buf)) }

// push appends bytes to the buffer, and drops the oldest bytes if the buffer is full.
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

// OpenArchive decompresses a packed layer, for [WriteDelta]. The caller must close the result.
func OpenArchive(packed io.Reader) (io.ReadCloser, error) {
	zr, err := newDecoder(packed)
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, err, "")
	}
	return zr.IOReadCloser(), nil
}

// TreeArchive packs the named entries of an unpacked layer, for [UnpackDelta]; nil means all entries. The result is the
// archive that [Unpack] read. The caller must close it.
func TreeArchive(ctx context.Context, root *os.Root, kind LayerKind, names []string) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := packTree(ctx, root, kind, names, w)
		_ = w.CloseWithError(err) // CloseWithError never fails
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
