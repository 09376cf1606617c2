package ocistore_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/inputs"
	"github.com/prebake/prebake/server/internal/ocistore"
)

// TestSpecification runs the conformance tests of distribution specification 1.1
// (github.com/opencontainers/distribution-spec/conformance, a tool in go.mod). No test may fail, and only the deletion
// of single blobs may be skipped.
func TestSpecification(t *testing.T) {
	t.Parallel()
	host := serve(t, t.TempDir())
	dir := t.TempDir()
	inputs.Files(t, "../../../go.mod", "../../../go.sum")
	program := filepath.Join(dir, "conformance")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program,
		"github.com/opencontainers/distribution-spec/conformance")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	run := exec.CommandContext(t.Context(), program)
	run.Dir = dir
	run.Env = append(os.Environ(), "OCI_REGISTRY="+host, "OCI_TLS=disabled", "OCI_USERNAME=prebake", "OCI_PASSWORD="+token,
		"OCI_RESULTS_DIR="+dir, "OCI_API_BLOBS_UPLOAD_CANCEL=true", "OCI_API_BLOBS_DIGEST_HEADER=true",
		"OCI_API_MANIFESTS_DIGEST_HEADER=true")
	out, err := run.CombinedOutput()
	if err != nil {
		t.Errorf("conformance: %v", err)
	}
	passed := 0
	for line := range strings.Lines(string(out)) {
		switch {
		case strings.HasSuffix(strings.TrimSpace(line), ": Pass"):
			passed++
		case strings.HasSuffix(strings.TrimSpace(line), ": FAIL"), strings.Contains(line, ": Skip") &&
			!strings.Contains(line, "/blob-delete: Skip"):
			t.Error(strings.TrimSpace(line)) // the registry supports everything but the deletion of single blobs
		}
	}
	if passed < 500 {
		t.Errorf("%d tests passed; want the whole suite:\n%.3000s", passed, out)
	}
}

// TestCreateOnlyOutlivesDelete checks that a create-only tag cannot get other content, even after its manifest was
// deleted.
func TestCreateOnlyOutlivesDelete(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var deleted []string
	s := openWith(t, dir,
		ocistore.Options{CreateOnly: createOnly, Forget: func(repo string, d ociregistry.Digest) error {
			deleted = append(deleted, repo+"@"+string(d))
			return nil
		}})
	host := listen(t, s)
	ref, first, second := reference(t, host, "prebake/driver:one"), image(t), image(t)
	if err := remote.Write(ref, first, options(t)...); err != nil {
		t.Fatal(err)
	}
	if r := call(t, host, "DELETE", "/v2/prebake/driver/manifests/one", ""); r.StatusCode != http.StatusForbidden {
		t.Errorf("DELETE of the tag = %s; want 403", r.Status)
	}
	d := digestOf(t, first)
	if r := call(t, host, "DELETE", "/v2/prebake/driver/manifests/"+d.String(), ""); r.StatusCode != http.StatusAccepted {
		t.Fatalf("DELETE of the manifest = %s; want 202", r.Status)
	}
	if want := []string{"prebake/driver@" + d.String()}; !slices.Equal(slices.Compact(deleted), want) {
		t.Errorf("Forget was called for %v; want %v", deleted, want)
	}
	if r := call(t, host, "GET", "/v2/prebake/driver/manifests/one", ""); r.StatusCode != http.StatusNotFound {
		t.Errorf("GET of the tag = %s; want 404", r.Status)
	}
	if err := remote.Write(ref, second, options(t)...); statusOf(err) != http.StatusForbidden {
		t.Errorf("other content under the tag = %v; want 403", err)
	}
	if err := remote.Write(ref, first, options(t)...); err != nil {
		t.Errorf("the same content under the tag = %v", err)
	}
}

// TestCreateOnlyNoLonger checks the error for the tag of a deleted manifest, if the repository was create-only and is
// not any more.
func TestCreateOnlyNoLonger(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	host, first := listen(t, s), image(t)
	if err := remote.Write(reference(t, host, "prebake/driver:one"), first, options(t)...); err != nil {
		t.Fatal(err)
	}
	d := digestOf(t, first).String()
	if r := call(t, host, "DELETE", "/v2/prebake/driver/manifests/"+d, ""); r.StatusCode != http.StatusAccepted {
		t.Fatalf("DELETE of the manifest = %s; want 202", r.Status)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	host = listen(t, openWith(t, dir, ocistore.Options{}))
	err := remote.Write(reference(t, host, "prebake/driver:one"), image(t), options(t)...)
	if statusOf(err) != http.StatusForbidden || !strings.Contains(err.Error(), "was create-only") ||
		strings.Contains(err.Error(), "is create-only") || !strings.Contains(err.Error(), "server free-tags "+d) {
		t.Errorf("other content under the tag = %v; want 403, because the tag was create-only", err)
	}
}

// TestDeleteBesideBadTags checks the deletion of a manifest while the repository has bad tags. If a tag cannot be read,
// the deletion must fail. A tag with damaged content must not prevent the deletion, and must stay.
func TestDeleteBesideBadTags(t *testing.T) {
	t.Parallel()
	for _, repo := range []string{"prebake/driver", "scratch/x"} { // the first repository is create-only
		dir := t.TempDir()
		host := serve(t, dir)
		img := image(t)
		if err := remote.Write(reference(t, host, repo+":good"), img, options(t)...); err != nil {
			t.Fatal(err)
		}
		tags := filepath.Join(dir, "repos", repo, "_tags")
		damaged, unreadable := filepath.Join(tags, "damaged"), filepath.Join(tags, "a-folder")
		if err := errors.Join(os.WriteFile(damaged, []byte(`{"dig`), 0o640), os.Mkdir(unreadable, 0o750)); err != nil {
			t.Fatal(err)
		}
		manifest := "/v2/" + repo + "/manifests/" + digestOf(t, img).String()
		if r := call(t, host, "DELETE", manifest, ""); r.StatusCode != http.StatusInternalServerError {
			t.Errorf("%s: DELETE beside a tag that cannot be read = %s; want 500", repo, r.Status)
		}
		if r := call(t, host, "GET", manifest, ""); r.StatusCode != http.StatusOK {
			t.Errorf("%s: GET after that = %s; want 200", repo, r.Status)
		}
		if err := os.Remove(unreadable); err != nil {
			t.Fatal(err)
		}
		if r := call(t, host, "DELETE", manifest, ""); r.StatusCode != http.StatusAccepted {
			t.Errorf("%s: DELETE beside a damaged tag = %s; want 202", repo, r.Status)
		}
		if r := call(t, host, "GET", "/v2/"+repo+"/manifests/good", ""); r.StatusCode != http.StatusNotFound {
			t.Errorf("%s: GET of the deleted tag = %s; want 404", repo, r.Status)
		}
		if raw, err := os.ReadFile(damaged); err != nil || string(raw) != `{"dig` {
			t.Errorf("%s: the damaged tag is %q, %v; want it as it was", repo, raw, err)
		}
	}
}

// TestCollect checks that a collection removes only blobs that no manifest needs and that are older than a day. It must
// keep the blobs of a running push, and blobs that a client asked for in the last day.
func TestCollect(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	host := listen(t, s)
	kept, gone := image(t), image(t)
	for name, img := range map[string]string{"a/kept:1": "", "a/gone:1": "x"} {
		which := kept
		if img != "" {
			which = gone
		}
		if err := remote.Write(reference(t, host, name), which, options(t)...); err != nil {
			t.Fatal(err)
		}
	}
	if r := call(t, host, "DELETE", "/v2/a/gone/manifests/"+digestOf(t, gone).String(),
		""); r.StatusCode != http.StatusAccepted {
		t.Fatal(r.Status)
	}
	upload := call(t, host, "POST", "/v2/a/x/blobs/uploads/", "")
	if upload.StatusCode != http.StatusAccepted {
		t.Fatal(upload.Status)
	}
	now := time.Now()
	if out, err := s.Collect(t.Context(), now); err != nil || out.Blobs != 0 {
		t.Errorf("Collect(now) = %+v, %v; want nothing: all blobs are new", out, err)
	}
	setAge(t, dir, now.Add(-25*time.Hour))
	layers, err := gone.Layers()
	if err != nil {
		t.Fatal(err)
	}
	asked, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if r := call(t, host, "HEAD", "/v2/a/gone/blobs/"+asked.String(), ""); r.StatusCode != http.StatusOK {
		t.Fatal(r.Status)
	}
	out, err := s.Collect(t.Context(), now)
	if err != nil || out.Blobs != 4 || out.Bytes == 0 { // two layers, the config and the manifest
		t.Errorf("Collect() = %+v, %v; want 4 blobs", out, err)
	}
	if _, err := remote.Get(reference(t, host, "a/kept:1"), options(t)...); err != nil {
		t.Errorf("an image that has a manifest: %v; want no error", err)
	}
	if img, err := remote.Image(reference(t, host, "a/kept:1"), options(t)...); err != nil {
		t.Error(err)
	} else if l, err := img.Layers(); err != nil || len(l) != 3 {
		t.Errorf("%d layers, %v", len(l), err)
	}
	if r := call(t, host, "HEAD", "/v2/a/gone/blobs/"+asked.String(), ""); r.StatusCode != http.StatusOK {
		t.Errorf("a blob that somebody asked for = %s; want it kept", r.Status)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "uploads")); err != nil || len(left) != 0 {
		t.Errorf("%d uploads are left, %v; want none", len(left), err)
	}
}

// setAge sets the modification time of all files in a folder.
func setAge(t *testing.T, dir string, at time.Time) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Chtimes(p, at, at)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestCollectBesidePushes pushes images with old blobs while collections run. No stored manifest may lack a blob.
func TestCollectBesidePushes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	host := listen(t, s)
	ctx, stop := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	wait.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.Collect(ctx, time.Now()); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond) // the pause lets some pushes succeed
		}
	})
	stored := 0
	for i := range 30 {
		ref, img := reference(t, host, fmt.Sprintf("a/b:%d", i)), image(t)
		if err := remote.Write(ref, img, options(t)...); err != nil {
			t.Fatal(err)
		}
		if r := call(t, host, "DELETE", "/v2/a/b/manifests/"+digestOf(t, img).String(),
			""); r.StatusCode != http.StatusAccepted {
			t.Fatal(r.Status)
		}
		for _, name := range blobs(t, img) { // a collection may remove an old blob that no manifest needs at any time
			old := time.Now().Add(-25 * time.Hour)
			err := os.Chtimes(filepath.Join(dir, "blobs/sha256", name[:2], name), old, old)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
		if err := remote.Write(ref, img, options(t)...); err != nil {
			continue // a collection removed the blob after the client's check, so the client got an error
		}
		stored++
		for _, name := range blobs(t, img) {
			if r := call(t, host, "GET", "/v2/a/b/blobs/sha256:"+name, ""); r.StatusCode != http.StatusOK {
				t.Fatalf("push %d: blob %s of a stored manifest = %s", i, name, r.Status)
			}
		}
	}
	stop()
	wait.Wait()
	if stored == 0 {
		t.Error("no push came through")
	}
}

// blobs returns the hex digests of an image's manifest, config and layers, in this order.
func blobs(t *testing.T, img v1.Image) []string {
	t.Helper()
	config, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	all := []string{digestOf(t, img).Hex, config.Hex}
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, d.Hex)
	}
	return all
}

// TestManners checks behaviour of the registry that the conformance tests do not cover.
func TestManners(t *testing.T) {
	t.Parallel()
	var full error
	s := openWith(t, t.TempDir(), ocistore.Options{CheckFree: func() error { return full }})
	host := listen(t, s)
	img := image(t)
	if err := remote.Write(reference(t, host, "a/b:1"), img, options(t)...); err != nil {
		t.Fatal(err)
	}
	d := digestOf(t, img).String()
	r := call(t, host, "GET", "/v2/a/b/referrers/"+d, "")
	var index map[string]json.RawMessage
	if err := json.NewDecoder(r.Body).Decode(&index); err != nil || string(index["manifests"]) != "[]" {
		t.Errorf("referrers of nothing = %s, %v; want an empty list", index["manifests"], err)
	}
	r = call(t, host, "GET", "/v2/a/b/manifests/"+d, "")
	if tag := r.Header.Get("Etag"); tag != `"`+d+`"` || !strings.Contains(r.Header.Get("Cache-Control"), "immutable") {
		t.Errorf("by digest: Etag %q, Cache-Control %q; want the digest, and immutable", tag, r.Header.Get("Cache-Control"))
	}
	if r = call(t, host, "GET", "/v2/a/b/manifests/1", ""); r.Header.Get("Cache-Control") != "no-cache" {
		t.Errorf("by tag: Cache-Control %q; want no-cache", r.Header.Get("Cache-Control"))
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	blob, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if r = call(t, host, "GET", "/v2/a/b/blobs/"+blob.String(), "", "If-None-Match",
		`"`+blob.String()+`"`); r.StatusCode != http.StatusNotModified {
		t.Errorf("a blob that the client has = %s; want 304", r.Status)
	}
	full = fault.New(fault.DiskFull, "/secret/path: 1 MiB is left", "free space")
	r = call(t, host, "POST", "/v2/a/b/blobs/uploads/", "")
	text, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusInsufficientStorage || strings.Contains(string(text), "/secret") {
		t.Errorf("with the disk full = %s %s, %v; want 507 without a path", r.Status, text, err)
	}
	full = nil
	if r = call(t, host, "GET", "/v2/a/b/blobs/sha256:"+strings.Repeat("0", 64),
		""); r.StatusCode != http.StatusNotFound || r.Header.Get("Cache-Control") != "" {
		t.Errorf("an absent blob = %s, Cache-Control %q; want 404 without Cache-Control", r.Status,
			r.Header.Get("Cache-Control"))
	}
}
