package registry

import (
	"net/http"
	"net/url"
	"testing"
)

func FuzzNextPage(f *testing.F) {
	for _, link := range []string{`</v2/a/referrers/sha256:0?n=2>; rel="next"`, `<?n=2>;rel=next`,
		`<//evil/v2/a/referrers/sha256:0>; rel="next"`, `<https://u:p@h/v2/a/referrers/sha256:0>; rel="next"`, "<", ""} {
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
