package cosbucket_test

import (
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

func TestParsePointer(t *testing.T) {
	t.Parallel()
	good := cosbucket.Pointer{Bucket: "chromiumos-sdk", Path: "2023/08/x86_64-cros-linux-gnu-2023.08.01.tar.xz"}
	rows := []struct {
		name, text string
		want       cosbucket.Pointer
	}{
		{"plain", "bucket: chromiumos-sdk\npath: 2023/08/x86_64-cros-linux-gnu-2023.08.01.tar.xz\n", good},
		{"order, spaces, carriage returns",
			"\npath:2023/08/x86_64-cros-linux-gnu-2023.08.01.tar.xz  \r\n  bucket:  chromiumos-sdk\r\n", good},
		{"a newer key", "bucket: chromiumos-sdk\ngeneration: 7\npath: 2023/08/x86_64-cros-linux-gnu-2023.08.01.tar.xz", good},
		{"empty", "", cosbucket.Pointer{}},
		{"no path", "bucket: cos-tools\n", cosbucket.Pointer{}},
		{"no bucket", "path: a\n", cosbucket.Pointer{}},
		{"two buckets", "bucket: aaa\nbucket: bbb\npath: a\n", cosbucket.Pointer{}},
		{"a web page", "<html>not found</html>", cosbucket.Pointer{}},
		{"climbing bucket", "bucket: ..\npath: a\n", cosbucket.Pointer{}},
		{"a host for a bucket", "bucket: evil.example\npath: a\n", cosbucket.Pointer{}},
		{"bucket with a slash", "bucket: a/b/c\npath: a\n", cosbucket.Pointer{}},
		{"climbing path", "bucket: aaa\npath: a/../../etc/passwd\n", cosbucket.Pointer{}},
		{"rooted path", "bucket: aaa\npath: /etc/passwd\n", cosbucket.Pointer{}},
		{"path with a query", "bucket: aaa\npath: a?b=c\n", cosbucket.Pointer{}},
		{"path with a space", "bucket: aaa\npath: a b\n", cosbucket.Pointer{}},
		{"too long", "bucket: aaa\npath: " + strings.Repeat("a", cosbucket.MaxPointer), cosbucket.Pointer{}},
	}
	for _, r := range rows {
		got, err := cosbucket.ParsePointer([]byte(r.text))
		bad := r.want == cosbucket.Pointer{}
		if got != r.want || bad != fault.Is(err, fault.Unsupported) || !bad && err != nil || bad && fault.Hint(err) == "" {
			t.Errorf("%s: ParsePointer = %+v, %v; want %+v", r.name, got, err, r.want)
		}
	}
}

func TestParseToolchainURL(t *testing.T) {
	t.Parallel()
	good := cosbucket.Pointer{Bucket: "chromiumos-sdk", Path: "2019/06/a.tar.xz"}
	for text, want := range map[string]cosbucket.Pointer{
		"https://storage.googleapis.com/chromiumos-sdk/2019/06/a.tar.xz\n": good,
		"gs://chromiumos-sdk/2019/06/a.tar.xz":                             good,
		"http://storage.googleapis.com/chromiumos-sdk/a.tar.xz":            {},
		"https://evil.example/chromiumos-sdk/a.tar.xz":                     {},
		"https://storage.googleapis.com@evil.example/sdk/a.tar.xz":         {},
		"https://storage.googleapis.com/chromiumos-sdk/../x/a.tar.xz":      {},
		"https://storage.googleapis.com/chromiumos-sdk/%2e%2e/a":           {},
		"https://storage.googleapis.com/chromiumos-sdk/a?x=1":              {},
		"https://storage.googleapis.com/":                                  {},
		"file:///etc/passwd":                                               {},
		"":                                                                 {},
	} {
		got, err := cosbucket.ParseToolchainURL([]byte(text))
		if got != want || (err == nil) != (want != cosbucket.Pointer{}) || err != nil && !fault.Is(err, fault.Unsupported) {
			t.Errorf("ParseToolchainURL(%q) = %+v, %v; want %+v", text, got, err, want)
		}
	}
}

func TestParseToolchainPath(t *testing.T) {
	t.Parallel()
	got, err := cosbucket.ParseToolchainPath([]byte("2023/a.tar.xz\n"))
	want := []cosbucket.Pointer{{Bucket: "cos-sdk", Path: "2023/a.tar.xz"},
		{Bucket: "chromiumos-sdk", Path: "2023/a.tar.xz"}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("ParseToolchainPath: %v (-want +got)\n%s", err, diff)
	}
	if _, err := cosbucket.ParseToolchainPath([]byte("../x")); !fault.Is(err, fault.Unsupported) {
		t.Errorf("ParseToolchainPath(../x) = %v; want unsupported", err)
	}
}

func FuzzParsePointer(f *testing.F) {
	for _, seed := range []string{"bucket: cos-sdk\npath: a/b.tar.xz\n", "https://storage.googleapis.com/cos-sdk/a",
		"gs://cos-sdk/a", "bucket:\npath", "path: ..", "\xff: \x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var all []cosbucket.Pointer
		if p, err := cosbucket.ParsePointer(text); err == nil {
			all = append(all, p)
			again, err := cosbucket.ParsePointer([]byte("bucket: " + p.Bucket + "\npath: " + p.Path + "\n"))
			if err != nil || again != p {
				t.Errorf("%+v printed and parsed again is %+v, %v", p, again, err)
			}
		}
		if p, err := cosbucket.ParseToolchainURL(text); err == nil {
			all = append(all, p)
		}
		if ps, err := cosbucket.ParseToolchainPath(text); err == nil {
			all = append(all, ps...)
		}
		for _, p := range all {
			if !fs.ValidPath(p.Path) || strings.ContainsAny(p.Bucket, "./\\:@") ||
				strings.ContainsAny(p.Path, "\\?#%\n\r\x00 ") {
				t.Errorf("%q let %+v through", text, p)
			}
		}
	})
}

// TestSibling checks Sibling for each kind of bucket. The sibling must have the same protocol, and be on the same
// server or in the same parent folder.
func TestSibling(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "cos-tools"), 0o755),
		os.MkdirAll(filepath.Join(dir, "cos-sdk", "a"), 0o755),
		os.WriteFile(filepath.Join(dir, "cos-sdk", "a", "b"), []byte("sdk"), 0o644)); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(server.Close)
	sdk := cosbucket.Pointer{Bucket: "cos-sdk", Path: "a/b"}
	folder := (&url.URL{Scheme: "file", Path: dir}).String()
	rows := []struct{ bucket, want string }{
		{folder + "/cos-tools", folder + "/cos-sdk/a/b"},
		{server.URL + "/cos-tools", server.URL + "/cos-sdk/a/b"},
		{"https://mirror.example/pub/cos-tools/", "https://mirror.example/pub/cos-sdk/a/b"},
		{"https://storage.googleapis.com/cos-tools/below", "https://storage.googleapis.com/cos-sdk/a/b"},
		{"https://cos-tools.storage.googleapis.com", "https://cos-sdk.storage.googleapis.com/a/b"},
		{"gs://cos-tools/below", "gs://cos-sdk/a/b"},
		{"gs://cos-tools-eu,gs://cos-tools", "gs://cos-sdk/a/b"},
	}
	for _, r := range rows {
		s, err := open(t, r.bucket).Sibling(t.Context(), sdk)
		if err != nil {
			t.Errorf("Sibling of %s: %v", r.bucket, err)
			continue
		}
		if got := s.URL(sdk.Path); got != r.want {
			t.Errorf("Sibling of %s has %s; want %s", r.bucket, got, r.want)
		}
		if strings.HasPrefix(r.bucket, "file:") || strings.HasPrefix(r.bucket, server.URL) {
			if text, err := s.ReadSmall(t.Context(), sdk.Path, 10); err != nil || string(text) != "sdk" {
				t.Errorf("ReadSmall of %s = %q, %v", r.want, text, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := open(t, "https://mirror.example").Sibling(t.Context(), sdk); !fault.Is(err, fault.Unsupported) ||
		fault.Hint(err) == "" {
		t.Errorf("Sibling without a folder = %v; want unsupported, with a hint", err)
	}
	if _, err := open(t, "file://"+dir+"/cos-tools").Sibling(t.Context(),
		cosbucket.Pointer{Bucket: "..", Path: "x"}); !fault.Is(err, fault.Unsupported) {
		t.Errorf("Sibling(..) = %v; want unsupported", err)
	}
	if _, err := open(t, "file://"+dir+"/cos-tools").Sibling(t.Context(),
		cosbucket.Pointer{Bucket: "none", Path: "x"}); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Sibling(none) = %v; want input-missing", err)
	}
}
