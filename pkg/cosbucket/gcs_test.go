package cosbucket_test

import (
	"bytes"
	"compress/gzip"
	"crypto/md5"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// proxy stands between the client and an emulator of Google's storage, and alters responses as a faulty network would.
// Its tests are not parallel, because the client reads the server's address from an environment variable.
type proxy struct {
	*gcs.Server
	next *httputil.ReverseProxy

	mu       sync.Mutex
	content  []string // requests for the bytes of an object: each has a range and a generation
	requests int
	auth     bool
	// If spoil is not nil, it may replace the writer of the nth response that has an object's bytes.
	spoil func(n int, w http.ResponseWriter) http.ResponseWriter
	// page is the maximum number of entries in one page of a listing. "" means no limit.
	page string
}

func behind(t *testing.T) *proxy {
	t.Helper()
	s := gcs.Start(t)
	to, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Server: s, next: &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }}}
	front := httptest.NewServer(p)
	t.Cleanup(front.Close)
	(&gcs.Server{Endpoint: front.URL}).Use(t)
	return p
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.requests++
	p.auth = p.auth || r.Header.Get("Authorization") != ""
	q := r.URL.Query()
	if strings.HasSuffix(r.URL.Path, "/o") && p.page != "" {
		q.Set("maxResults", p.page)
		r.URL.RawQuery = q.Encode()
	}
	spoil, n := p.spoil, -1
	if !strings.HasPrefix(r.URL.Path, "/storage/v1/") {
		n = len(p.content)
		generation := "any"
		if q.Get("generation") != "" {
			generation = "pinned"
		}
		p.content = append(p.content, strings.TrimSpace(generation+" "+r.Header.Get("Range")))
	}
	p.mu.Unlock()
	if n >= 0 && spoil != nil {
		w = spoil(n, w)
	}
	p.next.ServeHTTP(w, r)
}

func (p *proxy) asked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.content...)
}

func (p *proxy) paged(most string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.page = most
}

func (p *proxy) sentAuth() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.auth
}

// begin starts a new case: it forgets the recorded requests, and uses spoil for the next responses.
func (p *proxy) begin(spoil func(int, http.ResponseWriter) http.ResponseWriter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spoil, p.content, p.requests = spoil, nil, 0
}

func TestEmulator(t *testing.T) {
	p := behind(t)
	for _, name := range []string{"cos-tools", "cos-tools-eu"} {
		p.Bucket(t, name)
	}
	for name, text := range objects {
		p.Put(t, "cos-tools", name, []byte(text))
		p.Put(t, "cos-tools-eu", "below/"+name, []byte(text))
	}
	// The client must not ask the metadata server for a token. Google may refuse the token even for a public bucket.
	metadata := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the metadata server was asked")
	}))
	t.Cleanup(metadata.Close)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(metadata.URL, "http://"))

	b := openQuick(t, "gs://cos-tools")
	conform(t, b, true)
	if got, want := b.URL("a/b"), "gs://cos-tools/a/b"; got != want {
		t.Errorf("URL = %s; want %s", got, want)
	}
	t.Run("below a folder", func(t *testing.T) { conform(t, openQuick(t, "gs://cos-tools-eu/below"), true) })
	t.Run("in pages", func(t *testing.T) {
		p.paged("2")
		conform(t, openQuick(t, "gs://cos-tools"), true)
		p.paged("")
	})
	r, attrs, err := b.Get(t.Context(), cosbucket.DefaultVersionName(kernel47))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	crc := crc32.Checksum([]byte("535.261.03\n"), crc32.MakeTable(crc32.Castagnoli))
	if want := fmt.Sprintf("%x", md5.Sum([]byte("535.261.03\n"))); attrs.MD5 != want ||
		attrs.CRC32C != fmt.Sprintf("%08x", crc) {
		t.Errorf("Get(...) says %+v; want md5 %s and crc32c %08x", attrs, want, crc)
	}
	if _, _, err := openQuick(t, "gs://other-bucket").Get(t.Context(), "x"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Get(other bucket) = %v; want input-missing", err)
	}
	if p.sentAuth() {
		t.Error("an Authorization header was sent to a bucket that nobody gave credentials for")
	}
	// storage.googleapis.com also serves the objects as plain files over HTTPS.
	t.Run("plain web", func(t *testing.T) {
		web := openQuick(t, p.Endpoint+"/cos-tools")
		conform(t, web, false)
		r, plain, err := web.Get(t.Context(), cosbucket.DefaultVersionName(kernel47))
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if plain.MD5 != attrs.MD5 || plain.CRC32C != attrs.CRC32C || plain.Size != attrs.Size {
			t.Errorf("plain web says %+v; want what the API says: %+v", plain, attrs)
		}
	})
}

// TestEmulatorStoredCompressed has an object that is stored with Content-Encoding: gzip. The API delivers the stored
// bytes, which match the checksums. Plain HTTPS delivers the decompressed bytes, which do not match them.
func TestEmulatorStoredCompressed(t *testing.T) {
	p := behind(t)
	p.Bucket(t, "cos-tools")
	var stored bytes.Buffer
	w := gzip.NewWriter(&stored)
	if _, err := io.WriteString(w, long); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	p.PutGzip(t, "cos-tools", "x", stored.Bytes())
	if text, err := openQuick(t, "gs://cos-tools").ReadSmall(t.Context(), "x", 1<<20); err != nil ||
		!bytes.Equal(text, stored.Bytes()) {
		t.Errorf("by the API: %d bytes, %v; want the %d that are stored", len(text), err, stored.Len())
	}
	if text, err := openQuick(t, p.Endpoint+"/cos-tools").ReadSmall(t.Context(), "x", 1<<20); err != nil ||
		string(text) != long {
		t.Errorf("over the web: %d bytes, %v; want %d", len(text), err, len(long))
	}
}

// TestEmulatorCredentials checks that the client sends credentials to Google if they are configured.
func TestEmulatorCredentials(t *testing.T) {
	p := behind(t)
	p.Bucket(t, "cos-tools")
	p.Put(t, "cos-tools", "x", []byte("x"))
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"access_token":"t0ken","token_type":"Bearer","expires_in":3600}`)
	}))
	t.Cleanup(tokens.Close)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]string{
		"type": "service_account", "client_email": "a@b.example", "private_key_id": "1", "token_uri": tokens.URL,
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", file)
	if text, err := openQuick(t, "gs://cos-tools").ReadSmall(t.Context(), "x", 10); err != nil || string(text) != "x" {
		t.Errorf("ReadSmall = %q, %v", text, err)
	}
	if !p.sentAuth() {
		t.Error("no Authorization header was sent with the credentials that are configured")
	}
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", filepath.Join(t.TempDir(), "none"))
	if _, err := cosbucket.Open(t.Context(), "gs://cos-tools"); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("Open with credentials that are not there = %v; want usage, with a hint", err)
	}
}

// cutAt breaks each of the first responses after the given number of bytes.
func cutAt(answers, bytes int) func(int, http.ResponseWriter) http.ResponseWriter {
	return func(n int, w http.ResponseWriter) http.ResponseWriter {
		if n < answers {
			return &cutter{w, bytes}
		}
		return w
	}
}

// flip changes one bit of a response's first byte.
type flip struct {
	http.ResponseWriter
	done bool
}

func (f *flip) Write(p []byte) (int, error) {
	p = bytes.Clone(p)
	if !f.done && len(p) > 0 {
		p[0] ^= 1
		f.done = true
	}
	return f.ResponseWriter.Write(p)
}

func (f *flip) Unwrap() http.ResponseWriter   { return f.ResponseWriter }
func (c *cutter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func TestEmulatorBrokenDownloads(t *testing.T) {
	p := behind(t)
	p.Bucket(t, "cos-tools")
	text := []byte(strings.Repeat("0123456789abcdef", 8<<10)) // 128 KiB
	p.Put(t, "cos-tools", "x", text)
	b := openQuick(t, "gs://cos-tools")
	rows := []struct {
		name  string
		spoil func(int, http.ResponseWriter) http.ResponseWriter
		kind  fault.Kind
		asked []string // nil means that the test does not check the requests
	}{
		{name: "nothing", asked: []string{"pinned"}},
		{name: "breaks twice", spoil: cutAt(2, 50_000),
			asked: []string{"pinned", "pinned bytes=50000-", "pinned bytes=100000-"}},
		{name: "a changed bit", spoil: func(_ int, w http.ResponseWriter) http.ResponseWriter {
			return &flip{ResponseWriter: w}
		}, kind: fault.Checksum},
		{name: "breaks again and again", spoil: cutAt(1000, 10), kind: fault.Transient},
		{name: "replaced while it breaks", spoil: func(n int, w http.ResponseWriter) http.ResponseWriter {
			if n > 0 {
				return w
			}
			return &replacingWriter{cutter: cutter{w, 50_000},
				replace: func() { p.Put(t, "cos-tools", "x", append([]byte("new"), text...)) }}
		}, kind: fault.Transient},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			p.Put(t, "cos-tools", "x", text)
			p.begin(r.spoil)
			got, err := b.ReadSmall(t.Context(), "x", 1<<20)
			if r.kind == 0 && (err != nil || !bytes.Equal(got, text)) || r.kind != 0 &&
				(!fault.Is(err, r.kind) || fault.Hint(err) == "") {
				t.Errorf("ReadSmall = %d bytes, %v; want %v", len(got), err, r.kind)
			}
			if r.asked != nil {
				if diff := cmp.Diff(r.asked, p.asked()); diff != "" {
					t.Errorf("requests (-want +got)\n%s", diff)
				}
			}
			if most := (cosbucket.RetryMax + 1) * (cosbucket.RetryMax + 2); len(p.asked()) > most {
				t.Errorf("%d requests for one object; want %d at most", len(p.asked()), most)
			}
		})
	}
}

// replacingWriter breaks a response, and replaces the object at the same moment.
type replacingWriter struct {
	cutter
	replace func()
}

func (r *replacingWriter) Write(p []byte) (int, error) {
	if len(p) >= r.left {
		r.replace()
	}
	return r.cutter.Write(p)
}

// TestEmulatorManyBuilds checks that BuildIDs sends one request, and BuildsOf one for each COS build, even if the
// bucket has many builds.
func TestEmulatorManyBuilds(t *testing.T) {
	p := behind(t)
	p.Bucket(t, "cos-tools")
	const builds = 150
	commit := []byte(strings.Repeat("ab", 20) + "\n")
	for i := range builds {
		p.Put(t, "cos-tools", fmt.Sprintf("17800.%d.0/lakitu/kernel_commit", i), commit)
		p.Put(t, "cos-tools", fmt.Sprintf("17800.%d.0/lakitu-arm64/kernel_commit", i), commit)
	}
	p.Put(t, "cos-tools", "extensions/kernel_commit", commit)
	b := openQuick(t, "gs://cos-tools")
	// since returns the number of requests since the last call.
	last := 0
	since := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		n := p.requests - last
		last = p.requests
		return n
	}
	since()
	ids, err := b.BuildIDs(t.Context())
	if err != nil || len(ids) != builds || ids[0] != "17800.149.0" || ids[builds-1] != "17800.0.0" {
		t.Fatalf("BuildIDs = %d, %v; want %d, newest first", len(ids), err, builds)
	}
	if n := since(); n != 1 {
		t.Errorf("BuildIDs sent %d requests; want 1", n)
	}
	few, err := b.BuildsOf(t.Context(), ids[:3])
	if err != nil || len(few) != 6 || few[0].String() != "17800.149.0/lakitu" ||
		few[5].String() != "17800.147.0/lakitu-arm64" {
		t.Errorf("BuildsOf = %v, %v; want the newest three with two boards each", few, err)
	}
	if n := since(); n != 3 {
		t.Errorf("BuildsOf sent %d requests; want 3", n)
	}
	if all, err := b.Builds(t.Context()); err != nil || len(all) != 2*builds {
		t.Errorf("Builds = %d, %v; want %d", len(all), err, 2*builds)
	}
}

// TestEmulatorMirrors checks two buckets that are mirrors. If the first one keeps failing, the client must read from
// the second.
func TestEmulatorMirrors(t *testing.T) {
	p := behind(t)
	p.Bucket(t, "cos-tools")
	p.Bucket(t, "cos-tools-eu")
	p.Put(t, "cos-tools-eu", "x", []byte(long))
	p.Put(t, "cos-tools", "x", []byte(long))
	p.begin(cutAt((cosbucket.RetryMax+1)*(cosbucket.RetryMax+1), 3))
	r, _, err := openQuick(t, "gs://cos-tools-eu,gs://cos-tools").Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil || string(text) != long || len(p.asked()) != (cosbucket.RetryMax+1)*(cosbucket.RetryMax+1)+1 {
		t.Errorf("asked %q", p.asked())
		t.Errorf("read %d bytes, %v; want %d", len(text), err, len(long))
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
