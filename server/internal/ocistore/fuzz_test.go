package ocistore_test

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/ocistore"
)

// FuzzHandler sends arbitrary requests to the registry. No request may cause an internal error. If an answer names the
// digest of its content, the content must have this digest.
func FuzzHandler(f *testing.F) {
	s, err := ocistore.Open(f.TempDir(), ocistore.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	h := ocistore.Handler(s, auth.New(auth.Config{First: "secret"}), slog.New(slog.DiscardHandler))
	methods := []string{"GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"}
	blob := digest.FromString("{}")
	index := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`
	for _, seed := range []struct {
		method             int
		path, kind, ranged string
		body               string
	}{
		{3, "/v2/a/blobs/uploads/?digest=" + blob.String(), "application/octet-stream", "", "{}"},
		{3, "/v2/a/blobs/uploads/?mount=" + blob.String() + "&from=b", "", "", ""},
		{4, "/v2/a/blobs/uploads/eA", "application/octet-stream", "0-1", "{}"},
		{0, "/v2/a/blobs/" + blob.String(), "", "bytes=-1", ""},
		{2, "/v2/a/manifests/v1", "application/vnd.oci.image.index.v1+json", "", index},
		{2, "/v2/a/manifests/" + digest.SHA512.FromString(index).String(), "application/vnd.oci.image.index.v1+json", "",
			index},
		{2, "/v2/a/manifests/v2", "application/vnd.oci.image.manifest.v1+json", "",
			`{"schemaVersion":2,"config":{"mediaType":"x","digest":"` + blob.String() +
				`","size":2},"layers":[],"subject":{"digest":"sha256:","size":-1}}`},
		{0, "/v2/a/tags/list?n=-1&last=%00", "", "", ""},
		{0, "/v2/a/referrers/sha256:x?artifactType=%ff", "", "", ""},
		{0, "/v2/_catalog?n=1", "", "", ""},
		{0, "/v2/token?service=prebake&scope=repository:a:pull", "", "", ""},
		{5, "/v2/a/manifests/v1", "", "", ""},
	} {
		f.Add(seed.method, seed.path, seed.kind, seed.ranged, []byte(seed.body))
	}
	f.Fuzz(func(t *testing.T, method int, path, kind, ranged string, body []byte) {
		if len(body) > 1<<16 || len(path) > 1<<12 {
			return
		}
		req, err := http.NewRequestWithContext(t.Context(), methods[uint(method)%uint(len(methods))], "http://localhost/",
			bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		u, err := req.URL.Parse(path)
		if err != nil || u.Host != "localhost" {
			return
		}
		req.URL = u
		req.Header.Set("Content-Type", kind)
		req.Header.Set("Range", ranged)
		req.Header.Set("Content-Range", ranged)
		req.Header.Set("Authorization", "Bearer secret")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if w.Code >= http.StatusInternalServerError {
			t.Fatalf("%s %q (%q, %q) %q = %d %s; want no trouble of the server's own", req.Method, path, kind, ranged, body,
				w.Code, w.Body)
		}
		d := digest.Digest(w.Header().Get("Docker-Content-Digest"))
		isBlob := strings.Contains(u.Path, "/blobs/sha256:") || strings.Contains(u.Path, "/manifests/")
		if req.Method == http.MethodGet && w.Code == http.StatusOK && d != "" && isBlob {
			content, err := io.ReadAll(w.Body)
			if err != nil || d.Validate() != nil || d.Algorithm().FromBytes(content) != d {
				t.Errorf("GET %q = %q, %v; want the content of %s", path, content, err, d)
			}
		}
		if strings.HasSuffix(u.Path, "/tags/list") && req.Method == http.MethodGet && w.Code == http.StatusOK &&
			!json.Valid(w.Body.Bytes()) {
			t.Errorf("GET %q = %q; want JSON", path, w.Body)
		}
	})
}
