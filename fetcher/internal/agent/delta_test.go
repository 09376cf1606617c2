package agent_test

import (
	"bytes"
	"os"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

// archiveOf returns the uncompressed tar archive of a packed layer.
func archiveOf(t *testing.T, l bundle.Layer) *bytes.Buffer {
	t.Helper()
	f, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := bundle.OpenArchive(f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	return &b
}

// TestDelta updates a node to another COS build. The node should fetch the delta from its present modules to the new
// ones. If there is no delta, or the delta does not fit, the node must fetch the whole layer.
func TestDelta(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	for name, tc := range map[string]struct {
		// attach returns the bytes of the delta to attach; nil means that no delta is attached.
		attach func(delta []byte) []byte
		// spoil changes the present modules on the node's disk. It may be nil.
		spoil func(t *testing.T, n *node)
		// tried means that the node fetches a delta. whole means that the node fetches the whole layer.
		tried, whole bool
	}{
		"a delta is there": {attach: func(d []byte) []byte { return d }, tried: true},
		"none is":          {whole: true},
		"it is not what it says": {attach: func(d []byte) []byte { d[len(d)/2] ^= 1; return d }, tried: true,
			whole: true},
		"it is for somebody else's layer": {attach: func([]byte) []byte { return []byte("\x09\x00\x00\x00something") },
			tried: true, whole: true},
		"the former layer is not the same": {attach: func(d []byte) []byte { return d }, tried: true, whole: true,
			spoil: func(t *testing.T, n *node) {
				sample.Write(t, n.root, installDir+"/drivers/nvidia-uvm.ko", "changed")
			}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ref := testkit.Registry(t, true) + "/prebake/driver"
			a, b := sample.NewCell(t, buildA, newVersion), sample.NewCell(t, buildB, newVersion)
			a.Bulk, b.Bulk = 1<<20, 1<<20
			b.Kernel.Release, b.Fingerprint = "6.1.90+", "sha256:"+b.Fingerprint[len("sha256:")+2:]+"0b"
			old, fresh := sample.Publish(t, ref, key, a), sample.Publish(t, ref, key, b)
			var delta bytes.Buffer
			if err := bundle.WriteDelta(t.Context(), archiveOf(t, old.Layers[0]), archiveOf(t, fresh.Layers[0]),
				&delta); err != nil {
				t.Fatal(err)
			}
			attached := int64(0)
			if tc.attach != nil {
				payload := tc.attach(bytes.Clone(delta.Bytes()))
				attached = int64(len(payload))
				repo, err := registry.Open(ref, registry.Options{Plain: true})
				if err != nil {
					t.Fatal(err)
				}
				subject, err := repo.Resolve(t.Context(), fresh.Digest)
				if err != nil {
					t.Fatal(err)
				}
				from := map[string]string{bundle.AnnotationDeltaFrom: old.Layers[0].DiffID}
				var d v1.Descriptor
				if d, err = repo.Attach(t.Context(), subject, bundle.ArtifactTypeDelta, payload, from); err != nil {
					t.Fatal(d, err)
				}
			}
			n := newNode(t, a, 1, key)
			if r, err := n.run(t, ref, old.Digest, a.Driver); err != nil || !r.Changed {
				t.Fatalf("first run: %v, %+v", err, r)
			}
			sample.RootAt(t, n.root, b, 1)
			n.reboot(t)
			if tc.spoil != nil {
				tc.spoil(t, n)
			}
			r, err := n.run(t, ref, fresh.Digest, b.Driver)
			if err != nil || !r.Changed {
				t.Fatalf("after the update: %v, %+v", err, r)
			}
			var want int64
			if tc.tried {
				want += attached
			}
			if tc.whole {
				want += fresh.Layers[0].Size
			}
			if r.FetchedBytes != want {
				t.Errorf(
					"fetched %d bytes (%q); want %d of a layer of %d",
					r.FetchedBytes,
					r.Plan,
					want,
					fresh.Layers[0].Size,
				)
			}
		})
	}
}
