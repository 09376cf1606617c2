package registry

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

func FuzzNextPage(f *testing.F) {
	for _, link := range []string{`</v2/a/referrers/sha256:0?n=2>; rel="next"`, `<?n=2>;rel=next`,
		`<//evil/v2/a/referrers/sha256:0>; rel="next"`, `<https://u:p@h/v2/a/referrers/sha256:0>; rel="next"`,
		`<?n=1>; rel=prev, <?n=2>; a="\""; rel="x next"`, "<", ""} {
		f.Add(link)
	}
	from := &url.URL{Scheme: "https", Host: "h", Path: "/v2/a/referrers/sha256:0"}
	f.Fuzz(func(t *testing.T, link string) {
		to, err := nextPage(from, http.Header{"Link": {link}})
		if err != nil || to == nil {
			return
		}
		if to.Scheme != from.Scheme || to.Host != from.Host || to.Path != from.Path || to.User != nil {
			t.Errorf("nextPage(%q) = %s; want the same list", link, to)
		}
	})
}

// TestNextPage checks the forms that RFC 8288 allows for a Link header. If a header may name a next page, the list must
// not count as complete.
func TestNextPage(t *testing.T) {
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
		to, err := nextPage(from, http.Header{"Link": row.headers})
		switch {
		case errors.Is(err, ErrLink) && fault.Is(err, fault.Unverified):
			got = "error"
		case err != nil:
			t.Errorf("nextPage(%q) = %v; want an error of the Link header", row.headers, err)
		case to != nil:
			got = to.RawQuery
		}
		if got != row.want {
			t.Errorf("nextPage(%q) = %q, %v; want %q", row.headers, got, err, row.want)
		}
	}
}

// TestNextPageLong checks that a long Link header is refused before it is parsed. A registry can send megabytes of
// headers.
func TestNextPageLong(t *testing.T) {
	t.Parallel()
	from := &url.URL{Scheme: "https", Host: "h", Path: "/v2/a/tags/list"}
	const last = `<?n=2>; rel="next"`
	padded := func(size int) string { return strings.Repeat(",", size-len(last)) + last }
	if to, err := nextPage(from, http.Header{"Link": {padded(maxLink)}}); err != nil || to == nil || to.RawQuery != "n=2" {
		t.Errorf("nextPage of %d bytes = %v, %v; want the next page", maxLink, to, err)
	}
	for name, headers := range map[string][]string{
		"one header":                {padded(maxLink + 1)},
		"without the word":          {strings.Repeat("x", maxLink+1)},
		"many links":                {strings.Repeat(`<?n=0>; rel="prev",`, 1<<16) + last},
		"several headers in total":  {padded(maxLink / 2), padded(maxLink / 2), last},
		"the long one after others": {last, padded(maxLink + 1)},
	} {
		if to, err := nextPage(from, http.Header{"Link": headers}); !errors.Is(err, ErrLink) ||
			!fault.Is(err, fault.Unverified) || len(err.Error()) > 1<<10 {
			t.Errorf("%s: nextPage = %v, %.1000v; want a short error of the Link header", name, to, err)
		}
	}
}
