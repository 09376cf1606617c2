package bzimage

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/prebake/prebake/pkg/fault"
)

// bzImage returns an image in the layout that the kernel's build makes: boot sector, setup sector, code, the compressed
// kernel, and the size of the kernel.
func bzImage(t testing.TB, linked []byte, size int) []byte {
	t.Helper()
	var packed bytes.Buffer
	w := lz4.NewWriter(&packed)
	if err := w.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(linked); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return imageOf(packed.Bytes(), size)
}

// zstdOf compresses a kernel with zstd, as builds of newer kernels do.
func zstdOf(t testing.TB, linked []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(linked, nil)
}

func imageOf(packed []byte, size int) []byte {
	const code = 96
	image := make([]byte, 2*512+code)
	image[atSetupSects] = 1
	copy(image[atHeaderMagic:], "HdrS")
	le := binary.LittleEndian
	le.PutUint16(image[atProtocol:], 0x20f)
	le.PutUint32(image[atPayloadOffset:], code)
	le.PutUint32(image[atPayloadLength:], uint32(len(packed)+4))
	image = append(image, packed...)
	image = le.AppendUint32(image, uint32(size))
	return append(image, "what follows"...)
}

func TestLinked(t *testing.T) {
	t.Parallel()
	linked := bytes.Repeat([]byte("\x7fELF kernel "), 1<<20)
	got, err := Linked(bzImage(t, linked, len(linked)))
	if err != nil || !bytes.Equal(got, linked) {
		t.Errorf("Linked = %d bytes, %v; want the %d that went in", len(got), err, len(linked))
	}
	got, err = Linked(imageOf(zstdOf(t, linked), len(linked)))
	if err != nil || !bytes.Equal(got, linked) {
		t.Errorf("Linked(zstd) = %d bytes, %v; want the %d that went in", len(got), err, len(linked))
	}
	var packed bytes.Buffer
	zw := gzip.NewWriter(&packed)
	_, err = zw.Write(linked)
	if err := errors.Join(err, zw.Close()); err != nil {
		t.Fatal(err)
	}
	// gzip data ends with the size of its content, and in an image this field is the size of the kernel. Linked must not
	// read the bytes after it.
	got, err = Linked(imageOf(packed.Bytes()[:packed.Len()-4], len(linked)))
	if err != nil || !bytes.Equal(got, linked) {
		t.Errorf("Linked(gzip) = %d bytes, %v; want the %d that went in", len(got), err, len(linked))
	}
	good := func() []byte { return bzImage(t, linked, len(linked)) }
	edit := func(change func(image []byte)) []byte {
		image := good()
		change(image)
		return image
	}
	for _, row := range []struct {
		name  string
		image []byte
		want  string
	}{
		{"nothing", nil, "not a bzImage"},
		{"flat image", make([]byte, 4096), "not a bzImage"},
		{"old protocol", edit(func(i []byte) { i[atProtocol] = 7 }), "not a bzImage"},
		{"beyond the end", edit(func(i []byte) { i[atPayloadLength+3] = 0xff }), "bytes from offset 1120 on"},
		{"other compression", edit(func(i []byte) { i[1120] = 0xfd }), "with neither LZ4"},
		{"damaged", edit(func(i []byte) { copy(i[1130:], make([]byte, 64)) }), "read kernel image: "},
		{"less than it says", bzImage(t, linked, len(linked)+1), "the image says"},
		{"more than it says", bzImage(t, linked, len(linked)-1), "the image says"},
		{"damaged zstd", imageOf(append(zstdOf(t, linked)[:16], make([]byte, 64)...), len(linked)), "read kernel image: "},
		{"more zstd than it says", imageOf(zstdOf(t, linked), len(linked)-1), "the image says"},
		{"far too much", bzImage(t, linked, maxLinked+1), "want at most"},
	} {
		if _, err := Linked(row.image); !fault.Is(err, fault.Unsupported) || fault.Hint(err) == "" ||
			!strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: Linked = %v; want unsupported with %q and a hint", row.name, err, row.want)
		}
	}
}

func FuzzLinked(f *testing.F) {
	f.Add(bzImage(f, []byte("\x7fELF kernel"), len("\x7fELF kernel")))
	f.Add(imageOf(zstdOf(f, []byte("\x7fELF kernel")), len("\x7fELF kernel")))
	f.Fuzz(func(t *testing.T, image []byte) {
		if linked, err := Linked(image); err == nil && len(linked) > maxLinked {
			t.Errorf("a kernel of %d bytes", len(linked))
		}
	})
}
