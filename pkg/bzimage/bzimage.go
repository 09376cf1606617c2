// Package bzimage extracts the ELF kernel from a bzImage, the image that boots on amd64. It never changes an image.
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

// maxLinked is the maximum size, in bytes, of an ELF kernel without its debug information.
const maxLinked = 512 << 20

// Offsets of the fields in a bzImage's setup header that locate the compressed kernel
// (Documentation/arch/x86/boot.rst). Version 2.08 of the boot protocol added the last of them.
const (
	atSetupSects    = 0x1f1
	atHeaderMagic   = 0x202
	atProtocol      = 0x206
	atPayloadOffset = 0x248
	atPayloadLength = 0x24c
	endOfHeader     = 0x250
)

// Linked returns the ELF file inside a bzImage, without debug information. The kernel may be compressed with LZ4, zstd
// or gzip. For anything else, the error is of kind Unsupported.
func Linked(image []byte) ([]byte, error) {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Unsupported, "read kernel image: "+fmt.Sprintf(format, args...),
			"use a kernel for amd64 that is compressed with LZ4, zstd or gzip")
	}
	le := binary.LittleEndian
	if len(image) < endOfHeader || string(image[atHeaderMagic:atHeaderMagic+4]) != "HdrS" ||
		le.Uint16(image[atProtocol:]) < 0x208 {
		return nil, bad("the file is not a bzImage")
	}
	sectors := uint64(image[atSetupSects])
	if sectors == 0 {
		sectors = 4
	}
	from := (sectors+1)*512 + uint64(le.Uint32(image[atPayloadOffset:]))
	size := uint64(le.Uint32(image[atPayloadLength:]))
	const trailer = 4 // number of bytes at the end of the payload that hold the size of the decompressed kernel
	if size < trailer || from+size > uint64(len(image)) {
		return nil, bad("the compressed kernel has %d bytes from offset %d on, but the file has only %d bytes", size, from,
			len(image))
	}
	payload := image[from : from+size-trailer]
	want := le.Uint32(image[from+size-trailer:])
	if want > maxLinked {
		return nil, bad("the kernel has %d bytes; want at most %d bytes", want, maxLinked)
	}
	var packed io.Reader
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		packed = lz4.NewReader(bytes.NewReader(payload))
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// zstd -22 uses a window of 128 MiB.
		zr, err := zstd.NewReader(bytes.NewReader(payload), zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, bad("decompress the kernel: %v", err)
		}
		defer zr.Close()
		packed = zr
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		// The last four bytes of a gzip stream are the decompressed size, so a kernel build appends no further size.
		zr, err := gzip.NewReader(bytes.NewReader(image[from : from+size]))
		if err != nil {
			return nil, bad("decompress the kernel: %v", err)
		}
		zr.Multistream(false)
		packed = zr
	default:
		return nil, bad("the kernel is compressed with neither LZ4, zstd nor gzip")
	}
	linked, err := io.ReadAll(io.LimitReader(packed, int64(want)+1))
	if err != nil {
		return nil, bad("decompress the kernel: %v", err)
	}
	if uint64(len(linked)) != uint64(want) {
		return nil, bad("the decompressed kernel has %d bytes; the image says %d bytes", len(linked), want)
	}
	return linked, nil
}
