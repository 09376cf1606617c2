package cosbucket

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/hashicorp/go-retryablehttp"

	"github.com/prebake/prebake/pkg/fault"
)

// The bounds on retries: five tries within about eight seconds, and as many
// resumptions of one broken download.
const (
	retryMax  = 4
	retryWait = 500 * time.Millisecond
)

// web is a bucket behind a web server. It never sends credentials.
type web struct {
	base   *url.URL
	client *retryablehttp.Client
}

func openHTTP(u *url.URL, wait time.Duration) (*web, error) {
	if u.Host == "" {
		return nil, fault.New(fault.Usage, "no host in the URL", "write https://HOST/PATH")
	}
	transport := cleanhttp.DefaultPooledTransport()
	transport.ResponseHeaderTimeout = 30 * time.Second
	client := retryablehttp.NewClient()
	client.HTTPClient = &http.Client{Transport: transport}
	client.RetryMax, client.RetryWaitMin, client.RetryWaitMax = retryMax, wait, 8*wait
	client.Logger = nil
	client.ErrorHandler = retryablehttp.PassthroughErrorHandler
	return &web{base: u, client: client}, nil
}

func (w *web) url(name string) string { return w.base.JoinPath(name).String() }

// fetch asks for the object from offset on; etag, if known, has to be the same.
func (w *web) fetch(ctx context.Context, name string, offset int64, etag string) (*http.Response, error) {
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, w.url(name), nil)
	if err != nil {
		return nil, err
	}
	// The sums in a bucket are over the stored bytes.
	req.Header.Set("Accept-Encoding", "identity")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		req.Header.Set("If-Match", etag)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		if resp != nil {
			err = errors.Join(err, resp.Body.Close())
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fault.Wrap(fault.Transient, err, "check the network and the bucket's URL")
	}
	want := http.StatusOK
	if offset > 0 {
		want = http.StatusPartialContent
	}
	if resp.StatusCode == want {
		return resp, nil
	}
	return nil, errors.Join(statusError(resp.StatusCode), resp.Body.Close())
}

func statusError(code int) error {
	err := fmt.Errorf("server answered %d %s", code, http.StatusText(code))
	switch {
	case code == http.StatusNotFound, code == http.StatusGone, code == http.StatusForbidden, code == http.StatusUnauthorized:
		// A public bucket answers 403 for what it does not have.
		return missing(err)
	case code >= 500, code == http.StatusTooManyRequests, code == http.StatusRequestTimeout, code == http.StatusPreconditionFailed:
		return fault.Wrap(fault.Transient, err, "try again later")
	}
	return fault.Wrap(fault.Unsupported, err, "check the bucket's URL")
}

func (w *web) get(ctx context.Context, name string) (io.ReadCloser, Attrs, error) {
	resp, err := w.fetch(ctx, name, 0, "") //nolint:bodyclose // the reader that is returned closes it
	if err != nil {
		return nil, Attrs{}, err
	}
	attrs := Attrs{Size: resp.ContentLength, MD5: googMD5(resp.Header)}
	r := &resuming{name: name, body: resp.Body, size: resp.ContentLength}
	if etag := resp.Header.Get("Etag"); resp.Header.Get("Accept-Ranges") == "bytes" && !strings.HasPrefix(etag, "W/") {
		r.etag = etag
	}
	r.again = func(offset int64) (*http.Response, error) { return w.fetch(ctx, name, offset, r.etag) }
	return r, attrs, nil
}

// googMD5 returns the md5 that Google Cloud Storage sends with an object.
func googMD5(h http.Header) string {
	for _, line := range h.Values("X-Goog-Hash") {
		for part := range strings.SplitSeq(line, ",") {
			if sum, ok := strings.CutPrefix(strings.TrimSpace(part), "md5="); ok {
				if raw, err := base64.StdEncoding.DecodeString(sum); err == nil && len(raw) == 16 {
					return hex.EncodeToString(raw)
				}
			}
		}
	}
	return ""
}

func (w *web) list(context.Context, string, string) ([]string, error) {
	return nil, fault.New(fault.Unsupported, "a web server cannot list a bucket", "name builds by BUILD_ID and board, or use the bucket's gs:// URL")
}

func (w *web) close() error {
	w.client.HTTPClient.CloseIdleConnections()
	return nil
}

// resuming is a download that goes on where it broke, as long as the object is
// still the same one.
type resuming struct {
	name   string
	body   io.ReadCloser
	size   int64 // -1 is unknown
	offset int64
	etag   string // "" forbids resumption
	tries  int
	again  func(offset int64) (*http.Response, error)
}

func (r *resuming) Read(p []byte) (int, error) {
	n, err := r.body.Read(p)
	r.offset += int64(n)
	ended := errors.Is(err, io.EOF)
	if err == nil || ended && (r.size < 0 || r.offset == r.size) {
		return n, err
	}
	if ended {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return n, err
	}
	broken := fault.Wrap(fault.Transient, fmt.Errorf("download of %s broke after %d bytes: %w", r.name, r.offset, err), "try again later")
	if r.etag == "" || r.offset == 0 || r.tries >= retryMax {
		return n, broken
	}
	r.tries++
	resp, err := r.again(r.offset) //nolint:bodyclose // Close closes what is the body now
	if err != nil {
		return n, errors.Join(broken, err)
	}
	old := r.body
	r.body = resp.Body
	return n, old.Close()
}

func (r *resuming) Close() error { return r.body.Close() }
