package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/prebake/prebake/pkg/fault"
)

const (
	// maxList is the maximum size in bytes of a list of referrers with all its pages. The list repeats annotations, and
	// anybody who may push can attach a manifest with megabytes of them.
	maxList = 32 << 20
	// maxAnnotation is the maximum size in bytes of one annotation: key and value together.
	maxAnnotation = 1 << 10
)

// maxPages is the maximum number of pages of one list of referrers.
const maxPages = 256

// pagesKey is a context key. Its value is a *pagesRead.
type pagesKey struct{}

// pagesRead tells that a list of referrers ended in the middle. The library may then try again. If that fails at the
// first page, what was read before still counts.
type pagesRead struct {
	cut  error           // why, or nil
	list []v1.Descriptor // what the pages before listed
}

// pagesTransport joins all pages of a list of referrers into one response (distribution-spec, "Listing Referrers"). The
// client library reads only the first page.
type pagesTransport struct{ next http.RoundTripper }

func (p pagesTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := p.next.RoundTrip(req)
	if err != nil || req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/referrers/") ||
		resp.StatusCode != http.StatusOK {
		return resp, err
	}
	var whole v1.IndexManifest
	read, ok := req.Context().Value(pagesKey{}).(*pagesRead)
	if !ok {
		read = &pagesRead{}
	}
	left := int64(maxList)
	for page := 1; ; page++ {
		part, n, err := readPage(resp.Body, left)
		if err != nil {
			err = fmt.Errorf("read page %d of the referrers: %w", page, err)
			switch {
			case errors.Is(err, errTooLong): // a pusher can make such a list, and must not block the nodes
				*read = pagesRead{}
			case page > 1:
				*read = pagesRead{err, whole.Manifests}
			}
			return nil, err
		}
		left -= n
		whole.Manifests = append(whole.Manifests, dropLong(part.Manifests)...)
		part.Manifests = whole.Manifests
		whole = part
		at, err := nextPage(req.URL, resp.Header)
		if err != nil {
			err = fmt.Errorf("read the referrers: %w", err)
			*read = pagesRead{err, whole.Manifests}
			return nil, err
		}
		if at == nil {
			break
		}
		if page == maxPages {
			*read = pagesRead{}
			return nil, damaged(fmt.Errorf("read the referrers: the list has more than %d pages", maxPages))
		}
		again := req.Clone(req.Context())
		again.URL = at
		more, err := p.next.RoundTrip(again)
		if err != nil || more.StatusCode != http.StatusOK {
			if *read = (pagesRead{err, whole.Manifests}); err == nil {
				read.cut = &transport.Error{Request: again, StatusCode: more.StatusCode}
			}
			return more, err
		}
		resp = more
	}
	*read = pagesRead{}
	raw, err := json.Marshal(whole)
	if err != nil {
		return nil, err
	}
	resp.Header.Del("Link")
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(raw)), int64(len(raw))
	return resp, nil
}

// dropLong removes long annotations, because anybody who may push can write them.
func dropLong(list []v1.Descriptor) []v1.Descriptor {
	for _, d := range list {
		for key, value := range d.Annotations {
			if len(key)+len(value) > maxAnnotation {
				delete(d.Annotations, key)
			}
		}
	}
	return list
}

// readPage reads one page of at most limit bytes, and closes the body.
func readPage(body io.ReadCloser, limit int64) (part v1.IndexManifest, n int64, err error) {
	raw, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err := errors.Join(err, body.Close()); err != nil {
		return part, 0, err
	}
	if n = int64(len(raw)); n > limit {
		return part, n, fmt.Errorf("%w: the list has more than %d bytes", errTooLong, maxList)
	}
	if err := json.Unmarshal(raw, &part); err != nil {
		return part, n, damaged(err)
	}
	return part, n, nil
}

var nextLink = regexp.MustCompile(`<([^<>]*)>\s*;\s*rel="?next"?\s*(?:[,;]|$)`) // RFC 8288

// nextPage returns the URL of the next page, or nil after the last page. The URL must have the scheme, host and path of
// the first page, because the request carries credentials.
func nextPage(from *url.URL, h http.Header) (*url.URL, error) {
	for _, link := range h.Values("Link") {
		m := nextLink.FindStringSubmatch(link)
		if m == nil {
			continue
		}
		to, err := from.Parse(m[1])
		if err != nil {
			return nil, damaged(fmt.Errorf("the link to the next page, %.100q, is not a URL", m[1]))
		}
		if to.Scheme != from.Scheme || to.Host != from.Host || to.Path != from.Path || to.User != nil {
			return nil, fault.New(fault.Unverified,
				fmt.Sprintf("refuse next page %.100q: its host or path differs from that of the first page, so it must not get "+
					"this registry's credentials",
					m[1]),
				"configure the registry, or the proxy in front of it, so that each link to a next page begins with "+
					from.Scheme+"://"+from.Host+from.Path+" or is a relative path")
		}
		return to, nil
	}
	return nil, nil
}
