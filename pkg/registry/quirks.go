package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// lenientTransport translates unusual responses about referrers for the client library. A response that means "no
// referrers API" becomes a 404, after which the library uses the referrers tag schema.
type lenientTransport struct{ next http.RoundTripper }

// referrersTag matches the path of a manifest under the tag that replaces the referrers API (distribution-spec 1.1,
// "Referrers Tag Schema").
var referrersTag = regexp.MustCompile(`/manifests/sha256-[0-9a-f]{64}$`)

// attachKey is a context key. It is set for requests that add to a list of referrers.
type attachKey struct{}

func (l lenientTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(req)
	if err != nil || req.Method != http.MethodGet {
		return resp, err
	}
	switch {
	case strings.Contains(req.URL.Path, "/referrers/"):
		switch resp.StatusCode {
		// Quay responds with 400 for a manifest that it does not have (quay/quay#3071).
		case http.StatusBadRequest, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotAcceptable,
			http.StatusGone, http.StatusUnsupportedMediaType, http.StatusNotImplemented:
			return asNotFound(resp), nil
		case http.StatusOK:
			// Some registries add a charset. Others respond to every path with an HTML page.
			kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
			if err != nil || kind != string(types.OCIImageIndex) {
				return asNotFound(resp), nil
			}
			resp.Header.Set("Content-Type", kind)
		}
	case resp.StatusCode == http.StatusOK && referrersTag.MatchString(req.URL.Path) &&
		req.Header.Get("Accept") == string(types.OCIImageIndex):
		return checkReferrersTag(req, resp)
	}
	return resp, nil
}

func asNotFound(resp *http.Response) *http.Response {
	_ = resp.Body.Close() // the body is not needed
	resp.StatusCode, resp.Status = http.StatusNotFound, "404 Not Found"
	resp.Header.Del("Link")
	resp.Body, resp.ContentLength = http.NoBody, 0
	return resp
}

// checkReferrersTag checks the content under the tag of the referrers tag schema. If a list lacks its media type, which
// is optional, checkReferrersTag adds it. If the content is not a list, a reader gets a 404, and a writer gets an
// error, because the writer must not replace the content.
func checkReferrersTag(req *http.Request, resp *http.Response) (*http.Response, error) {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	if len(raw) > MaxManifest {
		return nil, fmt.Errorf("%w: the response has more than %d bytes", errTooLong, MaxManifest)
	}
	fields := map[string]json.RawMessage{}
	var kind struct {
		MediaType types.MediaType `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(raw, &fields) != nil || json.Unmarshal(raw, &kind) != nil || kind.Manifests == nil ||
		kind.MediaType != "" && kind.MediaType != types.OCIImageIndex {
		tag := path.Base(req.URL.Path)
		digest := "sha256:" + strings.TrimPrefix(tag, "sha256-")
		if req.Context().Value(attachKey{}) != nil && resp.Header.Get("Docker-Content-Digest") == digest {
			// GitLab interprets the tag as a digest, and has no referrers API either (oras-project/oras-go#1396).
			return nil, fault.New(fault.PublishRefused,
				req.URL.Host+" has no referrers API, and treats the tag "+tag+" as a digest",
				"publish to another registry: this one cannot list the attestations of an artifact")
		}
		if req.Context().Value(attachKey{}) != nil {
			return nil, fault.New(fault.PublishRefused,
				req.URL.Host+" has no referrers API, so tag "+tag+" must be the list of the artifact's attestations, "+
					"but it is something else",
				"delete that tag in the registry by hand, then run the command again")
		}
		return asNotFound(resp), nil
	}
	if kind.MediaType == "" {
		fields["mediaType"] = json.RawMessage(strconv.Quote(string(types.OCIImageIndex)))
		if raw, err = json.Marshal(fields); err != nil {
			return nil, err
		}
	}
	resp.Header.Set("Content-Type", string(types.OCIImageIndex))
	resp.Header.Del("Content-Length")
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	return resp, nil
}

// retryAfterTransport sends a request again after a response with status 429 or 503, when the time in its Retry-After
// header has passed. If that time is longer than maxWait, or after maxWaits repetitions, it returns the response.
type retryAfterTransport struct{ next http.RoundTripper }

const (
	maxWait  = time.Minute
	maxWaits = 5
)

func (p retryAfterTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	for n := 0; ; n++ {
		resp, err := p.next.RoundTrip(req)
		if err != nil || n == maxWaits || resp.StatusCode != http.StatusTooManyRequests &&
			resp.StatusCode != http.StatusServiceUnavailable {
			return resp, err
		}
		wait, ok := retryAfter(resp.Header.Get("Retry-After"), time.Now())
		if !ok || wait > maxWait || req.Body != nil && req.Body != http.NoBody && req.GetBody == nil {
			return resp, nil // a stream cannot be sent again; the library starts the upload anew
		}
		_ = resp.Body.Close() // the body is not needed
		if err := sleep(req.Context(), wait); err != nil {
			return nil, err
		}
		again := req.Clone(req.Context())
		if req.GetBody != nil {
			if again.Body, err = req.GetBody(); err != nil {
				return nil, err
			}
		}
		req = again
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// retryAfter parses the Retry-After header (RFC 9110, 10.2.3): a number of seconds, or a date.
func retryAfter(text string, now time.Time) (time.Duration, bool) {
	if n, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(n) * time.Second, true
	}
	if at, err := http.ParseTime(text); err == nil {
		return max(0, at.Sub(now)), true
	}
	return 0, false
}
