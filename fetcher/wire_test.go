package main

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

func findIn(ref string) resolve.Finder {
	open := func() (*registry.Repository, error) { return registry.Open(ref, registry.Options{Plain: true}) }
	return registryFinder(ref, open, nil)
}

// TestLoginPage checks a registry in whose place the network answers with its login page. The page must not count as an
// artifact, and the node must ask the next source.
func TestLoginPage(t *testing.T) {
	t.Parallel()
	for kind, want := range map[string]kinds{
		"text/html": {fault.WebPage, fault.WebPage, fault.WebPage},
		// With text/plain, the page counts as wrong bytes. The kind Transient makes a chain ask the next source.
		"text/plain": {fault.Transient, fault.Unverified, fault.Transient},
	} {
		t.Run(kind, func(t *testing.T) { testLoginPage(t, kind, want) })
	}
}

// kinds has the kinds of three errors: of the page alone, of a chain with only the page, and of a chain with the page
// and a source that does not answer.
type kinds struct{ alone, chain, beside fault.Kind }

func testLoginPage(t *testing.T, kind string, want kinds) {
	t.Helper()
	portal := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		fmt.Fprint(w, "<html>log in to this network</html>")
	}))
	t.Cleanup(portal.Close)
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	mirror := "oci:" + filepath.Join(t.TempDir(), "layout")
	p := sample.Publish(t, mirror, testkit.NewKey(t), c)
	page := findIn(strings.TrimPrefix(portal.URL, "http://") + "/prebake/driver")
	for name, q := range map[string]resolve.Question{
		"by version": {Kernel: c.Kernel, Wish: target.Wish(c.Driver.Version), Flavour: string(c.Driver.Flavour)},
		"by branch":  {Kernel: c.Kernel, Wish: "R535", Flavour: resolve.Auto},
		"by digest":  {Kernel: c.Kernel, Pin: p.Digest},
	} {
		if a, err := page.Find(t.Context(), q); !fault.Is(err, want.alone) || fault.Hint(err) == "" {
			t.Errorf("%s: the page alone: %+v, %v; want %v with a hint", name, a, err, want.alone)
		}
		away := findIn("127.0.0.1:1/x")
		for _, row := range []struct {
			chain resolve.Chain
			kind  fault.Kind
		}{{resolve.Chain{page}, want.chain}, {resolve.Chain{away, page}, want.beside}} {
			// The kind WebPage and IsOtherService make a run fail. Otherwise the node would never ask again.
			if a, err := row.chain.Find(t.Context(), q); !fault.Is(err, row.kind) || fault.Hint(err) == "" ||
				kind == "text/plain" && !resolve.IsOtherService(err) {
				t.Errorf("%s: a chain of %d: %+v, %v; want %v with a hint", name, len(row.chain), a, err, row.kind)
			}
		}
		a, err := resolve.Chain{page, findIn(mirror)}.Find(t.Context(), q)
		if err != nil || a.State != api.Published || a.Digest != p.Digest {
			t.Errorf("%s: the page, then a mirror: %+v, %v; want the artifact of the mirror", name, a, err)
		}
	}
}

// TestWrongTagsLink checks a registry whose list of tags names a next page on another host, which the node must not
// read. The node must ask the next source. Without another source, the hint must be about the Link header.
func TestWrongTagsLink(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/tags/list") {
			return
		}
		w.Header().Set("Link", `<http://registry.internal:5000/v2/prebake/driver/tags/list?last=a>; rel="next"`)
		fmt.Fprint(w, `{"tags":["a"]}`)
	}))
	t.Cleanup(srv.Close)
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	mirror := "oci:" + filepath.Join(t.TempDir(), "layout")
	p := sample.Publish(t, mirror, testkit.NewKey(t), c)
	wrong := findIn(strings.TrimPrefix(srv.URL, "http://") + "/prebake/driver")
	q := resolve.Question{Kernel: c.Kernel, Wish: "R535", Flavour: resolve.Auto}
	if a, err := (resolve.Chain{wrong}).Find(t.Context(), q); !fault.Is(err, fault.Unverified) ||
		!strings.Contains(fault.Hint(err), "Link header") {
		t.Errorf("Find = %+v, %v, hint %q; want unverified with the next step for the Link header", a, err, fault.Hint(err))
	}
	if a, err := (resolve.Chain{wrong, findIn(mirror)}).Find(t.Context(), q); err != nil || a.Digest != p.Digest {
		t.Errorf("Find = %+v, %v; want the artifact of the mirror", a, err)
	}
}

// TestOtherMediaType checks that an artifact counts although its registry sends its manifest with a general media type.
func TestOtherMediaType(t *testing.T) {
	t.Parallel()
	c := sample.NewCell(t, "17800.0.47", "535.261.03")
	p := sample.Publish(t, "oci:"+filepath.Join(t.TempDir(), "layout"), testkit.NewKey(t), c)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Path, "/manifests/") {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p.Manifest))
	}))
	t.Cleanup(plain.Close)
	a, err := findIn(strings.TrimPrefix(plain.URL, "http://")+"/prebake/driver").Find(t.Context(),
		resolve.Question{Kernel: c.Kernel, Wish: target.Wish(c.Driver.Version), Flavour: string(c.Driver.Flavour)})
	if err != nil || a.State != api.Published || a.Digest != p.Digest {
		t.Errorf("Find = %+v, %v; want the artifact", a, err)
	}
}
