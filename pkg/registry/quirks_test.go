package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// startProxy starts a proxy in front of a registry. If answer returns true, it has answered in the registry's place.
// change may alter the registry's response. The proxy logs nothing, even if a connection breaks.
func startProxy(t *testing.T, host string, answer func(w http.ResponseWriter, r *http.Request) bool,
	change func(*http.Response) error) string {
	t.Helper()
	silent := slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	behind := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: host})
	behind.ModifyResponse, behind.ErrorLog = change, silent
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if answer == nil || !answer(w, r) {
			behind.ServeHTTP(w, r)
		}
	}))
	s.Config.ErrorLog = silent
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// TestOddReferrers has registries without the referrers API that do not answer 404 to a request for referrers.
// Attestations must be attached and found nevertheless. The answers are invented.
func TestOddReferrers(t *testing.T) {
	t.Parallel()
	hosts := map[string]string{}
	for name, row := range map[string]struct {
		status int
		kind   string
	}{
		"403": {403, "application/json"}, "405": {405, "application/json"}, "406": {406, "application/json"},
		"410": {410, "application/json"},
		"501": {501, "application/json"}, "a page": {200, "text/html"},
	} {
		hosts[name] = startProxy(t, testkit.Registry(t, false), func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/referrers/") {
				return false
			}
			w.Header().Set("Content-Type", row.kind)
			w.WriteHeader(row.status)
			return true
		}, nil)
	}
	hosts["a charset"] = startProxy(t, testkit.Registry(t, true), nil, func(resp *http.Response) error {
		if strings.Contains(resp.Request.URL.Path, "/referrers/") {
			resp.Header.Set("Content-Type", resp.Header.Get("Content-Type")+"; charset=utf-8")
		}
		return nil
	})
	for name, host := range hosts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			repo := open(t, host+"/x")
			s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
			s.Publish(t, repo)
			if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 2 {
				t.Errorf("Attached = %d statements, %v; want 2", len(got), err)
			}
		})
	}
}

// TestOddReferrersTag checks a list of referrers under a tag. The list may lack its media type. If the tag belongs to
// an image, a list must not replace the image.
func TestOddReferrersTag(t *testing.T) {
	t.Parallel()
	put := func(host, tag, kind string, body []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+host+"/v2/x/manifests/"+tag,
			bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kind)
		resp, err := http.DefaultClient.Do(req)
		if err != nil || resp.StatusCode != http.StatusCreated {
			t.Fatalf("PUT %s = %v, %v", tag, resp, err)
		}
		_ = resp.Body.Close()
	}
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	other := testkit.NewSample(t, key, testkit.SampleKernel("50"), driver, "other")
	tag := strings.Replace(s.Digest, ":", "-", 1)

	host := testkit.Registry(t, false)
	put(host, tag, string(types.OCIImageIndex), []byte(`{"schemaVersion":2,"manifests":[]}`))
	repo := open(t, host+"/x")
	s.Publish(t, repo)
	if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 2 {
		t.Errorf("with a list without a media type: Attached = %d statements, %v; want 2", len(got), err)
	}

	host = testkit.Registry(t, false)
	repo = open(t, host+"/x")
	for _, sample := range []testkit.Sample{s, other} {
		if _, err := repo.Push(t.Context(), sample.Image); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := other.Image.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	put(host, tag, string(types.OCIManifestSchema1), raw)
	if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != 0 {
		t.Errorf("with an image there: Attached = %d statements, %v; want none", len(got), err)
	}
	err = attachOne(t, repo, s)
	if fault.Of(err) != fault.PublishRefused || fault.Hint(err) == "" {
		t.Errorf("with an image there: Attach = %v (%v); want %v with a hint", err, fault.Of(err), fault.PublishRefused)
	}
	if d, err := repo.Resolve(t.Context(), tag); err != nil || d.Digest.String() != other.Digest {
		t.Errorf("the image's tag names %v now, %v", d.Digest, err)
	}
}

// TestRetryAfter checks that the client waits as long as the registry asks. If the registry asks for more than the
// client's limit, the client must not wait at all.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]struct {
		waited time.Duration
		kind   fault.Kind
	}{"30": {30 * time.Second, fault.NoArtifact}, "3600": {0, fault.Transient}, "soon": {0, fault.Transient}} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var calls atomic.Int64
				tr := answer(func(r *http.Request) (*http.Response, error) {
					if r.URL.Path == "/v2/" {
						return reply(r, 200, strings.NewReader(""), ""), nil
					}
					if calls.Add(1) > 1 && want.waited > 0 {
						return reply(r, 404, strings.NewReader("{}"), "application/json"), nil
					}
					resp := reply(r, 429, strings.NewReader("{}"), "application/json")
					resp.Header.Set("Retry-After", text)
					return resp, nil
				})
				repo, err := registry.Open("registry.example.com/x", registry.Options{Transport: tr, Username: "u", Password: "p"})
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				_, err = repo.Manifest(t.Context(), "sha256:"+strings.Repeat("0", 64))
				if fault.Of(err) != want.kind {
					t.Errorf("Manifest = %v (%v); want %v", err, fault.Of(err), want.kind)
				}
				if took := time.Since(start); want.waited > 0 && took != want.waited || took > time.Minute {
					t.Errorf("it took %v; want %v", took, want.waited)
				}
			})
		})
	}
}

func attachOne(t *testing.T, repo *registry.Repository, s testkit.Sample) error {
	t.Helper()
	d, err := repo.Resolve(t.Context(), s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	_, err = repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, []byte(`{"more":"`+t.Name()+`"}`), nil)
	return err
}

// TestLayoutConventions checks the two ways in which a layout lists attachments. oras reads and writes entries of the
// index. regclient uses a list under a tag (regctl image copy --referrers to ocidir://).
func TestLayoutConventions(t *testing.T) {
	t.Parallel()
	const refName = "org.opencontainers.image.ref.name"
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	tag := strings.Replace(s.Digest, ":", "-", 1)
	for name, keep := range map[string]func(d v1.Descriptor) bool{
		"as regclient leaves it": func(d v1.Descriptor) bool { return d.Annotations[refName] != "" },
		"as oras leaves it":      func(d v1.Descriptor) bool { return d.Annotations[refName] != tag },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			repo := open(t, "oci:"+dir)
			s.Publish(t, repo)
			edit(t, filepath.Join(dir, "index.json"), keep)
			for want := 2; want <= 3; want++ {
				if got, err := repo.Attached(t.Context(), s.Digest, trust.ArtifactTypeBundle); err != nil || len(got) != want {
					t.Errorf("Attached = %d statements, %v; want %d", len(got), err, want)
				}
				if err := attachOne(t, repo, s); err != nil {
					t.Fatal(err)
				}
			}
			d, err := repo.Resolve(t.Context(), tag)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := os.ReadFile(filepath.Join(dir, "blobs", "sha256", d.Digest.Hex))
			if err != nil {
				t.Fatal(err)
			}
			var list v1.IndexManifest
			if err := json.Unmarshal(raw, &list); err != nil || len(list.Manifests) != 3 ||
				list.Manifests[0].ArtifactType != trust.ArtifactTypeBundle {
				t.Errorf("the list under %s is %s, %v; want three statements", tag, raw, err)
			}
		})
	}

	// A list must not replace an image that has the list's tag.
	dir := t.TempDir()
	repo := open(t, "oci:"+dir)
	if _, err := repo.Push(t.Context(), s.Image); err != nil {
		t.Fatal(err)
	}
	edit(t, filepath.Join(dir, "index.json"), func(d v1.Descriptor) bool {
		d.Annotations[refName] = tag
		return true
	})
	if err := attachOne(t, repo, s); fault.Of(err) != fault.PublishRefused || fault.Hint(err) == "" {
		t.Errorf("Attach with an image under the list's tag = %v; want %v with a hint", err, fault.PublishRefused)
	}
}

// TestLayoutListIsBounded checks that the client refuses to attach a referrer if the list of referrers would become too
// long. A refusal must change nothing.
func TestLayoutListIsBounded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	repo := open(t, "oci:"+dir)
	s := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("47"), driver, "")
	subject, err := repo.Push(t.Context(), s.Image)
	if err != nil {
		t.Fatal(err)
	}
	attach := func(payload string, annotation int) error {
		_, err := repo.Attach(t.Context(), subject, labelledType, []byte(payload),
			map[string]string{"a": strings.Repeat("x", annotation)})
		return err
	}
	if err := attach("first", registry.MaxManifest/2); err != nil {
		t.Fatal(err)
	}
	before := filesIn(t, dir)
	if err := attach("second", registry.MaxManifest/2); fault.Of(err) != fault.PublishRefused || fault.Hint(err) == "" {
		t.Errorf("Attach with a list that is too long = %v; want %v with a hint", err, fault.PublishRefused)
	}
	if diff := cmp.Diff(before, filesIn(t, dir)); diff != "" {
		t.Errorf("a refused attachment changed the folder (-want +got):\n%s", diff)
	}
	if err := attach("third", 1); err != nil {
		t.Errorf("Attach after the refusal = %v; want nil", err)
	}
	if list, err := repo.Referrers(t.Context(), s.Digest, labelledType); err != nil || len(list) != 2 {
		t.Errorf("Referrers = %d, %v; want the first and the third", len(list), err)
	}
}

// edit removes the entries of an index for which keep returns false. keep may change an entry.
func edit(t *testing.T, file string, keep func(d v1.Descriptor) bool) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var idx v1.IndexManifest
	if err := json.Unmarshal(raw, &idx); err != nil {
		t.Fatal(err)
	}
	var kept []v1.Descriptor
	for _, d := range idx.Manifests {
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		if keep(d) {
			kept = append(kept, d)
		}
	}
	idx.Manifests = kept
	if raw, err = json.Marshal(idx); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestTagsLink checks where a list of tags ends: at the first page without a link to a next page. The error about a
// wrong Link header must name the header.
func TestTagsLink(t *testing.T) {
	t.Parallel()
	for header, want := range map[string][]string{
		`<?last=a>; rel="next"`:                            {"a", "b"},
		`<?last=x>; rel="prev", <?last=a>; rel="next"`:     {"a", "b"},
		`<?last=x>; rel="prev"`:                            {"a"},
		`<https://other.example/v2/x/tags/list>; rel=next`: nil,
		`<>; rel="next"`:                                   nil,
		`/v2/x/tags/list?last=a; rel="next"`:               nil,
	} {
		t.Run(header, func(t *testing.T) {
			t.Parallel()
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				page := `{"tags":["a"]}`
				switch last := r.URL.Query().Get("last"); {
				case !strings.HasSuffix(r.URL.Path, "/tags/list"):
					return
				case last == "a":
					page = `{"tags":["b"]}`
				case last == "":
					w.Header().Set("Link", header)
				}
				_, _ = w.Write([]byte(page)) // an error means that the client is gone
			}))
			t.Cleanup(srv.Close)
			repo := open(t, strings.TrimPrefix(srv.URL, "http://")+"/x")
			tags, err := repo.Tags(t.Context())
			if diff := cmp.Diff(want, tags); diff != "" || (err == nil) != (want != nil) {
				t.Errorf("Tags = %v (-want +got):\n%s", err, diff)
			}
			if want == nil && (!errors.Is(err, registry.ErrLink) || !fault.Is(err, fault.Unverified) ||
				!strings.Contains(fault.Hint(err), "Link header")) {
				t.Errorf("Tags = %v (%v), hint %q; want unverified with the next step for the Link header", err, fault.Of(err),
					fault.Hint(err))
			}
			// AnonymousAccess asks for one tag. It must not read a further page.
			if got, err := repo.AnonymousAccess(t.Context(), ""); err != nil || !got.Reads {
				t.Errorf("AnonymousAccess = %+v, %v; want that everybody reads", got, err)
			}
		})
	}
}
