package registry_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestLayoutHas checks that Has returns false for a blob that is too short or too long. Otherwise a delta would leave
// out that blob.
func TestLayoutHas(t *testing.T) {
	t.Parallel()
	dir, s, _ := publishSample(t)
	hash, err := v1.NewHash(s.Layers[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(dir, "blobs/sha256", hash.Hex)
	whole, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	d := v1.Descriptor{Digest: hash, Size: int64(len(whole))}
	for name, row := range map[string]struct {
		body []byte
		want bool
	}{
		"whole": {whole, true}, "cut off": {whole[:len(whole)-1], false}, "empty": {nil, false},
		"longer": {append(slices.Clone(whole), 0), false},
	} {
		if err := os.WriteFile(blob, row.body, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, ref := range []string{"oci:" + dir, "oci-archive:" + dir, "oci-archive:" + pack(t, folderEntries(t, dir)...)} {
			l, ok := open(t, ref).AsLayout()
			if !ok {
				t.Fatalf("%s is no layout", ref)
			}
			if got, err := l.Has(t.Context(), d); err != nil || got != row.want {
				t.Errorf("Has of a blob that is %s in %s = %t, %v; want %t", name, ref, got, err, row.want)
			}
		}
	}
}
