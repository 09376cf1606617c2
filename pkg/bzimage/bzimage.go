// Package bzimage takes the kernel, as it was linked, out of the image that boots on
// amd64. It refuses to boot or to change one.
package bzimage

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/prebake/prebake/pkg/fault"
)

// maxLinked bounds a kernel as it was linked, without its debug information.
const maxLinked = 512 << 20

// The fields of a bzImage's setup header that say where the compressed kernel
// is, from Documentation/arch/x86/boot.rst; version 2.08 of the protocol and
// later have them all.
const (
	atSetupSects    = 0x1f1
	atHeaderMagic   = 0x202
	atProtocol      = 0x206
	atPayloadOffset = 0x248
	atPayloadLength = 0x24c
	endOfHeader     = 0x250
)

// Linked takes the kernel as it was linked, an ELF file without debug
// information, out of the image that boots on amd64. Debian compresses it with
// LZ4, from 6.12 on with zstd; the kernel that is compiled here is with gzip.
func Linked(image []byte) ([]byte, error) {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Unsupported, "read kernel image: "+fmt.Sprintf(format, args...),
			"take a kernel for amd64 that is compressed with LZ4, zstd or gzip")
	}
	le := binary.LittleEndian
	if len(image) < endOfHeader || string(image[atHeaderMagic:atHeaderMagic+4]) != "HdrS" ||
		le.Uint16(image[atProtocol:]) < 0x208 {
		return nil, bad("it is no bzImage")
	}
	sectors := uint64(image[atSetupSects])
	if sectors == 0 {
		sectors = 4
	}
	from := (sectors+1)*512 + uint64(le.Uint32(image[atPayloadOffset:]))
	size := uint64(le.Uint32(image[atPayloadLength:]))
	const trailer = 4 // the size of what comes out
	if size < trailer || from+size > uint64(len(image)) {
		return nil, bad("%d bytes from %d on, of %d", size, from, len(image))
	}
	payload := image[from : from+size-trailer]
	want := le.Uint32(image[from+size-trailer:])
	if want > maxLinked {
		return nil, bad("a kernel of %d bytes; want at most %d", want, maxLinked)
	}
	var packed io.Reader
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		packed = lz4.NewReader(bytes.NewReader(payload))
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// zstd -22 looks back 128 MiB.
		zr, err := zstd.NewReader(bytes.NewReader(payload), zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, bad("decompress: %v", err)
		}
		defer zr.Close()
		packed = zr
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		// gzip ends with the size itself, so none is appended.
		zr, err := gzip.NewReader(bytes.NewReader(image[from : from+size]))
		if err != nil {
			return nil, bad("decompress: %v", err)
		}
		zr.Multistream(false)
		packed = zr
	default:
		return nil, bad("its kernel is compressed with neither LZ4, zstd nor gzip")
	}
	linked, err := io.ReadAll(io.LimitReader(packed, int64(want)+1))
	if err != nil {
		return nil, bad("decompress: %v", err)
	}
	if uint64(len(linked)) != uint64(want) {
		return nil, bad("a kernel of %d bytes; it says %d", len(linked), want)
	}
	return linked, nil
}
