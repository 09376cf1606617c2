// Package page finds the next page of a list that an HTTP server sends in parts, by its Link header (RFC 8288). If a
// header has the word "next" but cannot be parsed, the package returns an error, because the list may have more pages.
// The package sends no requests.
package page

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// ErrLink is in the chain of each error of this package.
var ErrLink = errors.New("wrong Link header")

// MaxLink is the maximum size in bytes of the Link headers of one response, together. net/http accepts megabytes, and
// parsing them takes a multiple of that memory.
const MaxLink = 16 << 10

func linkError(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrLink, fmt.Errorf(format, args...))
}

// Next returns the URL of the next page of a list, or nil after the last page. The URL must have the scheme, host and
// path of the list, because the request carries credentials. wasRead reports whether the page at a URL was read
// already. A link to such a page is an error, because the list would have no end.
func Next(list *url.URL, h http.Header, wasRead func(url string) bool) (*url.URL, error) {
	size := 0
	for _, header := range h.Values("Link") {
		size += len(header)
	}
	if size > MaxLink {
		return nil, linkError("the header has %d bytes; want at most %d bytes", size, MaxLink)
	}
	for _, header := range h.Values("Link") {
		target, ok, err := nextTarget(header)
		if err != nil {
			return nil, linkError("%w", err)
		}
		if !ok {
			continue
		}
		to, err := list.Parse(target)
		if err != nil {
			return nil, linkError("the next page %.100q is not a URL", target)
		}
		if to.Scheme != list.Scheme || !sameHost(to, list) || to.Path != list.Path || to.User != nil {
			return nil, linkError("the next page %.100q has another scheme, host or path than the list, and must not get the "+
				"credentials for the list", target)
		}
		to.Host, to.Fragment, to.RawFragment = list.Host, "", ""
		if wasRead(to.String()) {
			return nil, linkError("the header names as the next page one that was read already: %.100q", to)
		}
		return to, nil
	}
	return nil, nil
}

// The syntax of a Link header (RFC 8288, 3). linkValue matches the first link: its target, and its parameters.
// linkParam matches a parameter that has a value.
var (
	linkValue = regexp.MustCompile(`^[\s,]*<([^<>]*)>((?:\s*;\s*(?:[^\s;,="<>]+(?:\s*=\s*` +
		`(?:"(?:[^"\\]|\\.)*"|[^\s;,"<>]+))?)?)*)\s*(?:,|$)`)
	linkParam = regexp.MustCompile(`;\s*([^\s;,="<>]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;,"<>]+))`)
)

// nextTarget returns the target of the link with relation "next" in a Link header. ok is false if the header has no
// such link. If nextTarget cannot parse the header, and the header has the word "next", it returns an error, because
// the list may have more pages.
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

// sameHost reports whether two URLs of the same scheme have the same host and port.
func sameHost(a, b *url.URL) bool {
	port := func(u *url.URL) string {
		return cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	}
	return strings.EqualFold(a.Hostname(), b.Hostname()) && port(a) == port(b)
}
