package ocistore

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// TestReadAgainOnceADay has damaged content that becomes intact. It must come back, but not before a day has passed
// since it was read last.
func TestReadAgainOnceADay(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 1, 0)
	sum := path.Base(paths[0])
	good, err := s.root.ReadFile(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.root.Remove(paths[0]), s.root.WriteFile("damaged/"+sum, []byte("bad"), 0o640)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for _, row := range []struct {
		after time.Duration
		want  []string
	}{{0, nil}, {6 * time.Hour, nil}, {24 * time.Hour, []string{"sha256:" + sum}}} {
		if back, err := s.restore(t.Context(), begin.Add(row.after)); err != nil || !slices.Equal(back, row.want) {
			t.Errorf("restore() after %v = %v, %v; want %v", row.after, back, err, row.want)
		}
		if row.after == 0 {
			if err := s.root.WriteFile("damaged/"+sum, good, 0o640); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// endFile is a file that calls a function when it was read to the end.
type endFile struct {
	fs.File
	ended func()
}

func (f endFile) Read(p []byte) (int, error) {
	n, err := f.File.Read(p)
	if errors.Is(err, io.EOF) {
		f.ended()
	}
	return n, err
}

// TestReplacedWhileReadAgain replaces content of the folder damaged after it was read. What was not read must not come
// back.
func TestReplacedWhileReadAgain(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 1, 0)
	aside := "damaged/" + path.Base(paths[0])
	if err := s.root.Rename(paths[0], aside); err != nil {
		t.Fatal(err)
	}
	s.openBlob = func(name string) (fs.File, error) {
		f, err := s.root.Open(name)
		return endFile{f, func() {
			if err := errors.Join(s.root.WriteFile("bad", []byte("bad"), 0o640), s.root.Rename("bad", aside)); err != nil {
				t.Error(err)
			}
		}}, err
	}
	if back, err := s.restore(t.Context(), time.Now()); err != nil || len(back) != 0 {
		t.Errorf("restore() = %v, %v; want nothing restored", back, err)
	}
	if have := there(t, s, []string{paths[0], aside}); !slices.Equal(have, []bool{false, true}) {
		t.Errorf("the blob and the damaged content are there: %v; want only the second", have)
	}
}

// cached returns how many pages of a file are in the page cache, and how many it has.
func cached(t *testing.T, name string) (n, all int) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(data); err != nil {
			t.Error(err)
		}
	}()
	pages := make([]byte, (len(data)+os.Getpagesize()-1)/os.Getpagesize())
	_, _, code := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&data[0])), uintptr(len(data)),
		uintptr(unsafe.Pointer(&pages[0])))
	if code != 0 {
		t.Skipf("mincore: %v", code)
	}
	for _, page := range pages {
		n += int(page & 1)
	}
	return n, len(pages)
}

// TestVerifyLeavesCache verifies a blob that is in the page cache. It must read the disk, and must not leave the blob
// in the cache. A file system that keeps everything in memory, such as tmpfs, cannot show that. The test notices such a
// file system by a control file, which it writes and flushes itself.
func TestVerifyLeavesCache(t *testing.T) {
	t.Parallel()
	s, _ := openFlaky(t, 0, 0)
	content := make([]byte, 3*cachedAtMost+1000)
	r := rand.NewChaCha8([32]byte{})
	if _, err := r.Read(content); err != nil {
		t.Fatal(err)
	}
	is := digest.FromBytes(content)
	if err := s.putBytes(is, content); err != nil {
		t.Fatal(err)
	}
	control, err := os.Create(filepath.Join(t.TempDir(), "control"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = control.Write(content)
	if err := errors.Join(err, control.Sync(), control.Close()); err != nil {
		t.Fatal(err)
	}
	blob := path.Join(s.root.Name(), blobPath(is.Encoded()))
	read := func(name string) {
		t.Helper()
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, content) {
			t.Fatalf("read %s: %v", name, err)
		}
	}
	drop := func(name string) {
		t.Helper()
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	drop(control.Name())
	if n, all := cached(t, control.Name()); n > all/10 {
		t.Skipf("the file system keeps %d of %d pages in memory: the test needs a TMPDIR on a disk, so no tmpfs", n, all)
	}
	drop(blob)
	if n, all := cached(t, blob); n > all/10 {
		t.Errorf("%d of %d pages of a new blob stay in the cache; want it on the disk", n, all)
	}
	read(blob)
	read(control.Name())
	if n, all := cached(t, control.Name()); n < all {
		t.Skipf("only %d of %d pages are in the cache after a read: the test needs more free memory", n, all)
	}
	if n, all := cached(t, blob); n < all {
		t.Fatalf("%d of %d pages of the blob are in the cache after a read, but all of another file", n, all)
	}
	if out, err := s.Verify(t.Context(), 1<<50, func(d Damage) { t.Errorf("damage %+v; want none", d) }); err != nil ||
		out.Blobs != 1 {
		t.Fatalf("Verify() = %+v, %v; want one blob", out, err)
	}
	if n, all := cached(t, blob); n > all/10 {
		t.Errorf("%d of %d pages are in the cache after a verification; want almost none", n, all)
	}
}
