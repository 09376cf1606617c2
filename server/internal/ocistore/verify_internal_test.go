package ocistore

import (
	"os"
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
