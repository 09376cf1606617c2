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
	"path"
	"strings"
	"time"

	"github.com/hashicorp/go-cleanhttp"
	"github.com/hashicorp/go-retryablehttp"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds on retries. A request is sent at most five times, within about eight seconds. A download without progress is
// resumed at most four times.
const (
	retryMax  = 4
	retryWait = 500 * time.Millisecond
)

// web is a bucket on a web server. It never sends credentials.
type web struct {
	base   *url.URL
	client *retryablehttp.Client
}

func openHTTP(u *url.URL, wait time.Duration) (*web, error) {
	if u.Host == "" {
		return nil, fault.New(fault.Usage, "the URL has no host", "write https://HOST/PATH")
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

// fetch requests an object's bytes from an offset to the end. If etag is not empty, the object must still have that
// ETag.
func (w *web) fetch(ctx context.Context, name string, offset int64, etag string) (*http.Response, error) {
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, w.url(name), nil)
	if err != nil {
		return nil, err
	}
	// The sums that a bucket reports are those of the stored bytes. So request the bytes without another encoding.
	req.Header.Set("Accept-Encoding", "identity")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		if etag != "" {
			req.Header.Set("If-Match", etag)
		}
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
	switch {
	case offset == 0 && resp.StatusCode == http.StatusOK, offset > 0 && resp.StatusCode == http.StatusPartialContent:
		return resp, nil
	case resp.StatusCode == http.StatusOK:
		err := fault.New(fault.Transient, "the server ignored the Range header: it sent the whole object instead of the rest",
			"try again; if it happens again, use another mirror")
		return nil, errors.Join(err, resp.Body.Close())
	}
	return nil, errors.Join(statusError(resp.StatusCode), resp.Body.Close())
}

func statusError(code int) error {
	err := fmt.Errorf("the server answered with status %d %s", code, http.StatusText(code))
	switch {
	case code == http.StatusNotFound, code == http.StatusGone, code == http.StatusForbidden,
		code == http.StatusUnauthorized:
		// A public bucket responds with 403 for an object that does not exist.
		return missing(err)
	case code >= 500, code == http.StatusTooManyRequests, code == http.StatusRequestTimeout,
		code == http.StatusPreconditionFailed:
		return fault.Wrap(fault.Transient, err, "try again later")
	}
	return fault.Wrap(fault.Unsupported, err, "check the bucket's URL")
}

func (w *web) open(ctx context.Context, name string, offset int64, pin string) (io.ReadCloser, Attrs, error) {
	resp, err := w.fetch(ctx, name, offset, pin)
	if err != nil {
		return nil, Attrs{}, err
	}
	a := Attrs{Size: resp.ContentLength}
	if resp.StatusCode == http.StatusPartialContent {
		if a.Size, err = total(resp.Header.Get("Content-Range"), offset); err != nil {
			return nil, Attrs{}, errors.Join(err, resp.Body.Close())
		}
	}
	// If Google's server decompresses an object, its sums and length are still those of the stored bytes.
	if stored := resp.Header.Get("X-Goog-Stored-Content-Encoding"); stored == "" || stored == "identity" ||
		resp.Header.Get("Content-Encoding") == stored {
		a.MD5, a.CRC32C = googHash(resp.Header)
	}
	if etag := resp.Header.Get("Etag"); resp.Header.Get("Accept-Ranges") == "bytes" && !strings.HasPrefix(etag, "W/") {
		a.pin = etag
	}
	return resp.Body, a, nil
}

// total returns the object's size in a Content-Range header whose range begins at offset.
func total(contentRange string, offset int64) (int64, error) {
	var first, last, size int64
	if n, err := fmt.Sscanf(contentRange, "bytes %d-%d/%d", &first, &last, &size); err != nil || n != 3 ||
		first != offset || last < first || last != size-1 {
		return 0, fault.New(fault.Transient,
			fmt.Sprintf("the server answered with the range %.60q; want the bytes from %d to the end", contentRange, offset),
			"try again; if it happens again, use another mirror")
	}
	return size, nil
}

// googHash returns the md5 and the crc32c that Google Cloud Storage sends with an object, in hex. "" means none.
func googHash(h http.Header) (md5, crc32c string) {
	for _, line := range h.Values("X-Goog-Hash") {
		for part := range strings.SplitSeq(line, ",") {
			name, sum, _ := strings.Cut(strings.TrimSpace(part), "=")
			raw, err := base64.StdEncoding.DecodeString(sum)
			switch {
			case err != nil:
			case name == "md5" && len(raw) == 16:
				md5 = hex.EncodeToString(raw)
			case name == "crc32c" && len(raw) == 4:
				crc32c = hex.EncodeToString(raw)
			}
		}
	}
	return md5, crc32c
}

func (w *web) list(context.Context, string) ([]string, error) { return nil, cannotList() }

func (w *web) folders(context.Context) ([]string, error) { return nil, cannotList() }

var errCannotList = errors.New("a web server cannot list a bucket")

func cannotList() error {
	return fault.Wrap(fault.Unsupported, errCannotList,
		"give the BUILD_ID and the board of each COS build, or use the bucket's gs:// URL")
}

// google is the host at which Google Cloud Storage serves objects by HTTPS. The bucket is the first element of the path
// or of the host name.
const google = "storage.googleapis.com"

func (w *web) sibling(_ context.Context, bucket string) (backend, error) {
	u := *w.base
	dir := strings.Trim(u.Path, "/")
	switch {
	case u.Host == google:
		u.Path = "/" + bucket
	case strings.HasSuffix(u.Host, "."+google):
		u.Host, u.Path = bucket+"."+google, ""
	case dir == "":
		return nil, fault.New(fault.Unsupported,
			fmt.Sprintf("%s is a bucket at the root of its server, so the server cannot have bucket %s beside this bucket",
				w.url(""), bucket),
			"serve each bucket in a folder of its name, such as https://HOST/cos-tools and https://HOST/"+bucket)
	default:
		u.Path = "/" + path.Join(path.Dir(dir), bucket)
	}
	return &web{base: &u, client: w.client}, nil
}

func (w *web) close() error {
	w.client.HTTPClient.CloseIdleConnections()
	return nil
}
