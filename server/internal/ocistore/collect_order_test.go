package ocistore_test

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestCollectReadsNamedManifests checks an image that another manifest names. If a collection reads that other manifest
// first, it must still keep the blobs of the image. It reads manifests in the order of their digests, so the test makes
// images until the order is right.
func TestCollectReadsNamedManifests(t *testing.T) {
	t.Parallel()
	t.Run("an index", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		host := serve(t, dir)
		var child v1.Image
		var index v1.ImageIndex
		for {
			child = image(t)
			index = mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: child})
			if d, err := index.Digest(); err != nil {
				t.Fatal(err)
			} else if d.Hex < digestOf(t, child).Hex {
				break
			}
		}
		if err := remote.WriteIndex(reference(t, host, "a/x:1"), index, options(t)...); err != nil {
			t.Fatal(err)
		}
		collectTwice(t, dir)
		checkBlobs(t, host, child)
	})
	t.Run("a damaged attachment", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		host := serve(t, dir)
		subject := image(t)
		desc, err := partial.Descriptor(subject)
		if err != nil {
			t.Fatal(err)
		}
		var attached v1.Image
		for {
			attached = mutate.Subject(image(t), *desc).(v1.Image)
			if digestOf(t, attached).Hex < desc.Digest.Hex {
				break
			}
			if desc.Digest.Hex < "1" { // hardly any digest is smaller than this one
				subject = image(t)
				if desc, err = partial.Descriptor(subject); err != nil {
					t.Fatal(err)
				}
			}
		}
		for name, img := range map[string]v1.Image{"a/x:1": subject, "a/x:2": attached} {
			if err := remote.Write(reference(t, host, name), img, options(t)...); err != nil {
				t.Fatal(err)
			}
		}
		d := digestOf(t, attached)
		raw, err := attached.RawManifest()
		if err != nil {
			t.Fatal(err)
		}
		// Even without its last byte, the manifest still has the digest of its subject.
		cut := raw[:len(raw)-1]
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Hex[:2], d.Hex), cut, 0o640); err != nil {
			t.Fatal(err)
		}
		collectTwice(t, dir)
		checkBlobs(t, host, subject)
	})
}

// collectTwice runs two collections. Before each, it makes all files a day old, so that unneeded blobs are removed.
func collectTwice(t *testing.T, dir string) {
	t.Helper()
	s := open(t, dir)
	for range 2 {
		now := time.Now()
		setAge(t, dir, now.Add(-25*time.Hour))
		if _, err := s.Collect(t.Context(), now); err != nil {
			t.Fatal(err)
		}
	}
}

// checkBlobs checks that the registry has the config and all layers of an image.
func checkBlobs(t *testing.T, host string, img v1.Image) {
	t.Helper()
	for _, name := range blobs(t, img) {
		if r := call(t, host, "HEAD", "/v2/a/x/blobs/sha256:"+name, ""); r.StatusCode != http.StatusOK {
			t.Errorf("HEAD of blob %s = %s; want 200", name, r.Status)
		}
	}
}
