package ocistore

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestReplacedBlobStays checks that a blob which a push has replaced, after its content was read, is not moved aside.
func TestReplacedBlobStays(t *testing.T) {
	t.Parallel()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	content := []byte("good")
	d := digest.FromBytes(content)
	path := blobPath(d.Encoded())
	if err := s.putBytes(d, content); err != nil {
		t.Fatal(err)
	}
	if err := s.root.WriteFile(path, []byte("bad"), 0o640); err != nil {
		t.Fatal(err)
	}
	f, err := s.root.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.putBytes(d, content); err != nil {
		t.Fatal(err)
	}
	moved, err := s.moveAside(f, d)
	if got, rerr := s.root.ReadFile(path); moved || err != nil || string(got) != "good" {
		t.Errorf("moveAside() of a replaced blob = %t, %v, and the blob is %q, %v; want it kept", moved, err, got, rerr)
	}
	if err := s.root.Remove(path); err != nil {
		t.Fatal(err)
	}
	if moved, err := s.moveAside(f, d); moved || err != nil {
		t.Errorf("moveAside() of a removed blob = %t, %v; want false", moved, err)
	}
	if _, err := s.root.Stat("damaged/" + d.Encoded()); !os.IsNotExist(err) {
		t.Errorf("the folder damaged has it: %v", err)
	}
}

// flaky is a file whose reads fail.
type flaky struct{ fs.File }

func (flaky) Read([]byte) (int, error) { return 0, syscall.EIO }

// openFlaky opens a registry with n blobs and no manifest. The first fail reads of each blob return an error. paths are
// in the order of a verification.
func openFlaky(t *testing.T, n, fail int) (s *Store, paths []string) {
	t.Helper()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		content := []byte{byte(i)}
		d := digest.FromBytes(content)
		if err := s.putBytes(d, content); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, blobPath(d.Encoded()))
	}
	slices.Sort(paths)
	failed := map[string]int{}
	s.openBlob = func(name string) (fs.File, error) {
		f, err := s.root.Open(name)
		if failed[name]++; err == nil && failed[name] <= fail {
			return flaky{f}, nil
		}
		return f, err
	}
	return s, paths
}

// there returns which files exist.
func there(t *testing.T, s *Store, paths []string) (have []bool) {
	t.Helper()
	for _, p := range paths {
		_, err := s.root.Stat(p)
		have = append(have, err == nil)
	}
	return have
}

// TestFailedReadOnce checks that a blob is read once more before it is moved aside.
func TestFailedReadOnce(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 3, 1)
	out, err := s.Verify(t.Context(), 1<<50, func(d Damage) { t.Errorf("damage %+v; want none", d) })
	if have := there(t, s, paths); err != nil || out.Damaged != 0 || slices.Contains(have, false) {
		t.Errorf("Verify() after one failed read of each blob = %+v, %v, and the blobs are there: %v; want all", out, err, have)
	}
}

// TestFailedReads checks that a pass ends at the second file in a row that cannot be read, and that a later one goes on
// there. When the disk works again, a collection moves the content back, unless a push has done so.
func TestFailedReads(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 4, 4)
	for i, want := range [][]bool{{false, true, true, true}, {false, false, true, true}} {
		var found []Damage
		_, err := s.Verify(t.Context(), 1<<50, func(d Damage) { found = append(found, d) })
		have := there(t, s, paths)
		if !errors.Is(err, syscall.EIO) || len(found) != 1 || !slices.Equal(have, want) {
			t.Errorf("pass %d = %v, found %+v, and the blobs are there: %v; want EIO, one, %v", i, err, found, have, want)
		}
	}
	if err := s.root.WriteFile("damaged/"+path.Base(paths[1]), []byte("bad"), 0o640); err != nil {
		t.Fatal(err)
	}
	out, err := s.Collect(t.Context(), s.now())
	have, want := there(t, s, paths), []string{"sha256:" + path.Base(paths[0])}
	if err != nil || !slices.Equal(out.Restored, want) || !slices.Equal(have, []bool{true, false, true, true}) {
		t.Errorf("Collect() = %v, restored %v, and the blobs are there: %v; want the first one back", err, out.Restored, have)
	}
	if n := s.Damaged(); n != 0 {
		t.Errorf("Damaged() after the collection = %d; want 0", n)
	}
}
