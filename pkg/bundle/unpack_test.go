package bundle

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(s[:])
}

func compress(t testing.TB, plain []byte) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return enc.EncodeAll(plain, nil)
}

// archive returns a tar with the given headers. The content of a regular file is its own name.
func archive(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write([]byte(h.Name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func dir(name string) *tar.Header  { return &tar.Header{Typeflag: tar.TypeDir, Name: name + "/"} }
func file(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: name} }
func link(name, to string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
}

func unpackBytes(t testing.TB, packed, plain []byte, limit int64) (string, error) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	return dir, unpack(t.Context(), bytes.NewReader(packed), sum(packed), sum(plain), int64(len(packed)), root, limit)
}

// counter counts the bytes that are read.
type counter struct {
	r io.Reader
	n int
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

// TestUnpackStopsReading checks that Unpack does not read the rest of a layer if it cannot write a file.
func TestUnpackStopsReading(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), nil, 0o644); err != nil { // so Unpack cannot make this file
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	plain := archive(t, file("a"))
	packed := compress(t, plain)
	rest := make([]byte, 8<<20)
	all := &counter{r: io.MultiReader(bytes.NewReader(packed), bytes.NewReader(rest))}
	err = Unpack(t.Context(), all, sum(packed), sum(plain), int64(len(packed)+len(rest)), root)
	if !errors.Is(err, os.ErrExist) || all.n > 1<<20 {
		t.Errorf("Unpack = %v after %d bytes; want that the file exists, after the first bytes", err, all.n)
	}
}

func TestUnpackEntries(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name    string
		headers []*tar.Header
		ok      bool
	}{
		{"plain", []*tar.Header{dir("bin"), file("bin/a"), link("bin/b", "a")}, true},
		{"empty", nil, true},
		{"link up to a folder of the tree", []*tar.Header{dir("a"), dir("a/b"), link("a/b/c", "../..")}, true},
		{"link that leads out", []*tar.Header{dir("a"), link("a/b", "../../x")}, false},
		{"link to the parent", []*tar.Header{link("a", "..")}, false},
		{"absolute link", []*tar.Header{link("a", "/etc/passwd")}, false},
		{"link that climbs behind another",
			[]*tar.Header{dir("a"), dir("a/b"), link("a/b/s", "../.."), link("t", "a/b/s/../x")}, false},
		{"empty link", []*tar.Header{link("a", "")}, false},
		{"file through a link", []*tar.Header{dir("bin"), link("l", "bin"), file("l/a")}, false},
		{"folder through a link", []*tar.Header{dir("bin"), link("l", "bin"), dir("l/a")}, false},
		{"hard link", []*tar.Header{file("a"), {Typeflag: tar.TypeLink, Name: "b", Linkname: "a"}}, false},
		{"device", []*tar.Header{{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}}, false},
		{"pipe", []*tar.Header{{Typeflag: tar.TypeFifo, Name: "p"}}, false},
		{"absolute name", []*tar.Header{file("/a")}, false},
		{"dots in the name", []*tar.Header{file("../a")}, false},
		{"dots inside the name", []*tar.Header{dir("a"), file("a/../b")}, false},
		{"dot folder", []*tar.Header{dir(".")}, false},
		{"leading ./", []*tar.Header{file("./a")}, false},
		{"double slash", []*tar.Header{dir("a"), file("a//b")}, false},
		{"same file twice", []*tar.Header{file("a"), file("a")}, false},
		{"same folder twice", []*tar.Header{dir("a"), dir("a")}, false},
		{"folder, then link", []*tar.Header{dir("a"), link("a", "b")}, false},
		{"no parent", []*tar.Header{file("a/b")}, false},
		{"file as parent", []*tar.Header{file("a"), file("a/b")}, false},
		{"attributes", []*tar.Header{{Typeflag: tar.TypeReg, Name: "a",
			PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"}}}, false},
		{"overlong name", []*tar.Header{file(strings.Repeat("a", maxName+1))}, false},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			plain := archive(t, row.headers...)
			out, err := unpackBytes(t, compress(t, plain), plain, maxBytes)
			if row.ok != (err == nil) {
				t.Fatalf("Unpack = %v; want success %v", err, row.ok)
			}
			if !row.ok && !fault.Is(err, fault.Unverified) {
				t.Errorf("Unpack = %v of kind %v; want unverified", err, fault.Of(err))
			}
			if entries, _ := os.ReadDir(filepath.Dir(out)); len(entries) != 1 {
				t.Errorf("something was written beside the folder: %v", entries)
			}
		})
	}
}

// TestUnpackBoundsTheWindow checks that Unpack refuses a layer that needs much memory to decompress. The test
// compresses with the program zstd, whose option wlog is the binary logarithm of the window's size in bytes (see
// zstd(1)).
func TestUnpackBoundsTheWindow(t *testing.T) {
	t.Parallel()
	zstd := installed.Program(t, "zstd")
	plain := archive(t, dir("drivers"), file("drivers/nvidia.ko"))
	for wlog, ok := range map[string]bool{
		"22": true, // 4 MiB, as PackLayer writes it
		"23": true, // 8 MiB, as builders with the recipe tar-zstd-1 wrote it
		"24": false,
	} {
		cmd := exec.CommandContext(t.Context(), zstd, "--zstd=wlog="+wlog, "-c")
		cmd.Stdin = struct{ io.Reader }{bytes.NewReader(plain)} // a pipe has no size to which zstd could fit the window
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		_, err = unpackBytes(t, packed, plain, maxBytes)
		if ok && err != nil || !ok && !fault.Is(err, fault.Unverified) {
			t.Errorf("unpack a layer with a window of 2^%s bytes: %v; want success %t", wlog, err, ok)
		}
	}
}

func TestUnpackModes(t *testing.T) {
	t.Parallel()
	plain := archive(t, &tar.Header{Typeflag: tar.TypeReg, Name: "suid", Mode: 0o6711},
		&tar.Header{Typeflag: tar.TypeReg, Name: "open", Mode: 0o666})
	out, err := unpackBytes(t, compress(t, plain), plain, maxBytes)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"suid": 0o755, "open": 0o644} {
		if info, err := os.Stat(filepath.Join(out, name)); err != nil || info.Mode() != want {
			t.Errorf("mode of %s = %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
}

func TestUnpackVerifies(t *testing.T) {
	t.Parallel()
	plain := archive(t, dir("bin"), file("bin/a"))
	packed := compress(t, plain)
	flipped := bytes.Clone(packed)
	flipped[len(flipped)/2] ^= 1
	behind := append(bytes.Clone(plain), []byte("hidden")...)
	padded := append(bytes.Clone(plain), make([]byte, 4096)...)
	bomb := append(bytes.Clone(plain), make([]byte, 8<<20)...)
	junk := append(bytes.Clone(packed), "junk"...)
	two := append(bytes.Clone(packed), compress(t, plain)...)
	rows := []struct {
		name         string
		packed       []byte
		digest, diff string
		size         int64
		text         string // part of the error; "" means success
	}{
		{"good", packed, sum(packed), sum(plain), int64(len(packed)), ""},
		{"padding only", compress(t, padded), sum(compress(t, padded)), sum(padded), int64(len(compress(t, padded))), ""},
		{"flipped byte", flipped, sum(packed), sum(plain), int64(len(packed)), "stream has digest"},
		{"one byte short", packed[:len(packed)-1], sum(packed), sum(plain), int64(len(packed)), "bytes; the manifest says"},
		{"one byte more", append(bytes.Clone(packed), 0), sum(packed), sum(plain), int64(len(packed)), "longer than"},
		{"empty", nil, sum(packed), sum(plain), int64(len(packed)), "stream has 0 bytes"},
		{"another tar", packed, sum(packed), sum(padded), int64(len(packed)), "unpacked layer has digest"},
		{"data behind the archive", compress(t, behind), sum(compress(t, behind)), sum(behind),
			int64(len(compress(t, behind))), "after the end"},
		{"junk behind the frame", junk, sum(junk), sum(plain), int64(len(junk)), "magic"},
		{"a second archive", two, sum(two), sum(append(bytes.Clone(plain), plain...)), int64(len(two)), "after the end"},
		{"bomb", compress(t, bomb), sum(compress(t, bomb)), sum(bomb), int64(len(compress(t, bomb))), "unpacks to more than"},
		{"not zstd", plain, sum(plain), sum(plain), int64(len(plain)), "magic"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			root := emptyRoot(t)
			err := unpack(t.Context(), bytes.NewReader(row.packed), row.digest, row.diff, row.size, root, 1<<20)
			switch {
			case row.text == "" && err != nil:
				t.Errorf("Unpack = %v; want success", err)
			case row.text != "" && (!fault.Is(err, fault.Unverified) || !strings.Contains(err.Error(), row.text)):
				t.Errorf("Unpack = %v (%v); want unverified with %q", err, fault.Of(err), row.text)
			}
		})
	}
}

type brokenReader struct{ err error }

func (b brokenReader) Read([]byte) (int, error) { return 0, b.err }

func TestUnpackReportsTheSource(t *testing.T) {
	t.Parallel()
	plain := archive(t, dir("bin"), file("bin/a"))
	packed := compress(t, plain)
	root := emptyRoot(t)
	cut := errors.New("connection reset")
	r := io.MultiReader(bytes.NewReader(packed[:20]), brokenReader{fault.Wrap(fault.Transient, cut, "")})
	err := Unpack(t.Context(), r, sum(packed), sum(plain), int64(len(packed)), root)
	if !fault.Is(err, fault.Transient) || !errors.Is(err, cut) {
		t.Errorf("Unpack(broken source) = %v (%v); want the source's error", err, fault.Of(err))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Unpack(ctx, bytes.NewReader(packed), sum(packed), sum(plain), int64(len(packed)), root); !fault.Is(err,
		fault.Cancelled) {
		t.Errorf("Unpack(cancelled) = %v; want kind cancelled", err)
	}
}

func TestUnpackBoundsEntries(t *testing.T) {
	t.Parallel()
	root := emptyRoot(t)
	x := &extractor{dst: root, seen: map[string]byte{}}
	for i := range maxEntries - 1 {
		x.seen[hex.EncodeToString([]byte{byte(i >> 16), byte(i >> 8), byte(i)})] = tar.TypeReg
	}
	if err := x.run(tar.NewReader(bytes.NewReader(archive(t, file("last"))))); err != nil {
		t.Errorf("entry number %d: %v; want it accepted", maxEntries, err)
	}
	if err := x.run(tar.NewReader(bytes.NewReader(archive(t, file("more"))))); !fault.Is(err, fault.Unverified) {
		t.Errorf("entry number %d: %v; want kind unverified", maxEntries+1, err)
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, dir("bin"), file("bin/a"), link("bin/b", "a")), false)
	f.Add(archive(f, dir("a"), link("a/b", "../../x"), file("a/b/c")), false)
	f.Add(archive(f, file(strings.Repeat("n", 200))), false)
	f.Add(archive(f, &tar.Header{Typeflag: tar.TypeLink, Name: "b", Linkname: "a"}), false)
	f.Add(compress(f, archive(f, dir("bin"), file("bin/a"))), true)
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd}, true)
	f.Fuzz(func(t *testing.T, data []byte, raw bool) {
		if len(data) > 1<<20 {
			return
		}
		packed, plain := data, data
		if !raw {
			packed = compress(t, data)
		}
		out, err := unpackBytes(t, packed, plain, 8<<20)
		if entries, _ := os.ReadDir(filepath.Dir(out)); len(entries) != 1 {
			t.Fatalf("something was written beside the folder: %v", entries)
		}
		if err == nil {
			return
		}
		if k := fault.Of(err); k != fault.Unverified && k != fault.Internal {
			t.Errorf("Unpack = %v of kind %v", err, k)
		}
	})
}
