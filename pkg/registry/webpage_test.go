package registry_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/prebake/prebake/pkg/fault"
)

// TestWebPage checks that a web page in place of the registry's answer gives an error of the kind WebPage, and that
// nothing else gives this kind.
func TestWebPage(t *testing.T) {
	t.Parallel()
	img, err := random.Image(64, 1)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		kind, body string
		want       fault.Kind // Internal means no error
	}{
		"a page":                  {"text/html", "<html>log in</html>", fault.WebPage},
		"a page with a charset":   {"text/html; charset=utf-8", "\ufeff\n<!DOCTYPE html>", fault.WebPage},
		"a manifest of that type": {"text/html", string(manifest), fault.Internal},
		"an empty page":           {"text/html", "", fault.Unverified},
		"a page of another type":  {"application/json", "<html>log in</html>", fault.Unverified},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", row.kind)
			fmt.Fprint(w, row.body)
		}))
		t.Cleanup(srv.Close)
		repo := open(t, strings.TrimPrefix(srv.URL, "http://")+"/x")
		_, err := repo.Manifest(t.Context(), digest.String())
		if (row.want == fault.Internal) != (err == nil) || err != nil && !fault.Is(err, row.want) ||
			row.want == fault.WebPage && !strings.Contains(fault.Hint(err), "browser") {
			t.Errorf("%s: Manifest = %v, hint %q; want %v", name, err, fault.Hint(err), row.want)
		}
		if row.want != fault.WebPage {
			continue
		}
		if _, err := repo.Tags(t.Context()); !fault.Is(err, fault.WebPage) {
			t.Errorf("%s: Tags = %v; want web-page", name, err)
		}
		if _, err := repo.Resolve(t.Context(), "v1"); !fault.Is(err, fault.WebPage) {
			t.Errorf("%s: Resolve = %v; want web-page", name, err)
		}
		if _, err := open(t, "oci:"+srv.URL).Resolve(t.Context(), "v1"); !fault.Is(err, fault.WebPage) {
			t.Errorf("%s: Resolve in a layout on the web = %v; want web-page", name, err)
		}
	}
}

// TestWebPageHidesNoAttachment checks that a web page in place of an attachment does not count as a damaged attachment.
// The client would skip a damaged one.
func TestWebPageHidesNoAttachment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	written := open(t, "oci:"+dir)
	img, err := random.Image(64, 1)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := written.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	d, err := written.Attach(t.Context(), subject, labelledType, []byte("a refusal"), nil)
	if err != nil {
		t.Fatal(err)
	}
	files := http.FileServer(http.Dir(dir))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, d.Digest.Hex) {
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>log in</html>")
			return
		}
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	all, err := open(t, "oci:"+srv.URL).AttachedIf(t.Context(), subject.Digest.String(), labelledType,
		func(b []byte) string { return string(b) })
	if !fault.Is(err, fault.WebPage) {
		t.Errorf("AttachedIf = %q, %v; want web-page", all, err)
	}
}
