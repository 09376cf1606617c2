package archive

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/prebake/prebake/pkg/fault"
)

// Format is the compression of a tar.
type Format string

// The formats that this package reads.
const (
	Plain Format = "tar"
	Gzip  Format = "gzip"
	XZ    Format = "xz"
	Zstd  Format = "zstd"
)

// sniffLen is the number of bytes that Detect needs. The longest signature is "ustar" at offset 257 of a tar header.
const sniffLen = 262

// zstdWindow is the largest window that a zstd frame may require. Frames that zstd writes require 128 MiB at most.
const zstdWindow = 128 << 20

// Detect returns the format of a stream that begins with head, or "". A plain tar needs 262 bytes of head; the other
// formats need 6.
func Detect(head []byte) Format {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return Gzip
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return XZ
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return Zstd
	case len(head) >= sniffLen && string(head[257:sniffLen]) == "ustar":
		return Plain
	}
	return ""
}

// Decompress returns the tar inside r. The caller must close the result, which does not close r. If a decoding program
// fails, the next Read returns the error.
//
// xzTool is the path of an xz program; "" means the decoder in Go, which is several times slower.
func Decompress(ctx context.Context, r io.Reader, xzTool string) (io.ReadCloser, Format, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(sniffLen)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, "", fmt.Errorf("read archive: %w", err)
	}
	format := Detect(head)
	switch format {
	case Plain:
		return io.NopCloser(br), format, nil
	case Gzip:
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, format, refuse("read gzip header: %w", err)
		}
		return zr, format, nil
	case Zstd:
		zr, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, format, refuse("read zstd header: %w", err)
		}
		return zr.IOReadCloser(), format, nil
	case XZ:
		if xzTool != "" {
			zr, err := startXZ(ctx, xzTool, br)
			return zr, format, err
		}
		if err := checkXZ(br); err != nil {
			return nil, format, err
		}
		zr, err := xz.NewReader(br)
		if err != nil {
			return nil, format, refuse("read xz header: %w", err)
		}
		return io.NopCloser(zr), format, nil
	}
	return nil, "", refuse("read archive: want a tar, or a tar that is compressed with gzip, xz or zstd")
}

// xzDict is the largest dictionary that an xz stream may require; streams of xz -9 require 64 MiB. The decoder
// allocates the dictionary before it reads any data, so the bound is checked first.
const xzDict = 256 << 20

// xzMemory is the option that limits the memory of an xz program. The limit is higher than xzDict because the program
// runs several threads.
const xzMemory = "--memlimit-decompress=1GiB"

// checkXZ refuses a stream whose first block has another first filter than LZMA2, or a dictionary of more than xzDict
// bytes. The block header follows the 12 bytes of the stream header (.xz file format 1.2.1, sections 3.1 and 5.3.1).
// The block header has its own size, flags, up to two optional sizes, and the filters. LZMA2 is filter 0x21, with one
// byte of properties.
func checkXZ(br *bufio.Reader) error {
	head, _ := br.Peek(12 + 64) // a header with LZMA2 alone is far shorter
	if len(head) < 14 || head[12] == 0 {
		return nil // an empty stream, which the decoder handles
	}
	rest := bytes.NewReader(head[14:])
	optional := int(head[13]>>6&1 + head[13]>>7)
	for range optional {
		if _, err := binary.ReadUvarint(rest); err != nil {
			return refuse("read xz block header: %w", err)
		}
	}
	id, _ := binary.ReadUvarint(rest)
	n, _ := binary.ReadUvarint(rest)
	props, err := rest.ReadByte()
	if err != nil || id != 0x21 || n != 1 {
		return refuse("read xz block header: the first filter is not LZMA2")
	}
	// Section 5.3.1: bit 0 of props chooses 2 or 3, and that number is shifted left by props/2 + 11 bits.
	if size := (2 | int64(props&1)) << (props>>1&31 + 11); props > 40 || size > xzDict {
		return refuse("read xz block header: the dictionary is larger than %d bytes", xzDict)
	}
	return nil
}

// xzProcess is a reader of the output of a running xz program.
type xzProcess struct {
	cancel context.CancelFunc
	cmd    *exec.Cmd
	out    io.ReadCloser
	stderr bytes.Buffer
	done   bool
	err    error
}

func startXZ(ctx context.Context, tool string, r io.Reader) (*xzProcess, error) {
	ctx, cancel := context.WithCancel(ctx)
	p := &xzProcess{cancel: cancel,
		cmd: exec.CommandContext(ctx, tool, "--decompress", "--stdout", "--threads=0", xzMemory, "--quiet")}
	p.cmd.Env = []string{"LC_ALL=C"} // leaves out the caller's XZ_OPT and XZ_DEFAULTS
	p.cmd.Stdin, p.cmd.Stderr = r, &p.stderr
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		p.out = out
		err = p.cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start %s: %w", tool, err)
	}
	return p, nil
}

func (p *xzProcess) Read(b []byte) (int, error) {
	if p.done {
		return 0, p.err
	}
	n, err := p.out.Read(b)
	if err == nil {
		return n, nil
	}
	p.done, p.err = true, err
	if werr := p.cmd.Wait(); werr != nil && errors.Is(err, io.EOF) {
		p.err = refuse("decompress xz: %w: %s", werr, bytes.TrimSpace(p.stderr.Bytes()))
	}
	return n, p.err
}

// Close stops the xz program. A program that still runs is not an error: the reader of a tar often stops before the
// padding at its end.
func (p *xzProcess) Close() error {
	p.cancel()
	if !p.done {
		p.done, p.err = true, errors.New("the archive is closed already")
		_ = p.cmd.Wait() // cancel has killed it
	}
	return nil
}

// refuse returns an error of kind Unverified about bytes that this package does not accept.
func refuse(format string, args ...any) error {
	return fault.Wrap(fault.Unverified, fmt.Errorf(format, args...), hintReplace)
}

const hintReplace = "replace the archive at its source: the archive is damaged, or somebody changed the archive"
