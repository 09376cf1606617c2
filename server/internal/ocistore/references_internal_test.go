package ocistore

import (
	"encoding/json"
	"errors"
	"os"
	"path"
	"runtime"
	"strconv"
	"testing"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
)

// TestReferencesAreSmall checks how much memory a collection needs for the digest of a manifest or a blob. A registry
// may have a million of them. It does not run beside other tests, because it measures the heap.
func TestReferencesAreSmall(t *testing.T) {
	s, _ := openFlaky(t, 0, 0)
	const manifests, layers = 5000, 4
	put := func(name string, content []byte) {
		t.Helper()
		file := s.root.Name() + "/" + name
		if err := errors.Join(os.MkdirAll(path.Dir(file), 0o750), os.WriteFile(file, content, 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range manifests {
		m := manifest{Config: &ociregistry.Descriptor{Digest: ociregistry.Digest(digest.FromString("config"))}}
		for l := range layers { // layers of this type need not be there, so this test writes fewer files
			m.Layers = append(m.Layers, ociregistry.Descriptor{
				MediaType: "application/vnd.oci.image.layer.nondistributable.v1.tar",
				Digest:    ociregistry.Digest(digest.FromString(strconv.Itoa(i*layers + l))),
			})
		}
		content, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		sum := digest.FromBytes(content).Encoded()
		put(blobPath(sum), content)
		put("repos/a/x/_manifests/"+sum, nil)
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	refs, err := s.referencedBlobs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const all = manifests*(1+layers) + 1
	each := int64(heap()-before) / all
	if lost := digest.FromString("config").Encoded(); !refs.names(lost) || !refs.absent[lost] {
		t.Error("the references lack the config")
	}
	if each > 80 {
		t.Errorf("the references need %d bytes for each of %d digests; want at most 80", each, all)
	}
}
