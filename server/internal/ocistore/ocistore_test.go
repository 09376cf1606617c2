package ocistore_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/ocistore"
)

const token = "s3cret"

// createOnly is the rule of the tests: tags in prebake/ cannot be moved.
func createOnly(repo, _ string) bool { return strings.HasPrefix(repo, "prebake/") }

func open(t *testing.T, dir string) *ocistore.Store {
	t.Helper()
	return openWith(t, dir, ocistore.Options{CreateOnly: createOnly})
}

func openWith(t *testing.T, dir string, options ocistore.Options) *ocistore.Store {
	t.Helper()
	s, err := ocistore.Open(dir, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return s
}

// serve starts a registry on the folder dir. It returns the registry's host and port.
func serve(t *testing.T, dir string) string {
	t.Helper()
	return listen(t, open(t, dir))
}

// listen starts a registry on a store. It returns the registry's host and port.
func listen(t *testing.T, s *ocistore.Store) string {
	t.Helper()
	server := httptest.NewServer(ocistore.Handler(s, auth.New(auth.Config{First: token}), slog.New(slog.DiscardHandler)))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

func reference(t *testing.T, host, rest string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(host + "/" + rest)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func image(t *testing.T) v1.Image {
	t.Helper()
	img, err := random.Image(4096, 3)
	if err != nil {
		t.Fatal(err)
	}
	return mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
}

func options(t *testing.T) []remote.Option {
	return []remote.Option{remote.WithContext(t.Context()),
		remote.WithAuth(&authn.Basic{Username: "prebake", Password: token})}
}

func digestOf(t *testing.T, img v1.Image) v1.Hash {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func statusOf(err error) int {
	var te *transport.Error
	if errors.As(err, &te) {
		return te.StatusCode
	}
	return 0
}

func TestStockClient(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	host := serve(t, dir)
	img := image(t)
	ref := reference(t, host, "prebake/driver:one")
	if err := remote.Write(ref, img, options(t)...); err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, options(t)...); err != nil {
		t.Errorf("pushing the same again = %v; want no error", err)
	}
	if err := remote.Write(ref, image(t), options(t)...); statusOf(err) != http.StatusForbidden {
		t.Errorf("moving a create-only tag = %v; want 403", err)
	}
	moving := reference(t, host, "scratch/x:latest")
	for range 2 {
		if err := remote.Write(moving, image(t), options(t)...); err != nil {
			t.Errorf("moving an ordinary tag = %v", err)
		}
	}
	// CI jobs may send the token as a bearer token.
	bearer := remote.WithAuth(&authn.Bearer{Token: token})
	if err := remote.Write(reference(t, host, "prebake/driver:two"), img, remote.WithContext(t.Context()),
		bearer); err != nil {
		t.Errorf("push with bearer token = %v", err)
	}
	for who, auth := range map[string]authn.Authenticator{
		"nobody": authn.Anonymous, "wrong password": &authn.Basic{Username: "prebake", Password: "x"},
		"wrong token": &authn.Bearer{Token: "x"},
	} {
		err := remote.Write(reference(t, host, "prebake/driver:three"), image(t), remote.WithContext(t.Context()),
			remote.WithAuth(auth))
		if statusOf(err) != http.StatusUnauthorized {
			t.Errorf("push as %s = %v; want 401", who, err)
		}
	}

	// The two referrers have different types.
	subject, err := remote.Head(ref, remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	var want []v1.Hash
	for i, kind := range []types.MediaType{"application/vnd.x+json", "application/vnd.y+json"} {
		r := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), kind)
		r = mutate.Annotations(r, map[string]string{"n": fmt.Sprint(i)}).(v1.Image)
		r = mutate.Subject(r, *subject).(v1.Image) // this must be last, because any later change drops the subject
		d := digestOf(t, r)
		want = append(want, d)
		if err := remote.Write(reference(t, host, "prebake/driver@"+d.String()), r, options(t)...); err != nil {
			t.Fatal(err)
		}
	}

	check := func(host string) {
		t.Helper()
		anon := remote.WithContext(t.Context())
		got, err := remote.Image(reference(t, host, "prebake/driver:one"), anon)
		if err != nil {
			t.Fatalf("anonymous pull = %v", err)
		}
		if digestOf(t, got) != digestOf(t, img) {
			t.Error("the tag names another image")
		}
		layers, err := got.Layers()
		if err != nil || len(layers) != 3 {
			t.Fatalf("%d layers, %v", len(layers), err)
		}
		for _, l := range layers {
			r, err := l.Compressed() // the client library verifies the digest
			if err != nil {
				t.Fatal(err)
			}
			_, err = io.Copy(io.Discard, r)
			if err := errors.Join(err, r.Close()); err != nil {
				t.Errorf("read layer: %v", err)
			}
		}
		tags, err := remote.List(ref.Context().Registry.Repo("prebake", "driver"), anon)
		if host == ref.Context().RegistryStr() && (err != nil || !cmp.Equal(tags, []string{"one", "two"})) {
			t.Errorf("tags = %v, %v; want one and two", tags, err)
		}
		all, err := remote.Referrers(reference(t, host, "prebake/driver@"+subject.Digest.String()).(name.Digest), anon)
		if err != nil {
			t.Fatal(err)
		}
		m, err := all.IndexManifest()
		if err != nil || len(m.Manifests) != 2 {
			t.Fatalf("%d referrers, %v; want 2", len(m.Manifests), err)
		}
		some, err := remote.Referrers(reference(t, host, "prebake/driver@"+subject.Digest.String()).(name.Digest), anon,
			remote.WithFilter("artifactType", "application/vnd.y+json"))
		if err != nil {
			t.Fatal(err)
		}
		if m, err = some.IndexManifest(); err != nil || len(m.Manifests) != 1 || m.Manifests[0].Digest != want[1] ||
			m.Manifests[0].Annotations["n"] != "1" {
			t.Errorf("filtered referrers = %+v, %v; want %s with its annotation", m, err, want[1])
		}
	}
	check(host)
	check(serve(t, dir)) // a new registry on the same folder knows only what is on the disk

	catalog, err := remote.Catalog(t.Context(), ref.Context().Registry)
	if err != nil || !cmp.Equal(catalog, []string{"prebake/driver", "scratch/x"}) {
		t.Errorf("catalog = %v, %v", catalog, err)
	}
	if err := remote.Delete(moving, options(t)...); err != nil {
		t.Errorf("delete = %v", err)
	}
	if _, err := remote.Head(moving, remote.WithContext(t.Context())); statusOf(err) != http.StatusNotFound {
		t.Errorf("head of a deleted tag = %v; want 404", err)
	}
	if err := remote.Delete(ref, remote.WithContext(t.Context())); statusOf(err) != http.StatusUnauthorized {
		t.Errorf("anonymous delete = %v; want 401", err)
	}
}

// call makes one request with the token, without a client library.
func call(t *testing.T, host, method, path, body string, header ...string) *http.Response {
	t.Helper()
	url := path
	if strings.HasPrefix(path, "/") {
		url = "http://" + host + path
	}
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("any", token)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		t.Fatal(err)
	}
	resp.Body = io.NopCloser(bytes.NewReader(raw))
	return resp
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(h[:])
}

func TestChunkedUploadSurvivesRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	host := serve(t, dir)
	location := func(r *http.Response) string { return r.Header.Get("Location") }
	r := call(t, host, "POST", "/v2/a/b/blobs/uploads/", "")
	if r.StatusCode != http.StatusAccepted {
		t.Fatalf("begin = %s", r.Status)
	}
	r = call(t, host, "PATCH", location(r), "hello ", "Content-Range", "0-5")
	if r.StatusCode != http.StatusAccepted || r.Header.Get("Range") != "0-5" {
		t.Fatalf("first chunk = %s, range %s", r.Status, r.Header.Get("Range"))
	}
	at := strings.TrimPrefix(location(r), "http://"+host)
	host = serve(t, dir)
	if r = call(t, host, "GET", at, ""); r.StatusCode != http.StatusNoContent || r.Header.Get("Range") != "0-5" {
		t.Errorf("after a restart = %s, range %s; want 0-5", r.Status, r.Header.Get("Range"))
	}
	if r = call(t, host, "PATCH", at, "xx", "Content-Range",
		"2-3"); r.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("chunk at a wrong place = %s; want 416", r.Status)
	}
	if r = call(t, host, "PATCH", at, "world", "Content-Range", "6-10"); r.StatusCode != http.StatusAccepted {
		t.Fatalf("second chunk = %s", r.Status)
	}
	if r = call(t, host, "PUT", at+"?digest="+sum("hello world"), ""); r.StatusCode != http.StatusCreated {
		t.Fatalf("commit = %s", r.Status)
	}
	blob := "/v2/a/b/blobs/" + sum("hello world")
	rows := []struct {
		name, method, ask string
		status            int
		body              string
	}{
		{"whole", "GET", "", 200, "hello world"},
		{"head", "HEAD", "", 200, ""},
		{"part", "GET", "bytes=6-", 206, "world"},
		{"middle", "GET", "bytes=1-4", 206, "ello"},
		{"past the end", "GET", "bytes=99-", 416, ""},
		{"nonsense", "GET", "bytes=x", 416, ""},
	}
	for _, row := range rows {
		header := []string{}
		if row.ask != "" {
			header = []string{"Range", row.ask}
		}
		r := call(t, host, row.method, blob, "", header...)
		body, _ := io.ReadAll(r.Body)
		if r.StatusCode != row.status || (row.status < 300 && string(body) != row.body) {
			t.Errorf("%s: %s %q; want %d %q", row.name, r.Status, body, row.status, row.body)
		}
		if row.method == "HEAD" && r.Header.Get("Content-Length") != "11" {
			t.Errorf("head says %s bytes; want 11", r.Header.Get("Content-Length"))
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	host := serve(t, t.TempDir())
	if r := call(t, host, "POST", "/v2/a/blobs/uploads/?digest="+sum("cfg"), "cfg"); r.StatusCode != http.StatusCreated {
		t.Fatalf("single post = %s", r.Status)
	}
	if r := call(t, host, "POST", "/v2/a/blobs/uploads/?digest="+sum("other"),
		"cfg"); r.StatusCode != http.StatusBadRequest {
		t.Errorf("wrong digest = %s; want 400", r.Status)
	}
	r := call(t, host, "POST", "/v2/a/blobs/uploads/", "")
	if r = call(t, host, "PUT", r.Header.Get("Location")+"?digest="+sum("other"),
		"cfg"); r.StatusCode != http.StatusBadRequest {
		t.Errorf("wrong digest of an upload = %s; want 400", r.Status)
	}
	if r = call(t, host, "HEAD", "/v2/a/blobs/"+sum("other"), ""); r.StatusCode != http.StatusNotFound {
		t.Errorf("the refused blob = %s; want 404", r.Status)
	}
	const kind = "application/vnd.oci.image.manifest.v1+json"
	descriptor := func(digest string, size int) string {
		return fmt.Sprintf(`{"mediaType":"x/y","digest":%q,"size":%d}`, digest, size)
	}
	good := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[]}`, kind, descriptor(sum("cfg"), 3))
	rows := []struct {
		name, path, kind, body string
		status                 int
	}{
		{"good", "/v2/a/manifests/t", kind, good, 201},
		{"layer missing", "/v2/a/manifests/u", kind,
			fmt.Sprintf(`{"config":%s,"layers":[%s]}`, descriptor(sum("cfg"), 3), descriptor(sum("no"), 2)), 404},
		{"config missing", "/v2/a/manifests/u", kind, `{"layers":[]}`, 400},
		{"size differs", "/v2/a/manifests/u", kind, fmt.Sprintf(`{"config":%s}`, descriptor(sum("cfg"), 4)), 400},
		{"sha384", "/v2/a/manifests/u", kind, fmt.Sprintf(`{"config":%s}`, descriptor("sha384:"+strings.Repeat("a", 96), 4)),
			400},
		{"digest traversal", "/v2/a/manifests/u", kind, fmt.Sprintf(`{"config":%s}`, descriptor("sha256:../../x", 4)), 400},
		{"subject traversal", "/v2/a/manifests/u", kind,
			fmt.Sprintf(`{"config":%s,"subject":{"digest":"../../x"}}`, descriptor(sum("cfg"), 3)), 400},
		{"not JSON", "/v2/a/manifests/u", kind, `{`, 400},
		{"kind differs", "/v2/a/manifests/u", "application/vnd.oci.image.index.v1+json", good, 400},
		{"unknown kind", "/v2/a/manifests/u", "application/json", good, 400},
		{"child missing", "/v2/a/manifests/u", "application/vnd.oci.image.index.v1+json",
			fmt.Sprintf(`{"manifests":[%s]}`, descriptor(sum("no"), 2)), 404},
		{"wrong digest in path", "/v2/a/manifests/" + sum("no"), kind, good, 400},
		{"bad tag", "/v2/a/manifests/..", kind, good, 404},
		{"bad name", "/v2/A/_x/manifests/t", kind, good, 400},
		{"too large for a repository with a word of ours", "/v2/x/blobs/y/manifests/u", kind,
			good + strings.Repeat(" ", ocistore.MaxManifest), 413},
		{"too large", "/v2/a/manifests/u", kind, good + strings.Repeat(" ", ocistore.MaxManifest), 413},
	}
	for _, row := range rows {
		if r := call(t, host, "PUT", row.path, row.body, "Content-Type", row.kind); r.StatusCode != row.status {
			body, _ := io.ReadAll(r.Body)
			t.Errorf("%s: %s %s; want %d", row.name, r.Status, body, row.status)
		}
	}
	if r := call(t, host, "GET", "/v2/a/manifests/u", ""); r.StatusCode != http.StatusNotFound {
		t.Errorf("a refused manifest got its tag: %s", r.Status)
	}
	if r := call(t, host, "DELETE", "/v2/a/blobs/"+sum("cfg"), ""); r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("delete blob = %s; want 405", r.Status)
	}
	if r := call(t, host, "PATCH", "/v2/a/blobs/uploads/Li4vLi4veA", "x"); r.StatusCode != http.StatusNotFound {
		t.Errorf("upload id traversal = %s; want 404", r.Status)
	}
}

// FuzzManifest pushes arbitrary manifests. PushManifest must return. It must not accept a path with "..", and must not
// write outside the store's folders. A manifest that it accepted must be there, under its digest and its tag.
func FuzzManifest(f *testing.F) {
	around := f.TempDir()
	const inside = "a/b/c/store" // a path that leads up to three folders too high still ends below around
	s, err := ocistore.Open(filepath.Join(around, inside), ocistore.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	// list returns the entries of the folders around the store, and of its own folder.
	list := func(t testing.TB) (names []string) {
		t.Helper()
		for dir := inside; ; dir = path.Dir(dir) {
			entries, err := os.ReadDir(filepath.Join(around, dir))
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				names = append(names, path.Join(dir, e.Name()))
			}
			if dir == "." {
				return names
			}
		}
	}
	before := list(f)
	kinds := []string{"application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json", "x"}
	for _, names := range [][2]string{{"a/b", "latest"}, {"a/b", ""}, {"../../x", "t"}, {"../damaged/x", "t"},
		{"a/../../../x", "t"}, {"a/../b", "t"}, {"a/b", "../../../../../t"}, {"a/b", "../t"}, {"/a", "t"}} {
		f.Add([]byte(`{"manifests":[]}`), 1, names[0], names[1])
	}
	for i, seed := range []string{`{}`, `{"config":{"digest":"sha256:","size":-1}}`, `{"manifests":[{}]}`,
		`{"subject":{"digest":"sha256:../.."}}`, `[`} {
		f.Add([]byte(seed), i, "a/b", "latest")
	}
	f.Fuzz(func(t *testing.T, content []byte, kind int, repo, tag string) {
		if len(content) > 1<<16 {
			return
		}
		desc, err := s.PushManifest(t.Context(), repo, tag, content, kinds[uint(kind)%3])
		if diff := cmp.Diff(before, list(t)); diff != "" {
			t.Fatalf("PushManifest(%q, %q) wrote outside the store's folders (-before +after)\n%s", repo, tag, diff)
		}
		if err != nil {
			return
		}
		if slices.Contains(strings.Split(repo+"/"+tag, "/"), "..") {
			t.Errorf("PushManifest(%q, %q) was accepted", repo, tag)
		}
		want := sum(string(content))
		if _, err := s.ResolveManifest(t.Context(), repo, desc.Digest); err != nil || string(desc.Digest) != want {
			t.Errorf("ResolveManifest(%q, %q) = %v; want the accepted manifest %s", repo, desc.Digest, err, want)
		}
		got, err := s.ResolveTag(t.Context(), repo, tag)
		if tag == "" && err == nil || tag != "" && (err != nil || got.Digest != desc.Digest) {
			t.Errorf("ResolveTag(%q, %q) = %s, %v; want %s, or an error for no tag", repo, tag, got.Digest, err, desc.Digest)
		}
	})
}
