package registry_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/distribution"
)

// noise pushes a blob of 4 MiB of random bytes to the repository "x" of a registry.
func noise(t *testing.T, host string) (data []byte, digest string) {
	t.Helper()
	data = make([]byte, 4<<20)
	rng := rand.NewChaCha8([32]byte{1})
	if _, err := rng.Read(data); err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, static.NewLayer(data, "application/octet-stream"))
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host + "/x:noise")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return data, fmt.Sprintf("sha256:%x", sha256.Sum256(data))
}

// cutter is a proxy that breaks the connection of each response with a blob.
type cutter struct {
	host string
	// asked counts the requests for blobs, ranges those that were answered with a part, and authorized those with
	// credentials.
	asked, ranges, authorized atomic.Int64
}

// cut starts a cutter that breaks each connection after the given number of bytes.
func cut(t *testing.T, host string, after int64) *cutter {
	t.Helper()
	c := &cutter{}
	c.host = startProxy(t, host, nil, func(r *http.Response) error {
		if strings.Contains(r.Request.URL.Path, "/blobs/") && r.Request.Method == http.MethodGet {
			c.asked.Add(1)
			if r.StatusCode == http.StatusPartialContent {
				c.ranges.Add(1)
			}
			if r.Request.Header.Get("Authorization") != "" {
				c.authorized.Add(1)
			}
			r.Body = &breakingBody{r.Body, after}
		}
		return nil
	})
	return c
}

// breakingBody is the body of a response. Its connection breaks after left bytes.
type breakingBody struct {
	io.ReadCloser
	left int64
}

func (b *breakingBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, net.ErrClosed
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, net.ErrClosed }

// TestResume checks that the client continues a broken download at the same offset. The test uses Debian's
// docker-registry, which is independent of Prebake's code.
func TestResume(t *testing.T) {
	t.Parallel()
	host := distribution.Start(t)
	data, digest := noise(t, host)
	proxy := cut(t, host, 1<<20+1)
	rc, err := open(t, proxy.host+"/x").Blob(t.Context(), digest, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v; want the %d that were pushed", len(got), err, len(data))
	}
	if asked, ranges := proxy.asked.Load(), proxy.ranges.Load(); asked < 4 || ranges != asked-1 {
		t.Errorf("%d requests, %d of them with a range; want at least 4, all but the first with a range", asked, ranges)
	}
	if err := rc.Close(); err != nil {
		t.Error(err)
	}
}

// TestResumeWithoutRanges has a registry that ignores the header Range and sends the whole blob again. The client must
// discard the bytes that it has already.
func TestResumeWithoutRanges(t *testing.T) {
	t.Parallel()
	host := testkit.Registry(t, true)
	data, digest := noise(t, host)
	var first atomic.Bool
	first.Store(true)
	withoutRange := func(_ http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Range")
		return false
	}
	proxy := startProxy(t, host, withoutRange, func(r *http.Response) error {
		if strings.Contains(r.Request.URL.Path, "/blobs/") && first.Swap(false) {
			r.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(r.Body, 1<<20), failing{}), r.Body}
		}
		return nil
	})
	rc, err := open(t, proxy+"/x").Blob(t.Context(), digest, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(got, data) || first.Load() {
		t.Errorf("read %d bytes, %v; want the %d that were pushed", len(got), err, len(data))
	}
}

// silentNetwork is a network on which the first responses with a blob stop after two bytes, without an end. times is
// the number of these responses.
type silentNetwork struct {
	data  []byte
	times int
	asked int
}

func (s *silentNetwork) RoundTrip(r *http.Request) (*http.Response, error) {
	if !strings.Contains(r.URL.Path, "/blobs/") {
		return reply(r, http.StatusOK, strings.NewReader(""), "text/plain"), nil
	}
	from := 0
	if text := r.Header.Get("Range"); text != "" {
		if _, err := fmt.Sscanf(text, "bytes=%d-", &from); err != nil {
			return nil, err
		}
	}
	s.asked++
	var body io.Reader = bytes.NewReader(s.data[from:])
	if s.asked <= s.times {
		body = io.MultiReader(bytes.NewReader(s.data[from:from+2]), hanging{r.Context().Done()})
	}
	resp := reply(r, http.StatusOK, body, "application/octet-stream")
	if from > 0 {
		resp.StatusCode = http.StatusPartialContent
		resp.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(s.data)-1, len(s.data)))
	}
	return resp, nil
}

type hanging struct{ until <-chan struct{} }

func (h hanging) Read([]byte) (int, error) {
	<-h.until
	return 0, net.ErrClosed
}

func TestSilentRegistry(t *testing.T) {
	t.Parallel()
	data := []byte("abcdefghijklmnopqrstuvwxyz")
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
	for _, times := range []int{0, 2} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			network := &silentNetwork{data: data, times: times}
			repo, err := registry.Open("registry.example/x", registry.Options{Transport: network})
			if err != nil {
				t.Fatal(err)
			}
			rc, err := repo.Blob(t.Context(), digest, int64(len(data)))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(rc)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d times: read %q, %v; want %q", times, got, err, data)
			}
			if err := rc.Close(); err != nil {
				t.Error(err)
			}
			if spent := time.Since(began); spent > 3*time.Minute || times > 0 && spent < time.Minute {
				t.Errorf("%d times: it took %v", times, spent)
			}
		})
	}
	// If the registry never answers, the client must return an error after some time.
	synctest.Test(t, func(t *testing.T) {
		dead := &dead{}
		repo, err := registry.Open("registry.example/x", registry.Options{Transport: dead})
		if err != nil {
			t.Fatal(err)
		}
		_, err = repo.Manifest(t.Context(), digest)
		if !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "no answer for") {
			t.Errorf("Manifest of a registry that never answers = %v; want transient", err)
		}
	})
}

// dead is a network on which no request gets an answer.
type dead struct{}

func (*dead) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// tricklingNetwork sends one byte of a blob every 40 seconds.
type tricklingNetwork struct{ silentNetwork }

func (n *tricklingNetwork) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := n.silentNetwork.RoundTrip(r)
	if err == nil {
		resp.Body = io.NopCloser(trickle{resp.Body, r.Context().Done()})
	}
	return resp, err
}

type trickle struct {
	io.Reader
	until <-chan struct{}
}

func (s trickle) Read(p []byte) (int, error) {
	select {
	case <-s.until:
		return 0, net.ErrClosed
	case <-time.After(40 * time.Second):
	}
	return s.Reader.Read(p[:min(len(p), 1)])
}

// TestTricklingRegistry checks that the client gives up a registry that sends one byte every 40 seconds, as if the
// registry sent nothing.
func TestTricklingRegistry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data := bytes.Repeat([]byte("x"), 8<<10)
		network := &tricklingNetwork{silentNetwork{data: data}}
		repo, err := registry.Open("registry.example/x", registry.Options{Transport: network})
		if err != nil {
			t.Fatal(err)
		}
		rc, err := repo.Blob(t.Context(), fmt.Sprintf("sha256:%x", sha256.Sum256(data)), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, rc); !fault.Is(err, fault.Transient) {
			t.Errorf("Read = %d bytes, %v; want transient", n, err)
		}
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestResumeBehindRedirect has a registry that requires a password and redirects requests for blobs to a bucket, as
// large registries do. The client must request the missing bytes from the bucket too, and must not send the password
// there.
func TestResumeBehindRedirect(t *testing.T) {
	t.Parallel()
	host := distribution.Start(t)
	data, digest := noise(t, host)
	bucket := cut(t, host, 1<<20+1)
	// The bucket has the blobs, so the protected registry only checks passwords.
	proxy := startProxy(t, distribution.StartProtected(t), func(w http.ResponseWriter, r *http.Request) bool {
		toBucket := strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Authorization") != ""
		if toBucket {
			http.Redirect(w, r, "http://"+bucket.host+r.URL.Path, http.StatusTemporaryRedirect)
		}
		return toBucket
	}, nil)
	keys := token{distribution.User, distribution.Password}
	rc, err := openRef(t, proxy+"/x", registry.Options{Keychain: keys}).Blob(t.Context(), digest, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	asked, ranges := bucket.asked.Load(), bucket.ranges.Load()
	if err != nil || !bytes.Equal(got, data) || asked < 4 || ranges != asked-1 {
		t.Errorf("read %d bytes in %d requests, %d of them with a range, %v; want %d bytes in at least 4 requests, all but "+
			"the first with a range", len(got), asked, ranges, err, len(data))
	}
	if n := bucket.authorized.Load(); n > 0 {
		t.Errorf("%d of %d requests to the bucket had credentials; want none", n, asked)
	}
}
