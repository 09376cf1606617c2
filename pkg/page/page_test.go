package page

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// never is the callback of a list of which no page was read.
func never(string) bool { return false }

func FuzzNext(f *testing.F) {
	for _, link := range []string{`</v2/a/referrers/sha256:0?n=2>; rel="next"`, `<?n=2>;rel=next`,
		`<//evil/v2/a/referrers/sha256:0>; rel="next"`, `<https://u:p@h/v2/a/referrers/sha256:0>; rel="next"`,
		`<?n=1>; rel=prev, <?n=2>; a="\""; rel="x next"`, "<", ""} {
		f.Add(link)
	}
	from := &url.URL{Scheme: "https", Host: "h", Path: "/v2/a/referrers/sha256:0"}
	f.Fuzz(func(t *testing.T, link string) {
		to, err := Next(from, http.Header{"Link": {link}}, never)
		if err != nil || to == nil {
			return
		}
		if to.Scheme != from.Scheme || to.Host != from.Host || to.Path != from.Path || to.User != nil {
			t.Errorf("Next(%q) = %s; want the same list", link, to)
		}
	})
}

// TestNext checks the forms of a Link header in RFC 8288. A header that may name a next page must not be taken for
// the end of the list.
func TestNext(t *testing.T) {
	t.Parallel()
	const path = "/v2/a/referrers/sha256:0"
	from := &url.URL{Scheme: "https", Host: "h", Path: path}
	for _, row := range []struct {
		headers []string
		want    string // query of the next page; "" means the last page, and "error" means an error
	}{
		{nil, ""},
		{[]string{`<?n=2>; rel="next"`}, "n=2"},
		{[]string{`<` + path + `?n=2>;rel=next`}, "n=2"},
		{[]string{`<https://h` + path + `?n=2>; rel="next"`}, "n=2"},
		{[]string{`<https://H:443` + path + `?n=2>; rel="next"`}, "n=2"},
		{[]string{`<?n=2>; Rel=NEXT`}, "n=2"},
		{[]string{`<?n=2>; rel="last next"`}, "n=2"},
		{[]string{`<?n=2>; title="a; b, \"c\""; crossorigin; rel="next"; type="x/y"`}, "n=2"},
		{[]string{`<?n=0>; rel="prev", <?n=2>; rel="next"`}, "n=2"},
		{[]string{`<?n=0>; rel="prev"`, `<?n=2>; rel = next`}, "n=2"},
		{[]string{`<?n=0>; rel="prev"; title="rel=next"`}, ""},
		{[]string{`<?n=0>; rel="prev"; rel="next"`}, ""},
		{[]string{`</next.css>; rel=preload; as=style`}, ""},
		{[]string{`of another program`}, ""},
		{[]string{`?n=2; rel="next"`}, "error"},
		{[]string{`<?n=2; rel="next"`}, "error"},
		{[]string{`<?n=2> rel="next"`}, "error"},
		{[]string{`<?n=0>; rel="prev", ?n=2; rel="next"`}, "error"},
		{[]string{`<http://h` + path + `?n=2>; rel="next"`}, "error"},
		{[]string{`<https://h:8443` + path + `?n=2>; rel="next"`}, "error"},
		{[]string{`<https://u:p@h` + path + `?n=2>; rel="next"`}, "error"},
		{[]string{`</v2/b/referrers/sha256:0?n=2>; rel="next"`}, "error"},
		{[]string{`<%zz>; rel="next"`}, "error"},
	} {
		got := ""
		to, err := Next(from, http.Header{"Link": row.headers}, never)
		switch {
		case errors.Is(err, ErrLink):
			got = "error"
		case err != nil:
			t.Errorf("Next(%q) = %v; want an error of the Link header", row.headers, err)
		case to != nil:
			got = to.RawQuery
		}
		if got != row.want {
			t.Errorf("Next(%q) = %q, %v; want %q", row.headers, got, err, row.want)
		}
	}
}

// TestNextOfRead checks that a page that was read already is an error.
func TestNextOfRead(t *testing.T) {
	t.Parallel()
	from := &url.URL{Scheme: "https", Host: "h", Path: "/v2/a/tags/list"}
	for link, want := range map[string]bool{`<?n=2>; rel="next"`: false, `<?n=3>; rel="next"`: true} {
		to, err := Next(from, http.Header{"Link": {link}}, func(url string) bool { return url == from.String()+"?n=2" })
		if (err == nil) != want || err != nil && !errors.Is(err, ErrLink) {
			t.Errorf("Next(%s) = %v, %v; want a page: %t", link, to, err, want)
		}
	}
	// The list of a server whose address a client does not know has only a path.
	path := &url.URL{Path: "/v1/kernels"}
	if to, err := Next(path, http.Header{"Link": {`</v1/kernels?after=a%2Fb>; rel="next"`}}, never); err != nil ||
		to.String() != "/v1/kernels?after=a%2Fb" {
		t.Errorf("Next of a path = %v, %v; want the next path", to, err)
	}
}

// TestNextLong checks that a long Link header is refused before it is read: the response of a registry may have
// megabytes of headers.
func TestNextLong(t *testing.T) {
	t.Parallel()
	from := &url.URL{Scheme: "https", Host: "h", Path: "/v2/a/tags/list"}
	const last = `<?n=2>; rel="next"`
	padded := func(size int) string { return strings.Repeat(",", size-len(last)) + last }
	if to, err := Next(from, http.Header{"Link": {padded(MaxLink)}}, never); err != nil || to == nil ||
		to.RawQuery != "n=2" {
		t.Errorf("Next of %d bytes = %v, %v; want the next page", MaxLink, to, err)
	}
	for name, headers := range map[string][]string{
		"one header":                {padded(MaxLink + 1)},
		"without the word":          {strings.Repeat("x", MaxLink+1)},
		"many links":                {strings.Repeat(`<?n=0>; rel="prev",`, 1<<16) + last},
		"several headers in total":  {padded(MaxLink / 2), padded(MaxLink / 2), last},
		"the long one after others": {last, padded(MaxLink + 1)},
	} {
		if to, err := Next(from, http.Header{"Link": headers}, never); !errors.Is(err, ErrLink) ||
			len(err.Error()) > 1<<10 {
			t.Errorf("%s: Next = %v, %.1000v; want a short error of the Link header", name, to, err)
		}
	}
}
