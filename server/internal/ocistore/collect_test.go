package ocistore_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestCollectBesideDamage checks that a collection continues if a manifest is damaged, and keeps the blobs that this
// manifest names. If a manifest cannot be read at all, no blob may be removed.
func TestCollectBesideDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	host := listen(t, s)
	damaged, gone := image(t), image(t)
	for name, img := range map[string]v1.Image{"a/x:1": damaged, "a/x:2": gone} {
		if err := remote.Write(reference(t, host, name), img, options(t)...); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.DeleteManifest(t.Context(), "a/x", ociregistry.Digest(digestOf(t, gone).String())); err != nil {
		t.Fatal(err)
	}
	at := func(h v1.Hash) string { return filepath.Join(dir, "blobs/sha256", h.Hex[:2], h.Hex) }
	file := at(digestOf(t, damaged))
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	old := now.Add(-25 * time.Hour)
	// A folder in the place of the file makes the manifest unreadable.
	if err := errors.Join(os.Remove(file), os.Mkdir(file, 0o750)); err != nil {
		t.Fatal(err)
	}
	setAge(t, dir, old)
	if out, err := s.Collect(t.Context(), now); err == nil || out.Blobs != 0 {
		t.Errorf("Collect() beside an unreadable manifest = %+v, %v; want an error and nothing removed", out, err)
	}
	if err := errors.Join(os.Remove(file), os.WriteFile(file, content[:len(content)-1], 0o640)); err != nil {
		t.Fatal(err)
	}
	setAge(t, dir, old)
	out, err := s.Collect(t.Context(), now)
	if err != nil || out.Blobs != 5 || !slices.Equal(out.Damaged, []string{digestOf(t, damaged).String()}) {
		t.Errorf("Collect() beside a damaged manifest = %+v, %v; want the other image's 5 blobs removed", out, err)
	}
	layers, err := damaged.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(at(h)); err != nil {
			t.Errorf("a layer of the damaged image: %v; want it kept", err)
		}
	}
}
