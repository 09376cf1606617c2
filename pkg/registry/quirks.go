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

// lenient makes of registries' odd answers about referrers the ones that the
// client library knows. Whatever says that there is no such API is a 404, upon
// for which the library uses the tag that stands in for it.
type lenient struct{ next http.RoundTripper }

// referrersTag is the path of a manifest under the tag that stands in for the API
// (distribution-spec 1.1, "Referrers Tag Schema").
var referrersTag = regexp.MustCompile(`/manifests/sha256-[0-9a-f]{64}$`)

// attaching is the key of a context whose requests add to a list of referrers.
type attaching struct{}

func (l lenient) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(req)
	if err != nil || req.Method != http.MethodGet {
		return resp, err
	}
	switch {
	case strings.Contains(req.URL.Path, "/referrers/"):
		switch resp.StatusCode {
		// 400 is Quay's for a manifest that it does not have (quay/quay#3071).
		case http.StatusBadRequest, http.StatusForbidden, http.StatusMethodNotAllowed, http.StatusNotAcceptable,
			http.StatusGone, http.StatusUnsupportedMediaType, http.StatusNotImplemented:
			return absent(resp), nil
		case http.StatusOK:
			// Some add a charset; some answer every path with a page for people.
			kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
			if err != nil || kind != string(types.OCIImageIndex) {
				return absent(resp), nil
			}
			resp.Header.Set("Content-Type", kind)
		}
	case resp.StatusCode == http.StatusOK && referrersTag.MatchString(req.URL.Path) &&
		req.Header.Get("Accept") == string(types.OCIImageIndex):
		return tagged(req, resp)
	}
	return resp, nil
}

// absent makes an answer a 404.
func absent(resp *http.Response) *http.Response {
	_ = resp.Body.Close() // nothing of it is wanted
	resp.StatusCode, resp.Status = http.StatusNotFound, "404 Not Found"
	resp.Header.Del("Link")
	resp.Body, resp.ContentLength = http.NoBody, 0
	return resp
}

// tagged examines what the tag names. A list without a media type, which is
// optional in it, gets one. What is no list is none to who reads; who would add to
// it must not put a list in its place.
func tagged(req *http.Request, resp *http.Response) (*http.Response, error) {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	if len(raw) > MaxManifest {
		return nil, fmt.Errorf("%w: more than %d bytes", errTooLong, MaxManifest)
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
		if req.Context().Value(attaching{}) != nil && resp.Header.Get("Docker-Content-Digest") == digest {
			// GitLab's, which has no referrers API either (oras-project/oras-go#1396).
			return nil, fault.New(fault.PublishRefused,
				req.URL.Host+" confuses the tag "+tag+" with the digest, and has no referrers API",
				"publish to a registry that can list statements about an artifact; this one cannot")
		}
		if req.Context().Value(attaching{}) != nil {
			return nil, fault.New(fault.PublishRefused, "tag "+path.Base(req.URL.Path)+" is no list of referrers",
				"remove that tag by hand: without the referrers API it is where statements about the artifact are listed")
		}
		return absent(resp), nil
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

// retryAfterTransport waits for as long as a registry asks for with Retry-After, up to a
// bound. The library's own pauses are a second and three.
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
			return resp, nil // a stream cannot be sent again; the library begins anew
		}
		_ = resp.Body.Close() // nothing of it is wanted
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

// retryAfter reads the header (RFC 9110, 10.2.3): seconds, or a date.
func retryAfter(text string, now time.Time) (time.Duration, bool) {
	if n, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(n) * time.Second, true
	}
	if at, err := http.ParseTime(text); err == nil {
		return max(0, at.Sub(now)), true
	}
	return 0, false
}
