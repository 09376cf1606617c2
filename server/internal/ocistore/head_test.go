package ocistore_test

import (
	"net/http"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/pkg/registry"
)

// TestTagOfDamaged damages a layer. A builder asks for a tag before it pushes, and must learn that the tag refers to
// the artifact. Otherwise it would push another artifact before the tag is refused. Its push of the same artifact must
// bring the layer back.
func TestTagOfDamaged(t *testing.T) {
	t.Parallel()
	h := hold(t, "prebake/driver:one")
	layer := blobs(t, h.img)[2]
	flip(t, blobFile(h.dir, layer))
	if found := verify(t, h.s); len(found) != 1 {
		t.Fatalf("Verify() found %+v; want the layer", found)
	}
	repo, err := registry.Open(h.host+"/prebake/driver", registry.Options{Username: "any", Password: token})
	if err != nil {
		t.Fatal(err)
	}
	is := digestOf(t, h.img)
	if got, err := repo.Resolve(t.Context(), "one"); err != nil || got.Digest != is {
		t.Errorf("Resolve(tag) = %+v, %v; want %s", got, err, is)
	}
	for _, row := range []struct {
		ref  string
		want int
	}{{"one", http.StatusOK}, {is.String(), http.StatusNotFound}} {
		if r := call(t, h.host, "HEAD", "/v2/prebake/driver/manifests/"+row.ref, ""); r.StatusCode != row.want {
			t.Errorf("HEAD of manifest %s by who may push = %s; want %d", row.ref, r.Status, row.want)
		}
	}
	if _, err := repo.Push(t.Context(), h.img); err != nil {
		t.Fatal(err)
	}
	if r := call(t, h.host, "HEAD", "/v2/prebake/driver/blobs/sha256:"+layer, ""); r.StatusCode != http.StatusOK {
		t.Errorf("HEAD of the layer after the push = %s; want 200", r.Status)
	}
	if n := h.s.Damaged(); n != 0 {
		t.Errorf("Damaged() after the push = %d; want 0", n)
	}
}

// TestDamageBelowIndex damages a manifest, or a layer of it, that an index in an index names. A push of the outer index
// must bring it back.
func TestDamageBelowIndex(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		choose func(t *testing.T, img v1.Image) string
	}{
		{"layer", func(t *testing.T, img v1.Image) string { t.Helper(); return blobs(t, img)[3] }},
		{"manifest", func(t *testing.T, img v1.Image) string { t.Helper(); return digestOf(t, img).Hex }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			host := listen(t, s)
			img := image(t)
			inner := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: image(t)}, mutate.IndexAddendum{Add: img})
			outer := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: inner}, mutate.IndexAddendum{Add: img})
			ref := reference(t, host, "a/x:1")
			if err := remote.WriteIndex(ref, outer, options(t)...); err != nil {
				t.Fatal(err)
			}
			name := row.choose(t, img)
			flip(t, blobFile(dir, name))
			if found := verify(t, s); len(found) != 1 {
				t.Fatalf("Verify() found %+v; want one", found)
			}
			if err := remote.WriteIndex(ref, outer, options(t)...); err != nil {
				t.Fatal(err)
			}
			if n := s.Damaged(); n != 0 {
				t.Errorf("Damaged() after the push = %d; want 0", n)
			}
			if r := call(t, host, "HEAD", "/v2/a/x/blobs/sha256:"+name, ""); r.StatusCode != http.StatusOK {
				t.Errorf("HEAD of the content after the push = %s; want 200", r.Status)
			}
		})
	}
}
