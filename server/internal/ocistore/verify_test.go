package ocistore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/server/internal/ocistore"
)

// fast is a rate in bytes per second that makes no test wait.
const fast = 1 << 50

// verify reads all blobs of a registry, and returns the damage that it found.
func verify(t *testing.T, s *ocistore.Store) (found []ocistore.Damage) {
	t.Helper()
	_, err := s.Verify(t.Context(), fast, func(d ocistore.Damage) { found = append(found, d) })
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// flip changes the first byte of a file.
func flip(t *testing.T, file string) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	content[0] ^= 1
	if err := errors.Join(os.Remove(file), os.WriteFile(file, content, 0o640)); err != nil {
		t.Fatal(err)
	}
}

// held is a registry in a folder, with one image.
type held struct {
	dir, host string
	s         *ocistore.Store
	ref       name.Reference
	img       v1.Image
}

// hold starts a registry, and pushes an image with three layers as REPOSITORY:TAG.
func hold(t *testing.T, at string) held {
	t.Helper()
	dir := t.TempDir()
	s := open(t, dir)
	host := listen(t, s)
	h := held{dir, host, s, reference(t, host, at), image(t)}
	if err := remote.Write(h.ref, h.img, options(t)...); err != nil {
		t.Fatal(err)
	}
	return h
}

func blobFile(dir, sum string) string { return filepath.Join(dir, "blobs/sha256", sum[:2], sum) }

// TestDamagedBlob damages or removes a layer, lets a verification or a collection find the damage, and pushes the
// artifact again. The push must restore the layer. Until then, nodes may still read the manifest.
func TestDamagedBlob(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		damage func(t *testing.T, file string)
		verify bool // whether a verification finds the damage, and not only a collection
	}{
		{"flipped", flip, true},
		{"truncated", func(t *testing.T, file string) {
			t.Helper()
			if err := os.Truncate(file, 10); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"unreadable", func(t *testing.T, file string) {
			t.Helper()
			if err := errors.Join(os.Remove(file), os.Symlink(".", file)); err != nil { // a folder cannot be read
				t.Fatal(err)
			}
		}, true},
		{"lost", func(t *testing.T, file string) {
			t.Helper()
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			h := hold(t, "prebake/driver:one")
			dir, host, s, ref, img := h.dir, h.host, h.s, h.ref, h.img
			if found := verify(t, s); len(found) != 0 || s.Damaged() != 0 {
				t.Fatalf("Verify() of an intact registry found %+v, Damaged() = %d", found, s.Damaged())
			}
			name := blobs(t, img)[2]
			file := blobFile(dir, name)
			good, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			row.damage(t, file)
			want := []ocistore.Damage{{Digest: "sha256:" + name, Manifest: "prebake/driver@" + digestOf(t, img).String(),
				Manifests: 1}}
			same := cmpopts.IgnoreFields(ocistore.Damage{}, "Cause")
			if row.verify {
				found := verify(t, s)
				if d := cmp.Diff(want, found, same); d != "" || found[0].Cause == nil {
					t.Fatalf("Verify() found %+v (-want +got):\n%s", found, d)
				}
			}
			for range 2 { // the second collection must report what the first one found
				out, err := s.Collect(t.Context(), time.Now())
				if d := cmp.Diff(want, out.DamagedBlobs, same); err != nil || d != "" {
					t.Errorf("Collect() = %v, damaged blobs (-want +got):\n%s", err, d)
				}
			}
			if n := s.Damaged(); n != 1 {
				t.Errorf("Damaged() = %d; want 1", n)
			}
			blob := "/v2/prebake/driver/blobs/sha256:" + name
			if r := call(t, host, "GET", blob, ""); r.StatusCode != http.StatusNotFound {
				t.Errorf("GET of the blob = %s; want 404", r.Status)
			}
			manifests := "/v2/prebake/driver/manifests/"
			for _, at := range []string{manifests + "one", manifests + digestOf(t, img).String()} {
				if r := call(t, host, "GET", at, ""); r.StatusCode != http.StatusOK {
					t.Errorf("GET %s = %s; want 200, because a node may have the blob", at, r.Status)
				}
				if status := anonymousHead(t, host, at); status != http.StatusOK {
					t.Errorf("HEAD %s of a node = %d; want 200", at, status)
				}
			}
			if err := remote.Write(ref, img, options(t)...); err != nil {
				t.Fatalf("push again = %v", err)
			}
			r := call(t, host, "GET", blob, "")
			if got, err := io.ReadAll(r.Body); err != nil || !slices.Equal(got, good) {
				t.Errorf("GET of the blob after the push = %s, %d bytes, %v; want the %d right ones", r.Status, len(got), err,
					len(good))
			}
			if n := s.Damaged(); n != 0 {
				t.Errorf("Damaged() after the push = %d; want 0", n)
			}
			if out, err := s.Collect(t.Context(), time.Now()); err != nil || len(out.DamagedBlobs) != 0 {
				t.Errorf("Collect() after the push = %+v, %v; want no damage", out, err)
			}
			if left, err := os.ReadDir(filepath.Join(dir, "damaged")); err != nil || len(left) != 0 {
				t.Errorf("damaged content after the push: %v, %v; want none", left, err)
			}
		})
	}
}

// anonymousHead sends a HEAD request without a token, and returns the status.
func anonymousHead(t *testing.T, host, at string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodHead, "http://"+host+at, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Body.Close(); err != nil {
		t.Fatal(err)
	}
	return r.StatusCode
}

// TestVerifyContinues interrupts a verification at its first damaged blob. After a restart, the verification must
// continue after that blob. The next one must begin 30 days after the first one began.
func TestVerifyContinues(t *testing.T) {
	t.Parallel()
	dir, now := t.TempDir(), time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	began, step := now, time.Duration(0)
	start := func() *ocistore.Store {
		return openWith(t, dir, ocistore.Options{Now: func() time.Time {
			defer func() { now = now.Add(step) }()
			return now
		}})
	}
	s := start()
	host := listen(t, s)
	images := []v1.Image{image(t), image(t), image(t)}
	var all []string
	for i, img := range images {
		if err := remote.Write(reference(t, host, fmt.Sprintf("a/x:%d", i)), img, options(t)...); err != nil {
			t.Fatal(err)
		}
		all = append(all, blobs(t, img)[1:]...)
	}
	slices.Sort(all)
	broken := []string{"sha256:" + all[3], "sha256:" + all[8]}
	flip(t, blobFile(dir, all[3]))
	flip(t, blobFile(dir, all[8]))
	if next := s.NextPass(); next.After(now) {
		t.Errorf("NextPass() before the first pass = %v; want a time in the past", next)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if _, err := s.Verify(ctx, fast, func(ocistore.Damage) {}); !errors.Is(err, context.Canceled) {
		t.Fatalf("Verify() that ends at once = %v; want canceled", err)
	}
	if next := s.NextPass(); next.After(now) {
		t.Errorf("NextPass() after a pass without a blob = %v; want a time in the past", next)
	}
	ctx, stop = context.WithCancel(t.Context())
	var found []string
	step = time.Minute // so long that each blob is followed by a report, and by a write of the position
	first, err := s.Verify(ctx, fast, func(d ocistore.Damage) { found = append(found, d.Digest); stop() })
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("Verify() that is interrupted = %v; want canceled", err)
	}
	step, now = 0, now.Add(time.Hour)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start()
	if n := s.Damaged(); n != 1 {
		t.Errorf("Damaged() after a restart = %d; want 1", n)
	}
	if next := s.NextPass(); next.After(now) {
		t.Errorf("NextPass() after an interrupted pass = %v; want a time in the past", next)
	}
	second, err := s.Verify(t.Context(), fast, func(d ocistore.Damage) { found = append(found, d.Digest) })
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(broken, found); d != "" {
		t.Errorf("found damage (-want +got):\n%s", d)
	}
	// Each image has three layers, a config and a manifest.
	if first.Blobs+second.Blobs != 15 || first.Blobs == 0 || second.Blobs == 0 {
		t.Errorf("Verify() read %d blobs, then %d; want 15 together", first.Blobs, second.Blobs)
	}
	if next := s.NextPass(); !next.Equal(began.Add(30 * 24 * time.Hour)) {
		t.Errorf("NextPass() after a pass = %v; want 30 days after %v", next, began)
	}
	if third, err := s.Verify(t.Context(), fast, func(ocistore.Damage) {}); err != nil || third.Blobs != 13 {
		t.Errorf("the next Verify() read %d blobs, %v; want all 13 that are left", third.Blobs, err)
	}
}

// TestDamageTogether damages three layers of an image. Verify must read the manifests only once, after it has found all
// three.
func TestDamageTogether(t *testing.T) {
	t.Parallel()
	h := hold(t, "a/x:1")
	dir, s, img := h.dir, h.s, h.img
	if err := remote.Write(reference(t, h.host, "b/y:1"), img, options(t)...); err != nil {
		t.Fatal(err)
	}
	layers := blobs(t, img)[2:]
	var want []ocistore.Damage
	for _, name := range slices.Sorted(slices.Values(layers)) {
		flip(t, blobFile(dir, name))
		want = append(want, ocistore.Damage{Digest: "sha256:" + name, Manifest: "a/x@" + digestOf(t, img).String(),
			Manifests: 2})
	}
	var found []ocistore.Damage
	out, err := s.Verify(t.Context(), fast, func(d ocistore.Damage) {
		found = append(found, d)
		for _, name := range layers {
			if _, err := os.Stat(blobFile(dir, name)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("at report %d, blob %s is there: %v; want all damaged ones moved aside", len(found), name, err)
			}
		}
	})
	if d := cmp.Diff(want, found, cmpopts.IgnoreFields(ocistore.Damage{}, "Cause")); err != nil || d != "" {
		t.Errorf("Verify() = %v, found (-want +got):\n%s", err, d)
	}
	if out.Damaged != len(layers) {
		t.Errorf("Verify() counts %d damaged blobs; want %d", out.Damaged, len(layers))
	}
}

// TestUnneededDamage damages a blob that no manifest needs. The blob must not stay in the folder damaged for ever.
func TestUnneededDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	host := listen(t, s)
	if r := call(t, host, "POST", "/v2/a/blobs/uploads/?digest="+sum("cfg"), "cfg"); r.StatusCode != http.StatusCreated {
		t.Fatal(r.Status)
	}
	flip(t, blobFile(dir, strings.TrimPrefix(sum("cfg"), "sha256:")))
	found := verify(t, s)
	want := []ocistore.Damage{{Digest: sum("cfg")}}
	if d := cmp.Diff(want, found, cmpopts.IgnoreFields(ocistore.Damage{}, "Cause")); d != "" {
		t.Errorf("Verify() found (-want +got):\n%s", d)
	}
	if n := s.Damaged(); n != 0 {
		t.Errorf("Damaged() before a collection = %d; want 0, because no manifest needs the blob", n)
	}
	if out, err := s.Collect(t.Context(), time.Now()); err != nil || len(out.DamagedBlobs) != 0 || s.Damaged() != 0 {
		t.Errorf("Collect() = %+v, %v, Damaged() = %d; want no damage", out, err, s.Damaged())
	}
	if left, err := os.ReadDir(filepath.Join(dir, "damaged")); err != nil || len(left) != 0 {
		t.Errorf("damaged content: %v, %v; want none", left, err)
	}
}

// TestAbsentByDesign pushes an image with a layer whose licence forbids a push. The registry must not call this
// missing layer damaged.
func TestAbsentByDesign(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	host := listen(t, s)
	if r := call(t, host, "POST", "/v2/a/blobs/uploads/?digest="+sum("cfg"), "cfg"); r.StatusCode != http.StatusCreated {
		t.Fatal(r.Status)
	}
	const kind = "application/vnd.oci.image.manifest.v1+json"
	content := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"x/y","digest":%q,"size":3},`+
		`"layers":[{"mediaType":"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip","digest":%q,"size":9}]}`,
		kind, sum("cfg"), sum("never"))
	if r := call(t, host, "PUT", "/v2/a/manifests/t", content, "Content-Type", kind); r.StatusCode != http.StatusCreated {
		t.Fatal(r.Status)
	}
	if out, err := s.Collect(t.Context(), time.Now()); err != nil || len(out.DamagedBlobs) != 0 || s.Damaged() != 0 {
		t.Errorf("Collect() = %+v, %v, Damaged() = %d; want no damage", out, err, s.Damaged())
	}
}

// TestVerifyBesidePushes verifies all blobs while images are pushed and collected. No push may fail, and no intact blob
// may count as damaged.
func TestVerifyBesidePushes(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	host := listen(t, s)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		var err error
		for ctx.Err() == nil && err == nil {
			_, err = s.Verify(ctx, fast, func(d ocistore.Damage) { t.Errorf("damage %+v; want none", d) })
		}
		done <- err
	}()
	img := image(t)
	for i := range 20 {
		some := img
		if i%2 == 0 {
			some = image(t)
		}
		if err := remote.Write(reference(t, host, fmt.Sprintf("a/b:%d", i)), some, options(t)...); err != nil {
			t.Errorf("push %d = %v", i, err)
		}
		if out, err := s.Collect(t.Context(), time.Now()); err != nil || len(out.DamagedBlobs) != 0 {
			t.Errorf("Collect() = %+v, %v; want no damage", out, err)
		}
	}
	stop()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("Verify() = %v", err)
	}
}
