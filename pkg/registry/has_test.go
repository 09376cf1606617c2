package registry_test

import (
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/distribution"
)

// TestLayoutHas checks that Has returns false for a blob with too few or too many bytes. Otherwise a delta would leave
// out the blob, although the layout does not have it.
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

// TestHasBlobWithoutHead checks that GET decides where a registry's HEAD knows no blob. Users recorded such answers for
// blobs that GET returned: 404 (artifact-keeper/artifact-keeper#3605, 2026-08-31) and 403 (ECR Public,
// SgtSilvio/gradle-oci#154, 2026-09-11).
func TestHasBlobWithoutHead(t *testing.T) {
	t.Parallel()
	behind := testkit.Registry(t, true)
	sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	if _, err := open(t, behind+"/x").Push(t.Context(), sample.Image); err != nil {
		t.Fatal(err)
	}
	for _, status := range []int{http.StatusNotFound, http.StatusForbidden, http.StatusMethodNotAllowed} {
		repo := open(t, startProxy(t, behind, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodHead || !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			w.WriteHeader(status)
			return true
		}, nil)+"/x")
		present, err := v1.NewHash(sample.Layers[0].Digest)
		if err != nil {
			t.Fatal(err)
		}
		d := v1.Descriptor{Digest: present, Size: sample.Layers[0].Size}
		if has, err := repo.HasBlob(t.Context(), d); err != nil || !has {
			t.Errorf("status %d to HEAD: HasBlob of a layer = %t, %v; want true", status, has, err)
		}
		d.Digest.Hex = strings.Repeat("0", 64)
		if has, err := repo.HasBlob(t.Context(), d); err != nil || has {
			t.Errorf("status %d to HEAD: HasBlob of another blob = %t, %v; want false", status, has, err)
		}
	}
}

// TestHasBlob checks that HasBlob is right about a blob that the repository has, and about one that it lacks.
func TestHasBlob(t *testing.T) {
	t.Parallel()
	all := places(t)
	all["another registry"] = open(t, distribution.Start(t)+"/prebake/driver")
	for name, r := range all {
		sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
		if _, err := r.Push(t.Context(), sample.Image); err != nil {
			t.Fatal(err)
		}
		present, err := v1.NewHash(sample.Layers[0].Digest)
		if err != nil {
			t.Fatal(err)
		}
		d := v1.Descriptor{Digest: present, Size: sample.Layers[0].Size}
		if has, err := r.HasBlob(t.Context(), d); err != nil || !has {
			t.Errorf("%s: HasBlob of a layer = %t, %v; want true", name, has, err)
		}
		d.Digest.Hex = strings.Repeat("0", 64)
		if has, err := r.HasBlob(t.Context(), d); err != nil || has {
			t.Errorf("%s: HasBlob of another blob = %t, %v; want false", name, has, err)
		}
	}
}
