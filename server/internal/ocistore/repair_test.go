package ocistore_test

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestRepair damages a manifest in several ways, and pushes the same image again. The push must repair the manifest,
// even if a collection or a deletion comes first.
func TestRepair(t *testing.T) {
	t.Parallel()
	truncated := func(content []byte) []byte { return content[:len(content)-1] }
	flipped := func(content []byte) []byte { content[len(content)-1] ^= 1; return content }
	lost := func([]byte) []byte { return nil }
	for _, row := range []struct {
		name    string
		damage  func([]byte) []byte
		collect bool // a collection comes before the push
		remove  bool // the manifest is deleted before the push
	}{
		{"truncated", truncated, false, false},
		{"truncated, collected", truncated, true, false},
		{"truncated, deleted", truncated, false, true},
		{"flipped", flipped, false, false},
		{"flipped, collected", flipped, true, false},
		{"flipped, deleted", flipped, false, true},
		{"flipped, collected, deleted", flipped, true, true},
		{"lost", lost, false, false},
		{"lost, collected", lost, true, false},
		{"lost, deleted", lost, false, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := hold(t, "prebake/driver:one")
			dir, host, s, ref, img := h.dir, h.host, h.s, h.ref, h.img
			d := digestOf(t, img)
			manifest := "/v2/prebake/driver/manifests/" + d.String()
			good, err := img.RawManifest()
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, "blobs/sha256", d.Hex[:2], d.Hex)
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if bad := row.damage(slices.Clone(good)); bad != nil {
				if err := os.WriteFile(file, bad, 0o640); err != nil {
					t.Fatal(err)
				}
			}
			collect := func(damaged ...string) {
				t.Helper()
				setAge(t, dir, time.Now().Add(-25*time.Hour))
				out, err := s.Collect(t.Context(), time.Now())
				if err != nil || !slices.Equal(out.Damaged, damaged) {
					t.Errorf("Collect() = %+v, %v; want %v damaged", out, err, damaged)
				}
			}
			if row.collect {
				collect(d.String())
				collect(d.String()) // the first collection moved the content away; the blobs of the manifest must still stay
			}
			if has, err := s.HasManifest(t.Context(), "prebake/driver", d.String()); err != nil || has {
				t.Errorf("HasManifest() = %t, %v; want false", has, err)
			}
			for _, at := range []string{manifest, "/v2/prebake/driver/manifests/one"} {
				for _, method := range []string{"GET", "HEAD"} {
					if r := call(t, host, method, at, ""); r.StatusCode != http.StatusNotFound {
						t.Errorf("%s %s before the push = %s; want 404", method, at, r.Status)
					}
				}
			}
			if row.remove {
				if r := call(t, host, "DELETE", manifest, ""); r.StatusCode != http.StatusAccepted {
					t.Errorf("DELETE = %s; want 202", r.Status)
				}
				if r := call(t, host, "GET", manifest, ""); r.StatusCode != http.StatusNotFound {
					t.Errorf("GET after DELETE = %s; want 404", r.Status)
				}
			}
			layers := blobs(t, img)[1:]
			if row.damage(slices.Clone(good)) != nil { // if the manifest is lost, its blobs are not known
				for _, name := range layers {
					if r := call(t, host, "HEAD", "/v2/prebake/driver/blobs/sha256:"+name, ""); r.StatusCode != http.StatusOK {
						t.Errorf("HEAD of blob %s before the push = %s; want 200", name, r.Status)
					}
				}
			}
			if err := remote.Write(ref, img, options(t)...); err != nil {
				t.Fatalf("push again = %v", err)
			}
			for _, at := range []string{manifest, "/v2/prebake/driver/manifests/one"} {
				r := call(t, host, "GET", at, "")
				if got, err := io.ReadAll(r.Body); err != nil || r.StatusCode != http.StatusOK || string(got) != string(good) {
					t.Errorf("GET %s after the push = %s %s, %v; want the right content", at, r.Status, got, err)
				}
			}
			collect()
			if left, err := os.ReadDir(filepath.Join(dir, "damaged")); err != nil || len(left) != 0 {
				t.Errorf("damaged content after the repair: %v, %v; want none", left, err)
			}
		})
	}
}

// TestRepairBeforeCollection pushes a manifest again whose content is damaged but has the right size. Only the digest
// shows this damage, and the push must repair it.
func TestRepairBeforeCollection(t *testing.T) {
	t.Parallel()
	h := hold(t, "a/x:1")
	dir, host, img := h.dir, h.host, h.img
	good, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	d := digestOf(t, img)
	file := filepath.Join(dir, "blobs/sha256", d.Hex[:2], d.Hex)
	bad := slices.Clone(good)
	bad[0] ^= 1
	if err := errors.Join(os.Remove(file), os.WriteFile(file, bad, 0o640)); err != nil {
		t.Fatal(err)
	}
	r := call(t, host, "PUT", "/v2/a/x/manifests/1", string(good), "Content-Type",
		"application/vnd.oci.image.manifest.v1+json")
	if r.StatusCode != http.StatusCreated {
		t.Fatalf("PUT = %s; want 201", r.Status)
	}
	r = call(t, host, "GET", "/v2/a/x/manifests/"+d.String(), "")
	if got, err := io.ReadAll(r.Body); err != nil || string(got) != string(good) {
		t.Errorf("GET after PUT = %s %s, %v; want the right content", r.Status, got, err)
	}
}

// TestDamagedReferrer changes a byte of an attached manifest. The list of referrers still names it, because the
// registry does not read the manifests for a list. A request for the manifest gets status 404, and a push repairs it.
func TestDamagedReferrer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	host := serve(t, dir)
	subject := image(t)
	desc, err := partial.Descriptor(subject)
	if err != nil {
		t.Fatal(err)
	}
	attached := mutate.Subject(image(t), *desc).(v1.Image)
	d := digestOf(t, attached)
	at := reference(t, host, "a/x@"+d.String())
	if err := remote.Write(at, attached, options(t)...); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "blobs/sha256", d.Hex[:2], d.Hex)
	raw, err := attached.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	bad := slices.Clone(raw)
	bad[0] ^= 1
	if err := errors.Join(os.Remove(file), os.WriteFile(file, bad, 0o640)); err != nil {
		t.Fatal(err)
	}
	r := call(t, host, "GET", "/v2/a/x/referrers/"+desc.Digest.String(), "")
	if list, err := io.ReadAll(r.Body); err != nil || !strings.Contains(string(list), d.String()) {
		t.Errorf("GET of the referrers = %s %s, %v; want the damaged one among them", r.Status, list, err)
	}
	manifest := "/v2/a/x/manifests/" + d.String()
	if r := call(t, host, "GET", manifest, ""); r.StatusCode != http.StatusNotFound {
		t.Errorf("GET of the damaged referrer = %s; want 404", r.Status)
	}
	if err := remote.Write(at, attached, options(t)...); err != nil {
		t.Fatal(err)
	}
	r = call(t, host, "GET", manifest, "")
	if got, err := io.ReadAll(r.Body); err != nil || string(got) != string(raw) {
		t.Errorf("GET after the push = %s %s, %v; want the right content", r.Status, got, err)
	}
}
