package ocistore_test

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// TestForgetFails checks that the registry keeps a manifest if Forget fails. If the manifest is already gone, a DELETE
// must still call Forget.
func TestForgetFails(t *testing.T) {
	t.Parallel()
	calls, trouble := 0, errors.New("the database is away")
	s := openWith(t, t.TempDir(), ocistore.Options{Forget: func(string, ociregistry.Digest) error {
		calls++
		return trouble
	}})
	host := listen(t, s)
	img := image(t)
	if err := remote.Write(reference(t, host, "a/x:1"), img, options(t)...); err != nil {
		t.Fatal(err)
	}
	manifest := "/v2/a/x/manifests/" + digestOf(t, img).String()
	for _, row := range []struct {
		trouble error
		method  string
		status  int
		calls   int
	}{
		{trouble, "DELETE", http.StatusInternalServerError, 1},
		{trouble, "GET", http.StatusOK, 0},
		{nil, "DELETE", http.StatusAccepted, 2},
		{trouble, "DELETE", http.StatusInternalServerError, 1}, // the manifest is already gone
		{nil, "DELETE", http.StatusNotFound, 1},
	} {
		calls, trouble = 0, row.trouble
		if r := call(t, host, row.method, manifest, ""); r.StatusCode != row.status || calls != row.calls {
			t.Errorf("%s with the error %v of Forget = %s, %d calls; want %d, %d calls", row.method, row.trouble, r.Status,
				calls, row.status, row.calls)
		}
	}
}

// TestRefusedDeletionForgetsNothing checks that a deletion that fails because of an unreadable tag changes nothing
// before.
func TestRefusedDeletionForgetsNothing(t *testing.T) {
	t.Parallel()
	dir, forgotten := t.TempDir(), 0
	s := openWith(t, dir, ocistore.Options{Forget: func(string, ociregistry.Digest) error {
		forgotten++
		return nil
	}})
	host := listen(t, s)
	img := image(t)
	if err := remote.Write(reference(t, host, "a/x:good"), img, options(t)...); err != nil {
		t.Fatal(err)
	}
	unreadable := filepath.Join(dir, "repos/a/x/_tags/z") // its name comes after that of the other tag
	if err := os.Mkdir(unreadable, 0o750); err != nil {
		t.Fatal(err)
	}
	manifest := "/v2/a/x/manifests/" + digestOf(t, img).String()
	r := call(t, host, "DELETE", manifest, "")
	if r.StatusCode != http.StatusInternalServerError || forgotten != 0 {
		t.Errorf("DELETE beside an unreadable tag = %s after %d calls of Forget; want 500 and none", r.Status, forgotten)
	}
	if r := call(t, host, "GET", "/v2/a/x/manifests/good", ""); r.StatusCode != http.StatusOK {
		t.Errorf("GET of the readable tag after that = %s; want 200", r.Status)
	}
	if err := os.Remove(unreadable); err != nil {
		t.Fatal(err)
	}
	if r := call(t, host, "DELETE", manifest, ""); r.StatusCode != http.StatusAccepted || forgotten != 2 {
		t.Errorf("DELETE = %s after %d calls of Forget; want 202 and 2", r.Status, forgotten)
	}
}
