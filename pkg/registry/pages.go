package registry

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
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
	// maxLink is the maximum size in bytes of the Link headers of one response, together. net/http accepts megabytes, and
	// their syntax takes a multiple of that to read.
	maxLink = 16 << 10
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
		if err == nil && at != nil && asked[at.String()] {
			err = errSamePage(req.URL, at)
		}
		if err != nil {
			err = fmt.Errorf("read the referrers: %w", err)
			*read = pagesRead{err, whole.Manifests}
			return nil, err
		}
		if at == nil {
			break
		}
		asked[at.String()] = true
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

// ErrLink is in the chain of each error of a Link header that names no usable next page.
var ErrLink = errors.New("wrong Link header")

// linkError returns the error of a Link header in the response for a list. Such a list is not complete.
func linkError(list *url.URL, format string, args ...any) error {
	return fault.Wrap(fault.Unverified, fmt.Errorf("%w: %w", ErrLink, fmt.Errorf(format, args...)),
		"configure the registry, or the proxy in front of it, so that the Link header names the next page as a relative "+
			"path, or as "+list.Scheme+"://"+list.Host+list.Path+"?…; until then, use another registry")
}

func errSamePage(list, page *url.URL) error {
	return linkError(list, "it names a page as the next one that was read already: %.100q", page)
}

// checkTagsLink leaves only a Link header that the client library can follow: the link to the next page, if there is
// one.
func checkTagsLink(req *http.Request, resp *http.Response) (*http.Response, error) {
	at, err := nextPage(req.URL, resp.Header)
	if err == nil && at != nil && at.String() == req.URL.String() {
		err = errSamePage(req.URL, at)
	}
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

// The syntax of a Link header (RFC 8288, 3). linkValue matches the first link: its target, and its parameters.
// linkParam matches a parameter that has a value.
var (
	linkValue = regexp.MustCompile(`^[\s,]*<([^<>]*)>((?:\s*;\s*(?:[^\s;,="<>]+(?:\s*=\s*` +
		`(?:"(?:[^"\\]|\\.)*"|[^\s;,"<>]+))?)?)*)\s*(?:,|$)`)
	linkParam = regexp.MustCompile(`;\s*([^\s;,="<>]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;,"<>]+))`)
)

// nextTarget returns the target of the link with relation "next" in a Link header. It returns false without such a
// link. If it cannot read the header, and the header has this word, it returns an error: the list may have more pages.
func nextTarget(header string) (target string, ok bool, err error) {
	for rest := header; rest != ""; {
		m := linkValue.FindStringSubmatch(rest)
		if m == nil && strings.Contains(strings.ToLower(rest), "next") {
			return "", false, fmt.Errorf("%.100q is not of the form <URL>; rel=\"next\"", header)
		}
		if m == nil {
			return "", false, nil
		}
		for _, param := range linkParam.FindAllStringSubmatch(m[2], -1) {
			if !strings.EqualFold(param[1], "rel") {
				continue
			}
			if slices.ContainsFunc(strings.Fields(param[2]+param[3]),
				func(word string) bool { return strings.EqualFold(word, "next") }) {
				return m[1], true, nil
			}
			break // only the first rel counts
		}
		rest = rest[len(m[0]):]
	}
	return "", false, nil
}

// nextPage returns the URL of the next page of a list, or nil after the last page. The URL must have the scheme, host
// and path of the list, because the request carries credentials. An error has [ErrLink] in its chain.
func nextPage(list *url.URL, h http.Header) (*url.URL, error) {
	size := 0
	for _, header := range h.Values("Link") {
		size += len(header)
	}
	if size > maxLink {
		return nil, linkError(list, "it has %d bytes, and the maximum is %d", size, maxLink)
	}
	for _, header := range h.Values("Link") {
		target, ok, err := nextTarget(header)
		if err != nil {
			return nil, linkError(list, "%w", err)
		}
		if !ok {
			continue
		}
		to, err := list.Parse(target)
		if err != nil {
			return nil, linkError(list, "the next page %.100q is not a URL", target)
		}
		if to.Scheme != list.Scheme || !sameHost(to, list) || to.Path != list.Path || to.User != nil {
			return nil, linkError(list, "the next page %.100q has another scheme, host or path than the list, and must not get "+
				"this registry's credentials", target)
		}
		to.Host, to.Fragment, to.RawFragment = list.Host, "", ""
		return to, nil
	}
	return nil, nil
}

// sameHost reports whether two URLs of the same scheme have the same host and port.
func sameHost(a, b *url.URL) bool {
	port := func(u *url.URL) string {
		return cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	}
	return strings.EqualFold(a.Hostname(), b.Hostname()) && port(a) == port(b)
}
