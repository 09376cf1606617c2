package registry_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// publishLayout makes a layout with an image, which has the tag v1, and two attachments. It returns the layout's folder
// and the image's digest.
func publishLayout(t *testing.T) (dir, digest string) {
	t.Helper()
	dir = t.TempDir()
	repo := openRef(t, "oci:"+dir, registry.Options{})
	d := pushRandom(t, repo, 300_000, 2)
	for _, text := range []string{"one", "two"} {
		if _, err := repo.Attach(t.Context(), d, labelledType, []byte(text), map[string]string{"kind": text}); err != nil {
			t.Fatal(err)
		}
	}
	if err := repo.Tag(t.Context(), d, "v1"); err != nil {
		t.Fatal(err)
	}
	return dir, d.Digest.String()
}

func openRef(t *testing.T, ref string, o registry.Options) *registry.Repository {
	t.Helper()
	repo, err := registry.Open(ref, o)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

// checkLayout checks that a repository has the image and the attachments of [publishLayout].
func checkLayout(t *testing.T, repo *registry.Repository, digest string) {
	t.Helper()
	if d, err := repo.Resolve(t.Context(), "v1"); err != nil || d.Digest.String() != digest {
		t.Errorf("Resolve = %v, %v; want %s", d.Digest, err, digest)
	}
	if tags, err := repo.Tags(t.Context()); err != nil || !strings.Contains(strings.Join(tags, " "), "v1") {
		t.Errorf("Tags = %q, %v", tags, err)
	}
	img, err := repo.PullImage(t.Context(), digest, "amd64", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 2 {
		t.Errorf("%d layers, %v; want 2", len(layers), err)
	}
	if got := attached(t, repo, digest, map[string]string{"kind": "two"}); len(got) == 0 || got[0] != "two" {
		t.Errorf("attached is %q", got)
	}
	if _, err := repo.Resolve(t.Context(), "v2"); !fault.Is(err, fault.NoArtifact) {
		t.Errorf("Resolve of what is not there = %v", err)
	}
}

func TestSite(t *testing.T) {
	t.Parallel()
	dir, digest := publishLayout(t)
	var asked, cut atomic.Int64
	files := http.StripPrefix("/drivers", http.FileServer(http.Dir(dir)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.Method != http.MethodGet || r.Header.Get("Authorization") != "" {
			t.Errorf("%s %s with %q", r.Method, r.URL, r.Header.Get("Authorization"))
		}
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") == "" && cut.Add(1)%5 == 4 {
			w = &half{ResponseWriter: w} // the connection breaks in each fifth blob
		}
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	repo := openRef(t, "oci:"+srv.URL+"/drivers/", registry.Options{})
	checkLayout(t, repo, digest)
	if n := asked.Load(); n > 25 {
		t.Errorf("the server was asked %d times", n)
	}
	for name, err := range map[string]error{
		"CheckPush": repo.CheckPush(t.Context()),
		"Push":      func() error { img, _ := random.Image(10, 1); _, err := repo.Push(t.Context(), img); return err }(),
	} {
		if !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("%s = %v; want usage with a hint", name, err)
		}
	}
	if _, err := openRef(t, "oci:"+srv.URL+"/elsewhere", registry.Options{}).Resolve(t.Context(), "v1"); !fault.Is(
		err,
		fault.NoArtifact,
	) ||
		fault.Hint(err) == "" {
		t.Errorf("Resolve where there is no layout = %v", err)
	}
}

// half sends the first half of a response and then breaks the connection.
type half struct {
	http.ResponseWriter
	sent bool
}

func (h *half) Write(p []byte) (int, error) {
	if h.sent {
		panic(http.ErrAbortHandler)
	}
	h.sent = true
	_, _ = h.ResponseWriter.Write(p[:len(p)/2]) // the connection breaks next, so the error does not matter
	if f, ok := h.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
	panic(http.ErrAbortHandler)
}

// TestSiteByOthers reads a layout that the library go-containerregistry wrote. The library stores a tag in the same
// annotation as this package.
func TestSiteByOthers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	img, err := random.Image(1000, 1)
	if err != nil {
		t.Fatal(err)
	}
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(img,
		layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "theirs"})); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(srv.Close)
	repo := openRef(t, "oci:"+srv.URL, registry.Options{})
	want, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if d, err := repo.Resolve(t.Context(), "theirs"); err != nil || d.Digest != want {
		t.Errorf("Resolve = %v, %v; want %s", d, err, want)
	}
	if _, err := repo.PullImage(t.Context(), want.String(), "amd64", t.TempDir()); err != nil {
		t.Error(err)
	}
}

type token struct{ user, password string }

func (k token) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{Username: k.user, Password: k.password}), nil
}

// TestSiteCredentials checks that the client authenticates in the form that the server accepts: with a bearer token of
// Google, or with a user name and password. It must send no credentials before the server has refused a request.
func TestSiteCredentials(t *testing.T) {
	t.Parallel()
	dir, digest := publishLayout(t)
	for name, tc := range map[string]struct {
		keys   token
		header string // the header that the server requires; "" means none
		ok     bool
	}{
		"Google's token": {token{"oauth2accesstoken", "ya29"}, "Bearer ya29", true},
		"a user":         {token{"me", "secret"}, "Basic bWU6c2VjcmV0", true},
		"nobody":         {token{}, "Bearer x", false},
		"somebody else":  {token{"you", "x"}, "Basic bWU6c2VjcmV0", false},
		"no need":        {token{"me", "secret"}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var refused sync.Map // paths that the server has refused
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				sent := r.Header.Get("Authorization")
				if _, ok := refused.Load(r.URL.Path); sent != "" && !ok {
					t.Errorf("%s had credentials although the server had not refused it", r.URL.Path)
				}
				if sent != tc.header {
					refused.Store(r.URL.Path, true)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				http.FileServer(http.Dir(dir)).ServeHTTP(w, r)
			}))
			t.Cleanup(srv.Close)
			repo := openRef(t, "oci:"+srv.URL, registry.Options{Keychain: tc.keys})
			if tc.ok {
				checkLayout(t, repo, digest)
			} else if _, err := repo.Resolve(t.Context(), "v1"); !fault.Is(err, fault.Usage) ||
				!strings.Contains(fault.Hint(err), "service account") {
				t.Errorf("Resolve = %v (hint %q)", err, fault.Hint(err))
			}
		})
	}
}

// TestSiteDenied checks that the error of a status 403 names both possible causes. Buckets that may be read but not
// listed answer so for a missing file, too. A status 401 has one cause.
func TestSiteDenied(t *testing.T) {
	t.Parallel()
	dir, digest := publishLayout(t)
	for _, status := range []int{http.StatusForbidden, http.StatusUnauthorized} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := os.Stat(filepath.Join(dir, r.URL.Path)); err != nil {
				w.WriteHeader(status)
				return
			}
			http.FileServer(http.Dir(dir)).ServeHTTP(w, r)
		}))
		t.Cleanup(srv.Close)
		repo := openRef(t, "oci:"+srv.URL, registry.Options{Keychain: token{}})
		checkLayout(t, repo, digest)
		both := status == http.StatusForbidden
		for name, err := range map[string]error{
			"a missing manifest": func() error {
				_, err := repo.Manifest(t.Context(), "sha256:"+strings.Repeat("0", 64))
				return err
			}(),
			"a missing layout": func() error {
				_, err := openRef(t, "oci:"+srv.URL+"/elsewhere", registry.Options{Keychain: token{}}).Resolve(t.Context(), "v1")
				return err
			}(),
		} {
			if !fault.Is(err, fault.Usage) || !registry.Denied(err) ||
				!strings.Contains(err.Error(), fmt.Sprintf("HTTP %d", status)) ||
				strings.Contains(err.Error(), "the file is missing, or may not be read") != both ||
				strings.Contains(fault.Hint(err), "check that the address is right and the file exists") != both ||
				strings.Contains(fault.Hint(err), "s3:ListBucket") != both ||
				!strings.Contains(fault.Hint(err), "service account") {
				t.Errorf("status %d for %s: %v, hint %q; want what both causes are: %t", status, name, err, fault.Hint(err), both)
			}
		}
	}
}

// TestSiteGCS reads a layout from an emulated bucket.
func TestSiteGCS(t *testing.T) {
	srv := gcs.Start(t)
	srv.Use(t)
	srv.Bucket(t, "drivers")
	dir, digest := publishLayout(t)
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(file)
		srv.Put(t, "drivers", "farm/"+strings.TrimPrefix(file, dir+"/"), raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	checkLayout(t, openRef(t, "oci:gs://drivers/farm", registry.Options{}), digest)
	if _, err := openRef(t, "oci:gs://drivers/other", registry.Options{}).Tags(t.Context()); !fault.Is(
		err,
		fault.NoArtifact,
	) {
		t.Errorf("Tags of an empty folder = %v", err)
	}
}

func TestSiteNames(t *testing.T) {
	t.Parallel()
	for _, ref := range []string{"oci:https://", "oci:https://u:p@host/x", "oci:https://host/x?y", "https://host/x"} {
		if _, err := registry.Open(ref, registry.Options{}); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("Open(%q) = %v; want usage with a hint", ref, err)
		}
	}
}

// TestSiteKeepsCredentials checks that the client sends no credentials over plain HTTP to another machine, and none
// after a redirect to another server or from https to http.
func TestSiteKeepsCredentials(t *testing.T) {
	t.Parallel()
	dir, _ := publishLayout(t)
	seen := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header.Get("Authorization")
		if r.URL.Query().Get("hop") == "" {
			http.Redirect(w, r, r.URL.Path+"?hop=2", http.StatusFound)
			return
		}
		http.FileServer(http.Dir(dir)).ServeHTTP(w, r)
	}))
	t.Cleanup(other.Close)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusFound) // the same host name, another port
	}))
	t.Cleanup(srv.Close)
	keys := token{"oauth2accesstoken", "ya29"}
	if _, err := openRef(t, "oci:"+srv.URL, registry.Options{Keychain: keys}).Resolve(t.Context(), "v1"); err != nil {
		t.Fatal(err)
	}
	for hop := range 2 {
		if got := <-seen; got != "" {
			t.Errorf("the other server saw %q at hop %d", got, hop)
		}
	}
	// This host is another machine, and the protocol is plain HTTP.
	asked := 0
	repo := openRef(
		t,
		"oci:http://storage.googleapis.com/drivers",
		registry.Options{Keychain: keys, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			if asked++; r.Header.Get("Authorization") != "" {
				t.Errorf("%s with %q", r.URL, r.Header.Get("Authorization"))
			}
			return &http.Response{
				StatusCode: http.StatusUnauthorized,
				Body:       http.NoBody,
				Request:    r,
				Header:     http.Header{},
			}, nil
		})},
	)
	if _, err := repo.Resolve(t.Context(), "v1"); !fault.Is(err, fault.Usage) || asked != 1 {
		t.Errorf("Resolve = %v after %d requests", err, asked)
	}
	// This host redirects from https to http. It has no file there.
	var sent []string
	repo = openRef(t, "oci:https://files.example/drivers", registry.Options{Keychain: keys,
		Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			sent = append(sent, r.URL.Scheme+" "+r.Header.Get("Authorization"))
			resp := &http.Response{StatusCode: http.StatusNotFound, Body: http.NoBody, Request: r, Header: http.Header{}}
			if r.URL.Scheme == "https" {
				resp.StatusCode = http.StatusUnauthorized
				if r.Header.Get("Authorization") != "" {
					resp.StatusCode = http.StatusFound
					resp.Header.Set("Location", "http://"+r.URL.Host+r.URL.Path)
				}
			}
			return resp, nil
		})})
	_, err := repo.Resolve(t.Context(), "v1")
	want := []string{"https ", "https Bearer ya29", "http "}
	if diff := cmp.Diff(want, sent); !fault.Is(err, fault.NoArtifact) || diff != "" {
		t.Errorf("Resolve = %v; want no artifact. The requests and their credentials (-want +got):\n%s", err, diff)
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestSiteOfMany has a site with 3000 manifests and no list of referrers. The client must read only a part of the
// manifests.
func TestSiteOfMany(t *testing.T) {
	t.Parallel()
	var index strings.Builder
	index.WriteString(`{"schemaVersion":2,"manifests":[`)
	for i := range 3000 {
		if i > 0 {
			index.WriteString(",")
		}
		fmt.Fprintf(
			&index,
			`{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":7,"digest":"sha256:%064x"}`,
			i,
		)
	}
	index.WriteString("]}")
	var asked atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		text := `{"x":1}`
		if strings.HasSuffix(r.URL.Path, "index.json") {
			text = index.String()
		}
		_, _ = w.Write([]byte(text)) // an error means that the client is gone
	}))
	t.Cleanup(srv.Close)
	list, err := openRef(
		t,
		"oci:"+srv.URL,
		registry.Options{},
	).Referrers(t.Context(), "sha256:"+strings.Repeat("ab", 32), "")
	if err != nil || len(list) > 0 || asked.Load() > 1100 {
		t.Errorf("Referrers = %d, %v after %d requests", len(list), err, asked.Load())
	}
}

// TestSiteWithoutListBlob has a site whose index names a list of referrers, but which lacks the list's blob. The site
// must count as damaged, so that a node asks the next repository.
func TestSiteWithoutListBlob(t *testing.T) {
	t.Parallel()
	dir, digest := publishLayout(t)
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	var idx v1.IndexManifest
	if err == nil {
		err = json.Unmarshal(raw, &idx)
	}
	for _, d := range idx.Manifests {
		if err == nil && d.MediaType.IsIndex() {
			err = os.Remove(filepath.Join(dir, "blobs/sha256", d.Digest.Hex))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(srv.Close)
	repo := openRef(t, "oci:"+srv.URL, registry.Options{})
	if all, err := repo.Attached(t.Context(), digest, labelledType); !fault.Is(err, fault.Unverified) {
		t.Errorf("Attached = %d payloads, %v (%v); want unverified", len(all), err, fault.Of(err))
	}
}
