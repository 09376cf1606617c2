package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

var driver = target.Driver{Version: "535.261.03", Flavour: target.Open}

func open(t testing.TB, ref string) *registry.Repository {
	t.Helper()
	r, err := registry.Open(ref, registry.Options{UserAgent: "prebake-test"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// places returns one empty repository of each kind that this package supports.
func places(t testing.TB) map[string]*registry.Repository {
	return map[string]*registry.Repository{
		"registry with referrers":    open(t, testkit.Registry(t, true)+"/prebake/driver"),
		"registry without referrers": open(t, testkit.Registry(t, false)+"/prebake/driver"),
		"layout":                     open(t, "oci:"+filepath.Join(t.TempDir(), "new", "layout")),
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	other := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "salt")
	for name, repo := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			tag := bundle.Tag(s.Identity)
			for _, ref := range []string{tag, s.Digest} {
				if d, err := repo.Resolve(ctx, ref); !fault.Is(err, fault.NoArtifact) {
					t.Errorf("Resolve(%s) before publishing = %v, %v; want no artifact", ref, d, err)
				}
			}
			if list, err := repo.Referrers(ctx, s.Digest, ""); err != nil && !fault.Is(err, fault.NoArtifact) || len(list) > 0 {
				t.Errorf("Referrers before publishing = %v, %v", list, err)
			}
			s.Publish(t, repo)
			s.Publish(t, repo) // the second time, Publish adds nothing
			other.Bundles = nil
			d, err := repo.Push(ctx, other.Image)
			if err != nil {
				t.Fatal(err)
			}
			if err := repo.Tag(ctx, d, tag); !fault.Is(err, fault.PublishRefused) {
				t.Errorf("Tag(another digest) = %v; want publish refused", err)
			}
			for _, ref := range []string{tag, s.Digest, bundle.KernelTag(s.Kernel, driver)} {
				if d, err := repo.Resolve(ctx, ref); err != nil || d.Digest.String() != s.Digest || d.Size == 0 ||
					!d.MediaType.IsImage() {
					t.Errorf("Resolve(%s) = %v, %v; want %s", ref, d, err, s.Digest)
				}
			}
			checkContent(t, repo, s)
			got, err := repo.Attached(ctx, s.Digest, trust.ArtifactTypeBundle)
			if err != nil || len(got) != 2 {
				t.Fatalf("Attached = %d payloads, %v; want 2", len(got), err)
			}
			if _, err := key.Verifier(t).Verify(got, s.Expect()); err != nil {
				t.Errorf("Verify(Attached) = %v", err)
			}
			if list, err := repo.Referrers(ctx, s.Digest, "application/x"); err != nil || len(list) != 0 {
				t.Errorf("Referrers(another type) = %v, %v; want none", list, err)
			}
			if list, err := repo.Referrers(ctx, other.Digest, ""); err != nil || len(list) != 0 {
				t.Errorf("Referrers(another artifact) = %v, %v; want none", list, err)
			}
		})
	}
}

func checkContent(t *testing.T, repo *registry.Repository, s testkit.Sample) {
	t.Helper()
	ctx := t.Context()
	manifest, err := repo.Manifest(ctx, s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	cd, err := bundle.ConfigDescriptor(manifest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := repo.Small(ctx, cd)
	if err != nil {
		t.Fatal(err)
	}
	content, err := bundle.ParseManifest(manifest, config)
	if err != nil || content.Identity != s.Identity {
		t.Fatalf("ParseManifest = %+v, %v; want %+v", content, err, s.Identity)
	}
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, l := range content.Layers {
		rc, err := repo.Blob(ctx, l.Digest, l.Size)
		if err != nil {
			t.Fatal(err)
		}
		if err := bundle.Unpack(ctx, rc, l.Digest, l.DiffID, l.Size, root); err != nil {
			t.Errorf("Unpack(%s) = %v", l.Kind, err)
		}
		if err := rc.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "drivers/nvidia.ko")); err != nil {
		t.Error(err)
	}
}

func TestAttachmentsOfOthers(t *testing.T) {
	t.Parallel()
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	for name, repo := range places(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s.Publish(t, repo)
			d, err := repo.Resolve(t.Context(), s.Digest)
			if err != nil {
				t.Fatal(err)
			}
			for _, payload := range [][]byte{make([]byte, registry.MaxAttachment+1), []byte("junk")} {
				if _, err := repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, payload, nil); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := repo.Attach(t.Context(), d, "application/x", []byte("another type"), nil); err != nil {
				t.Fatal(err)
			}
			if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 3 {
				t.Errorf("Attached = %d payloads, %v; want 3: two valid, one junk, none that is too long", len(got), err)
			}
		})
	}
}

func TestLayoutIsOneForOthers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	repo := open(t, "oci:"+dir)
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	s.Publish(t, repo)
	path, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	idx, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	tags := 0
	for _, d := range m.Manifests {
		if d.Annotations["org.opencontainers.image.ref.name"] != "" {
			tags++
		}
	}
	if len(m.Manifests) != 5 || tags != 3 {
		t.Errorf("index has %d entries, %d with a tag; want 5 (2 tags, 2 attachments, the list of these)", len(m.Manifests),
			tags)
	}
	h, err := v1.NewHash(s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if img, err := path.Image(h); err != nil {
		t.Error(err)
	} else if l, err := img.Layers(); err != nil || len(l) != 3 {
		t.Errorf("Layers = %v, %v", l, err)
	}
	// A writer must remove the temporary file that a killed writer left.
	stale := filepath.Join(dir, ".prebake.tmp-1")
	if err := os.WriteFile(stale, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Push(t.Context(), s.Image); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stale file is still there: %v", err)
	}
}

func TestLayoutManyWriters(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "l")
	key := testkit.NewKey(t)
	const writers = 8
	var samples []testkit.Sample
	for i := range writers {
		samples = append(samples, testkit.NewSample(t, key, testkit.SampleKernel(fmt.Sprint(40+i)), driver, ""))
	}
	var wg sync.WaitGroup
	for _, s := range samples {
		wg.Go(func() {
			s.Publish(t, open(t, "oci:"+dir)) // each writer opens the folder itself, as separate processes do
		})
	}
	wg.Wait()
	repo := open(t, "oci:"+dir)
	for _, s := range samples {
		if d, err := repo.Resolve(t.Context(), bundle.Tag(s.Identity)); err != nil || d.Digest.String() != s.Digest {
			t.Errorf("Resolve = %v, %v; want %s", d, err, s.Digest)
		}
		if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 2 {
			t.Errorf("Attached = %d, %v; want 2", len(got), err)
		}
	}
}

func TestDamagedLayout(t *testing.T) {
	t.Parallel()
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	dir := t.TempDir()
	repo := open(t, "oci:"+dir)
	s.Publish(t, repo)
	flip := func(digest string) {
		path := filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[len(data)/2] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, err := repo.Referrers(t.Context(), s.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := repo.Manifest(t.Context(), list[0].Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	flip(m.Layers[0].Digest.String())
	if _, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); !fault.Is(err, fault.Unverified) {
		t.Errorf("Attached(flipped byte) = %v; want unverified", err)
	}
	flip(s.Digest)
	if _, err := repo.Manifest(t.Context(), s.Digest); !fault.Is(err, fault.Unverified) {
		t.Errorf("Manifest(flipped byte) = %v; want unverified", err)
	}
}

// answer is an HTTP transport. It answers every request itself, without a network.
type answer func(*http.Request) (*http.Response, error)

func (a answer) RoundTrip(r *http.Request) (*http.Response, error) { return a(r) }

func reply(r *http.Request, status int, body io.Reader, contentType string) *http.Response {
	h := http.Header{}
	h.Set("Content-Type", contentType)
	return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(body), Request: r, ProtoMajor: 1,
		ProtoMinor: 1, ContentLength: -1}
}

func TestRemoteErrors(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("0", 64)
	status := func(code int) answer {
		return func(r *http.Request) (*http.Response, error) {
			if r.URL.Path == "/v2/" {
				return reply(r, 200, strings.NewReader(""), ""), nil
			}
			return reply(r, code, strings.NewReader("{}"), "application/json"), nil
		}
	}
	endless := answer(func(r *http.Request) (*http.Response, error) {
		if r.URL.Path == "/v2/" {
			return reply(r, 200, strings.NewReader(""), ""), nil
		}
		return reply(r, 200, neverEnding{}, "application/vnd.oci.image.index.v1+json"), nil
	})
	other := answer(func(r *http.Request) (*http.Response, error) {
		return reply(r, 200, strings.NewReader(`{"schemaVersion":2}`), "application/vnd.oci.image.manifest.v1+json"), nil
	})
	broken := answer(func(*http.Request) (*http.Response, error) { return nil, errDial })
	rows := []struct {
		name  string
		tr    http.RoundTripper
		read  fault.Kind
		write fault.Kind
	}{
		{"not found", status(404), fault.NoArtifact, fault.PublishRefused},
		{"unauthorized", status(401), fault.Usage, fault.PublishRefused},
		{"forbidden", status(403), fault.Usage, fault.PublishRefused},
		{"method not allowed", status(405), fault.Internal, fault.PublishRefused},
		{"not implemented", status(501), fault.Transient, fault.Transient},
		{"no network", broken, fault.Transient, fault.Transient},
		{"endless answer", endless, fault.Unverified, -1},
		{"another manifest", other, fault.Unverified, -1},
	}
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			repo, err := registry.Open("registry.example.com/x",
				registry.Options{Transport: row.tr, Username: "u", Password: "p"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := repo.Manifest(t.Context(), digest); !fault.Is(err, row.read) {
				t.Errorf("Manifest = %v (%v); want %v", err, fault.Of(err), row.read)
			}
			if row.write < 0 {
				return
			}
			if _, err := repo.Push(t.Context(), s.Image); !fault.Is(err, row.write) {
				t.Errorf("Push = %v (%v); want %v", err, fault.Of(err), row.write)
			}
			if row.write == fault.PublishRefused && row.read == fault.Usage {
				if _, err := repo.Push(t.Context(), s.Image); !strings.Contains(fault.Hint(err),
					"docker login registry.example.com") {
					t.Errorf("hint = %q; want docker login", fault.Hint(err))
				}
			}
		})
	}
}

var errDial = &netError{}

type netError struct{}

func (*netError) Error() string   { return "no route to host" }
func (*netError) Timeout() bool   { return false }
func (*netError) Temporary() bool { return false }

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) {
	return copy(p, bytes.Repeat([]byte(" "), len(p))), nil
}

func TestFlippedBlobOnTheWay(t *testing.T) {
	t.Parallel()
	host := testkit.Registry(t, true)
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	s.Publish(t, open(t, host+"/x"))
	l := s.Layers[0]
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resp, err := http.Get("http://" + host + r.URL.Path)
		if err != nil {
			http.Error(w, err.Error(), 500)
			return
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		if strings.Contains(r.URL.Path, "/blobs/") {
			body[len(body)/2] ^= 1
		}
		w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
		w.WriteHeader(resp.StatusCode)
		_, _ = w.Write(body)
	}))
	t.Cleanup(evil.Close)
	repo := open(t, strings.TrimPrefix(evil.URL, "http://")+"/x")
	rc, err := repo.Blob(t.Context(), l.Digest, l.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := bundle.Unpack(t.Context(), rc, l.Digest, l.DiffID, l.Size, root); !fault.Is(err, fault.Unverified) {
		t.Errorf("Unpack(flipped byte) = %v (%v); want unverified", err, fault.Of(err))
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var users []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, pass, ok := r.BasicAuth()
		if !ok || pass != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "{}", http.StatusUnauthorized)
			return
		}
		mu.Lock()
		users = append(users, user)
		mu.Unlock()
		http.NotFound(w, r)
	}))
	t.Cleanup(srv.Close)
	for _, o := range []registry.Options{{Password: "secret"}, {Username: "me", Password: "secret"}} {
		repo, err := registry.Open(strings.TrimPrefix(srv.URL, "http://")+"/x", o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := repo.Resolve(t.Context(), "tag"); !fault.Is(err, fault.NoArtifact) {
			t.Errorf("Resolve = %v; want no artifact, behind the login", err)
		}
	}
	if got := strings.Join(users, " "); !strings.Contains(got, "token") || !strings.Contains(got, "me") {
		t.Errorf("users = %q; want token and me", got)
	}
}

func TestCancelled(t *testing.T) {
	t.Parallel()
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, repo := range places(t) {
		if _, err := repo.Push(ctx, s.Image); !fault.Is(err, fault.Cancelled) {
			t.Errorf("%s: Push(cancelled) = %v (%v); want cancelled", name, err, fault.Of(err))
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, ref := range []string{"", "oci:", "driver", "prebake/driver", "host:5000", "host:5000/UPPER",
		"https://host/x"} {
		if r, err := registry.Open(ref, registry.Options{}); !fault.Is(err, fault.Usage) {
			t.Errorf("Open(%q) = %v, %v; want kind usage", ref, r, err)
		}
	}
	repo := open(t, "oci:"+t.TempDir())
	for _, ref := range []string{"", "a b", "sha256:00", "../x", strings.Repeat("a", 129)} {
		if _, err := repo.Resolve(t.Context(), ref); !fault.Is(err, fault.Usage) {
			t.Errorf("Resolve(%q) = %v; want kind usage", ref, err)
		}
	}
	if _, err := repo.Blob(t.Context(), "sha256:../../etc/passwd", 1); !fault.Is(err, fault.Usage) {
		t.Errorf("Blob(path) = %v; want kind usage", err)
	}
}
