package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/page"
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

// pagesRead has the part of a list of referrers that was read before an error. The library may then try again. If the
// new try fails at the first page, the part that was read before still counts.
type pagesRead struct {
	cut  error           // the error; nil means that there was none
	list []v1.Descriptor // what the pages before listed
}

// pagesTransport joins all pages of a list of referrers into one response (distribution-spec, "Listing Referrers"). The
// client library reads only the first page. For a list of tags, whose pages the library reads, pagesTransport checks
// the link to the next page.
type pagesTransport struct{ next http.RoundTripper }

func (p pagesTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := p.next.RoundTrip(req)
	switch {
	case err != nil || req.Method != http.MethodGet || resp.StatusCode != http.StatusOK:
		return resp, err
	case strings.HasSuffix(req.URL.Path, "/tags/list"):
		return checkTagsLink(req, resp)
	case !strings.Contains(req.URL.Path, "/referrers/"):
		return resp, nil
	}
	var whole v1.IndexManifest
	asked := map[string]bool{req.URL.String(): true}
	read, ok := req.Context().Value(pagesKey{}).(*pagesRead)
	if !ok {
		read = &pagesRead{}
	}
	left := int64(maxList)
	for number := 1; ; number++ {
		part, n, err := readPage(resp.Body, left)
		if err != nil {
			err = fmt.Errorf("read page %d of the referrers: %w", number, err)
			switch {
			case errors.Is(err, errTooLong): // a pusher can make such a list, and must not block the nodes
				*read = pagesRead{}
			case number > 1:
				*read = pagesRead{err, whole.Manifests}
			}
			return nil, err
		}
		left -= n
		whole.Manifests = append(whole.Manifests, dropLong(part.Manifests)...)
		part.Manifests = whole.Manifests
		whole = part
		at, err := nextPage(req.URL, resp.Header, func(u string) bool { return asked[u] })
		if err != nil {
			err = fmt.Errorf("read the referrers: %w", err)
			*read = pagesRead{err, whole.Manifests}
			return nil, err
		}
		if at == nil {
			break
		}
		asked[at.String()] = true
		if number == maxPages {
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

// ErrLink is in the chain of each error of a Link header that names no usable next page.
var ErrLink = page.ErrLink

// nextPage calls [page.Next], and adds a hint to its error. A list with such an error is not complete.
func nextPage(list *url.URL, h http.Header, wasRead func(url string) bool) (*url.URL, error) {
	at, err := page.Next(list, h, wasRead)
	if err != nil {
		err = fault.Wrap(fault.Unverified, err,
			"configure the registry, or the proxy in front of it, so that the Link header names the next page as a relative "+
				"path, or as "+list.Scheme+"://"+list.Host+list.Path+"?…; until then, use another registry")
	}
	return at, err
}

// checkTagsLink replaces the Link headers of a list of tags by one that the client library can follow: the link to the
// next page, if the list has one.
func checkTagsLink(req *http.Request, resp *http.Response) (*http.Response, error) {
	at, err := nextPage(req.URL, resp.Header, func(u string) bool { return u == req.URL.String() })
	if err != nil {
		_ = resp.Body.Close() // the page is not needed
		return nil, fmt.Errorf("read the tags: %w", err)
	}
	resp.Header.Del("Link")
	if at != nil {
		resp.Header.Set("Link", "<"+at.String()+`>; rel="next"`)
	}
	return resp, nil
}
