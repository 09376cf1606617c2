package registry_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

const labelledType = "application/vnd.test.labelled"

// pushRandom pushes an image with layers of random bytes.
func pushRandom(t *testing.T, repo *registry.Repository, size, layers int64) v1.Descriptor {
	t.Helper()
	img, err := random.Image(size, layers)
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// crowd pushes an image with attachments: more of kind match than a client reads, one of kind plan, and one without
// annotations.
func crowd(t *testing.T, repo *registry.Repository) (digest string) {
	t.Helper()
	subject := pushRandom(t, repo, 64, 1)
	attach := func(text string, annotations map[string]string) {
		if _, err := repo.Attach(t.Context(), subject, labelledType, []byte(text), annotations); err != nil {
			t.Fatal(err)
		}
	}
	attach("plan", map[string]string{"kind": "plan"})
	attach("old plan", nil)
	attach("old match", map[string]string{"kind": "match"})
	for i := range registry.MaxAttachments + 8 {
		attach(fmt.Sprintf("match %d", i), map[string]string{"kind": "match", "of": strconv.Itoa(i)})
	}
	return subject.Digest.String()
}

func attached(t *testing.T, repo *registry.Repository, digest string, wanted ...map[string]string) []string {
	t.Helper()
	raw, err := repo.Attached(t.Context(), digest, labelledType, wanted...)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, r := range raw {
		all = append(all, string(r))
	}
	return all
}

func TestAttachedOfMany(t *testing.T) {
	t.Parallel()
	for name, ref := range map[string]string{
		"with referrers": testkit.Registry(t, true) + "/many", "without": testkit.Registry(t, false) + "/many",
		"layout": "oci:" + filepath.Join(t.TempDir(), "l"), "in pages": newPaged(t, nil) + "/many",
		"lists no annotations": newPaged(t, removeAnnotations) + "/many",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			repo := open(t, ref)
			digest := crowd(t, repo)
			plan, match := map[string]string{"kind": "plan"}, map[string]string{"kind": "match", "of": "7"}

			got := attached(t, repo, digest, plan, match)
			if name == "lists no annotations" {
				slices.Sort(got) // without annotations each attachment may match, so they have no order
			} else {
				slices.Sort(got[2:])
			}
			want := []string{"plan", "match 7", "old match", "old plan"}
			if name == "lists no annotations" {
				slices.Sort(want)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("Attached(plan, match 7) (-want +got):\n%s", diff)
			}

			// Many attachments of one kind must not hide an attachment of another kind.
			got = attached(t, repo, digest, map[string]string{"kind": "match"}, plan)
			if name != "lists no annotations" && !slices.Contains(got[:2], "plan") {
				t.Errorf("Attached(every match, plan) begins with %q; want the plan in it", got[:2])
			}
			if len(got) > 2*registry.MaxAttachments {
				t.Errorf("Attached(every match, plan) = %d payloads; want at most %d", len(got), 2*registry.MaxAttachments)
			}
			if got := attached(t, repo, digest); len(got) != registry.MaxAttachments {
				t.Errorf("Attached() = %d payloads; want %d", len(got), registry.MaxAttachments)
			}
		})
	}
}

// removeAnnotations removes the annotations of all entries in a page of a list.
func removeAnnotations(page *v1.IndexManifest, _ http.Header) {
	for i := range page.Manifests {
		page.Manifests[i].Annotations = nil
	}
}

// newPaged starts a registry that lists at most 40 referrers in a page, and returns its host:port. If change is not
// nil, it may alter each page.
func newPaged(t *testing.T, change func(page *v1.IndexManifest, h http.Header)) string {
	t.Helper()
	behind := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: testkit.Registry(t, true)})
	behind.ModifyResponse = func(resp *http.Response) error {
		if !strings.Contains(resp.Request.URL.Path, "/referrers/") || resp.StatusCode != http.StatusOK {
			return nil
		}
		var list v1.IndexManifest
		if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
			return err
		}
		slices.SortFunc(list.Manifests, func(a, b v1.Descriptor) int { return strings.Compare(a.Digest.Hex, b.Digest.Hex) })
		from, _ := strconv.Atoi(resp.Request.URL.Query().Get("from"))
		to := min(from+40, len(list.Manifests))
		if to < len(list.Manifests) {
			resp.Header.Set("Link", fmt.Sprintf(`<%s?from=%d>; rel="next"`, resp.Request.URL.Path, to))
		}
		list.Manifests = list.Manifests[from:to]
		if change != nil {
			change(&list, resp.Header)
		}
		raw, err := json.Marshal(list)
		if err != nil {
			return err
		}
		resp.Header.Del("Content-Length")
		resp.ContentLength = int64(len(raw))
		resp.Body = http.NoBody
		if len(raw) > 0 {
			resp.Body = readCloser{strings.NewReader(string(raw))}
		}
		return nil
	}
	s := httptest.NewServer(behind)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

func TestHostilePages(t *testing.T) {
	t.Parallel()
	elsewhere := atomic.Int64{}
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	link := func(header string) func(*v1.IndexManifest, http.Header) {
		return func(_ *v1.IndexManifest, h http.Header) { h.Set("Link", header) }
	}
	rows := map[string]struct {
		change func(page *v1.IndexManifest, h http.Header)
		words  string // text that the error must contain
	}{
		"endless":         {endlessPages(0), "more than 256 pages"},
		"too long":        {endlessPages(registry.MaxManifest / 10), "too long"},
		"of another host": {link("<" + other.URL + `>; rel="next"`), "wrong Link header: the next page"},
		"of another list": {link(`</v2/x/referrers/y>; rel="next"`), "wrong Link header: the next page"},
		"no URL":          {link(`<%zz>; rel="next"`), "wrong Link header: the next page"},
		"no form":         {link(`/v2/x/referrers/y?from=40; rel="next"`), "wrong Link header: "},
		"the same again":  {link(`<?from=0>; rel="next"`), "wrong Link header: the header names as the next page"},
		"itself":          {link(`<>; rel="next"`), "wrong Link header: the header names as the next page"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			armed := atomic.Bool{}
			repo := open(t, newPaged(t, func(page *v1.IndexManifest, h http.Header) {
				if armed.Load() {
					row.change(page, h)
				}
			})+"/pages")
			subject := pushRandom(t, repo, 64, 1)
			armed.Store(true)
			list, err := repo.Referrers(t.Context(), subject.Digest.String(), "")
			if !fault.Is(err, fault.Unverified) || !strings.Contains(err.Error(), row.words) {
				t.Errorf("Referrers = %d, %v (%v); want unverified with %q", len(list), err, fault.Of(err), row.words)
			}
			wrong := strings.HasPrefix(row.words, "wrong Link")
			if errors.Is(err, registry.ErrLink) != wrong || strings.Contains(fault.Hint(err), "Link header") != wrong {
				t.Errorf("Referrers = %v, hint %q; want the next step for the Link header: %t", err, fault.Hint(err), wrong)
			}
			if n := elsewhere.Load(); n != 0 {
				t.Errorf("%d requests went to another host", n)
			}
		})
	}
}

// endlessPages makes each page of a list name a next page. Each page gets the given number of additional bytes.
func endlessPages(padding int) func(page *v1.IndexManifest, h http.Header) {
	var n atomic.Int64
	return func(page *v1.IndexManifest, h http.Header) {
		if padding > 0 {
			page.Annotations = map[string]string{"padding": strings.Repeat("x", padding)}
		}
		h.Set("Link", fmt.Sprintf(`<?from=0&n=%d>; rel="next"`, n.Add(1)))
	}
}

// TestAttachedIf checks that useless, missing and damaged attachments do not hide the useful ones.
func TestAttachedIf(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	repo := open(t, "oci:"+dir)
	subject := pushRandom(t, repo, 64, 1)
	label := map[string]string{"kind": "plan"}
	attach := func(text string) v1.Descriptor {
		d, err := repo.Attach(t.Context(), subject, labelledType, []byte(text), label)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for i := range registry.MaxAttachments + 16 {
		attach(fmt.Sprintf("junk %d", i))
	}
	attach("good")
	dangling, broken := attach("good, and then gone"), attach("good, and then broken")
	blob := func(d v1.Descriptor) string { return filepath.Join(dir, "blobs/sha256", d.Digest.Hex) }
	if err := os.Remove(blob(dangling)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blob(broken), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range registry.MaxAttachments + 8 { // the same statement in other bytes
		attach("good" + strings.Repeat(" ", i+1))
	}
	attach("good too")
	good := func(b []byte) string {
		if text := strings.TrimSpace(string(b)); strings.HasPrefix(text, "good") {
			return text
		}
		return ""
	}
	all, err := repo.AttachedIf(t.Context(), subject.Digest.String(), labelledType, good, label)
	if err != nil || len(all) < 3 {
		t.Fatalf("AttachedIf = %d payloads, %v", len(all), err)
	}
	said := []string{good(all[0]), good(all[1])}
	slices.Sort(said)
	if !slices.Equal(said, []string{"good", "good too"}) || good(all[2]) != "" || len(all) > 12 {
		t.Errorf("AttachedIf = %d payloads, the first %q; want the two good ones once, and a few others", len(all), all[:3])
	}
}

// TestAttachedIfFailsHalfway lets an error occur in the middle of a list. AttachedIf must return the payloads that it
// has read, and its error must name the listed attachments that it has not read.
func TestAttachedIfFailsHalfway(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	img, err := random.Image(64, 1)
	if err != nil {
		t.Fatal(err)
	}
	written := open(t, "oci:"+dir)
	subject, err := written.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	label := map[string]string{"kind": "plan"}
	texts := map[string]string{} // by the digest of the attachment
	for i := range 6 {
		text := fmt.Sprintf("plan %d", i)
		d, err := written.Attach(t.Context(), subject, labelledType, []byte(text), label)
		if err != nil {
			t.Fatal(err)
		}
		texts[d.Digest.String()] = text
	}
	if _, err := written.Attach(t.Context(), subject, labelledType+".other", []byte("x"), label); err != nil {
		t.Fatal(err)
	}
	sorted := slices.Sorted(maps.Keys(texts))
	bare := t.TempDir()
	if err := os.CopyFS(bare, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	removeLists(t, bare)
	third, err := v1.NewHash(sorted[2])
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct{ dir, broken string }{
		"a payload":                              {dir, payloadOf(t, written, v1.Descriptor{Digest: third})},
		"a manifest in the list":                 {dir, third.Hex},
		"a manifest without a list of referrers": {bare, third.Hex},
	} {
		files := http.FileServer(http.Dir(row.dir))
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, row.broken) {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			files.ServeHTTP(w, r)
		}))
		t.Cleanup(srv.Close)
		all, err := open(t, "oci:"+srv.URL).AttachedIf(t.Context(), subject.Digest.String(), labelledType,
			func(b []byte) string { return string(b) }, label)
		var got, left []string
		for _, b := range all {
			got = append(got, string(b))
		}
		var failed *registry.UnreadError
		if !errors.As(err, &failed) || !fault.Is(err, fault.Transient) {
			t.Fatalf("%s: AttachedIf = %q, %v; want transient with what was not read", name, got, err)
		}
		for _, d := range failed.Unread() {
			left = append(left, d.Digest.String())
		}
		if want := []string{texts[sorted[0]], texts[sorted[1]]}; !slices.Equal(got, want) {
			t.Errorf("%s: AttachedIf = %q; want what was read before the error, %q", name, got, want)
		}
		if !slices.Equal(left, sorted[2:]) {
			t.Errorf("%s: Unread = %q; want %q", name, left, sorted[2:])
		}
	}
}

// TestAttachedOfCutList breaks the second page of a list. Such a list is neither complete nor empty. AttachedIf must
// return the payloads of the first page, and an error that says that there may be more.
func TestAttachedOfCutList(t *testing.T) {
	t.Parallel()
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Query().Get("from") == "" {
				return false
			}
			w.WriteHeader(code)
			return true
		}
	}
	link := func(to string) func(*v1.IndexManifest, http.Header) {
		return func(_ *v1.IndexManifest, h http.Header) { h.Set("Link", "<"+to+`>; rel="next"`) }
	}
	for name, row := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request) bool
		change func(*v1.IndexManifest, http.Header)
		kind   fault.Kind
	}{
		"unavailable": {status(http.StatusServiceUnavailable), nil, fault.Transient},
		"not found":   {status(http.StatusNotFound), nil, fault.Transient},
		"denied":      {status(http.StatusForbidden), nil, fault.Transient},
		"damaged": {func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Query().Get("from") == "" {
				return false
			}
			w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
			_, _ = w.Write([]byte(`{"schemaVersion":2,"manifests":[{`))
			return true
		}, nil, fault.Unverified},
		"on another host": {nil, link("https://registry.example/v2/many/referrers/x"), fault.Unverified},
		"the same page":   {nil, link(""), fault.Unverified},
		"of no form": {nil, func(_ *v1.IndexManifest, h http.Header) {
			h.Set("Link", "http://registry.example/v2/many/referrers/x; rel=next")
		}, fault.Unverified},
		"of another protocol": {nil, link("ftp://127.0.0.1/v2/many/referrers/x"), fault.Unverified},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			armed := atomic.Bool{}
			behind := newPaged(t, func(page *v1.IndexManifest, h http.Header) {
				if armed.Load() && row.change != nil {
					row.change(page, h)
				}
			})
			repo := open(t, startProxy(t, behind, func(w http.ResponseWriter, r *http.Request) bool {
				return armed.Load() && row.answer != nil && row.answer(w, r)
			}, nil)+"/many")
			digest := crowd(t, repo)
			every := func(b []byte) string { return string(b) }
			whole, err := repo.AttachedIf(t.Context(), digest, labelledType, every)
			if err != nil {
				t.Fatal(err)
			}
			armed.Store(true)
			part, err := repo.AttachedIf(t.Context(), digest, labelledType, every)
			var failed *registry.UnreadError
			if !errors.As(err, &failed) || !failed.IsCut() || len(failed.Unread()) > 0 || !fault.Is(err, row.kind) {
				t.Errorf("AttachedIf = %d payloads, %v; want %v, with more than is listed", len(part), err, row.kind)
			}
			if len(part) != 40 || len(whole) <= 40 {
				t.Errorf("AttachedIf = %d payloads, %d without the error; want the 40 of the first page", len(part), len(whole))
			}
			if list, err := repo.Referrers(t.Context(), digest, ""); err == nil || len(list) > 0 {
				t.Errorf("Referrers = %d, %v; want only an error", len(list), err)
			}
		})
	}
}

// TestAttachedOfLostRegistry has a registry that no longer answers after the first page of a list. The error must name
// the attachments of this page as unread, and say that there may be more.
func TestAttachedOfLostRegistry(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusForbidden} {
		armed, lost := atomic.Bool{}, atomic.Bool{}
		repo := open(t, startProxy(t, newPaged(t, nil), func(w http.ResponseWriter, r *http.Request) bool {
			if !armed.Load() || !strings.Contains(r.URL.Path, "/referrers/") && !lost.Load() || !lost.Swap(true) {
				return false
			}
			w.WriteHeader(status)
			return true
		}, nil)+"/many")
		digest := crowd(t, repo)
		armed.Store(true)
		all, err := repo.AttachedIf(t.Context(), digest, labelledType, func(b []byte) string { return string(b) })
		var failed *registry.UnreadError
		if !errors.As(err, &failed) || !failed.IsCut() || !fault.Is(err, fault.Transient) || len(all) > 0 {
			t.Fatalf("status %d: AttachedIf = %d payloads, %v; want transient, with more than is listed", status, len(all), err)
		}
		if n := len(failed.Unread()); n != 40 {
			t.Errorf("status %d: %d attachments unread; want the 40 of the first page", status, n)
		}
	}
}

// TestAttachedOfLongList checks a list that is too long. Anybody with the right to push can cause it. So it must count
// like a repository that lists nothing, and must not block the caller.
func TestAttachedOfLongList(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*v1.IndexManifest, http.Header){
		"pages": endlessPages(0), "bytes": endlessPages(registry.MaxManifest),
	} {
		armed := atomic.Bool{}
		repo := open(t, newPaged(t, func(page *v1.IndexManifest, h http.Header) {
			if armed.Load() {
				change(page, h)
			}
		})+"/many")
		digest := crowd(t, repo)
		armed.Store(true)
		all, err := repo.AttachedIf(t.Context(), digest, labelledType, func(b []byte) string { return string(b) })
		if !fault.Is(err, fault.Unverified) || errors.As(err, new(*registry.UnreadError)) || len(all) > 0 {
			t.Errorf("%s: AttachedIf = %d payloads, %v; want unverified, as of a repository that lists nothing", name,
				len(all), err)
		}
	}
}
