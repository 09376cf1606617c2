package input_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// bucket is a fake bucket in memory. If bodies has entries for an object, the first calls of Get return these, one per
// call. Later calls return the object's data.
type bucket struct {
	bodies map[string][]io.Reader
	data   map[string]string
	md5    map[string]string // returned as attributes
	crc32c string            // returned as an attribute
	mirror string            // returned as the URL of the mirror that had the object
	size   int64             // returned for every object; 0 means the true size
	gets   int
}

func (b *bucket) URL(name string) string { return "https://bucket.example/" + name }

func (b *bucket) Get(_ context.Context, name string) (io.ReadCloser, cosbucket.Attrs, error) {
	data, ok := b.data[name]
	if !ok {
		return nil, cosbucket.Attrs{}, fault.New(fault.InputMissing, "fetch "+name+": not there", "")
	}
	if path.Ext(name) != ".md5" && path.Ext(name) != ".sha256" {
		b.gets++
	}
	attrs := cosbucket.Attrs{Size: int64(len(data)), MD5: b.md5[name], CRC32C: b.crc32c, URL: b.mirror + name}
	if b.mirror == "" {
		attrs.URL = ""
	}
	if b.size != 0 {
		attrs.Size = b.size
	}
	if bodies := b.bodies[name]; len(bodies) > 0 {
		b.bodies[name] = bodies[1:]
		return io.NopCloser(bodies[0]), attrs, nil
	}
	return io.NopCloser(strings.NewReader(data)), attrs, nil
}

func hexMD5(s string) string    { return fmt.Sprintf("%x", md5.Sum([]byte(s))) }
func hexSHA256(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }

func newFetcher(t *testing.T, b *bucket) *input.Fetcher {
	t.Helper()
	c, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &input.Fetcher{Source: b, Cache: c, Progress: func(line string) { t.Log(line) }}
}

// blobs returns the number of blobs in a fetcher's cache.
func blobs(t *testing.T, f *input.Fetcher) int {
	t.Helper()
	n := 0
	err := filepath.WalkDir(filepath.Join(f.Cache.Dir(), "blobs"), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestBlobIsFetchedOnce(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name       string
		b          *bucket
		sum        func(f *input.Fetcher) (input.Sum, error)
		unverified bool
		gets       int // number of downloads in two calls
	}{
		{"md5 beside", &bucket{data: map[string]string{"d/o": "bytes", "d/o.md5": hexMD5("bytes")}},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, false, 1},
		{"md5sum line", &bucket{data: map[string]string{"d/o": "bytes", "d/o.md5": hexMD5("bytes") + "  o\n"}},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, false, 1},
		{"sha256", &bucket{data: map[string]string{"d/o": "bytes", "sha256/o.sha256": hexSHA256("bytes") + " *o\n"}},
			func(f *input.Fetcher) (input.Sum, error) {
				return f.Sum(t.Context(), input.SHA256, "sha256/o.sha256", "d/o")
			}, false, 1},
		{"md5 as an attribute", &bucket{data: map[string]string{"d/o": "bytes"},
			md5: map[string]string{"d/o": hexMD5("bytes")}},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, false, 2},
		{"sha256 beside", &bucket{data: map[string]string{"d/o": "bytes", "d/o.sha256": hexSHA256("bytes")}},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, false, 1},
		{"crc32c as an attribute", &bucket{data: map[string]string{"d/o": "bytes"}, crc32c: "01234567"},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, false, 2},
		{"nothing to check against", &bucket{data: map[string]string{"d/o": "bytes"}},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, true, 2},
		{"size unknown", &bucket{size: -1, data: map[string]string{"d/o": "bytes", "d/o.md5": hexMD5("bytes")}},
			func(f *input.Fetcher) (input.Sum, error) { return f.ChecksumFile(t.Context(), "d/o") }, false, 1},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			f := newFetcher(t, r.b)
			want := input.Material{Name: "o", URI: "https://bucket.example/d/o", Digest: "sha256:" + hexSHA256("bytes"), Size: 5,
				Unverified: r.unverified}
			for range 2 {
				sum, err := r.sum(f)
				if err != nil {
					t.Fatal(err)
				}
				got, file, err := f.Blob(t.Context(), "d/o", sum)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("material (-want +got):\n%s", diff)
				}
				if b, err := os.ReadFile(file); err != nil || string(b) != "bytes" {
					t.Errorf("blob = %q, %v", b, err)
				}
			}
			if r.b.gets != r.gets {
				t.Errorf("%d downloads; want %d", r.b.gets, r.gets)
			}
		})
	}
}

func TestBlobFollowsItsChecksum(t *testing.T) {
	t.Parallel()
	b := &bucket{data: map[string]string{"o": "one", "o.md5": hexMD5("one"), "p": "one", "p.md5": hexMD5("one")}}
	f := newFetcher(t, b)
	get := func(name string) (input.Material, error) {
		sum, err := f.ChecksumFile(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		m, _, err := f.Blob(t.Context(), name, sum)
		return m, err
	}
	if _, err := get("o"); err != nil {
		t.Fatal(err)
	}
	// The cache has this content already, so Get must not download it under its other name.
	if m, err := get("p"); err != nil || b.gets != 1 || m.Name != "p" {
		t.Errorf("same sum, other name: %+v, %v, %d downloads; want p and 1", m, err, b.gets)
	}
	b.data["o"], b.data["o.md5"] = "two", hexMD5("two")
	if m, err := get("o"); err != nil || m.Digest != "sha256:"+hexSHA256("two") || b.gets != 2 {
		t.Errorf("changed object: %+v, %v, %d downloads", m, err, b.gets)
	}
	b.data["o.md5"] = hexMD5("three")
	if _, err := get("o"); !fault.Is(err, fault.Checksum) || fault.Hint(err) == "" {
		t.Errorf("changed checksum alone: %v, hint %q; want a checksum fault with a hint", err, fault.Hint(err))
	}
}

func TestBlobRefuses(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name string
		b    *bucket
		sum  input.Sum
		kind fault.Kind
	}{
		{"wrong md5", &bucket{data: map[string]string{"o": "bytes"}}, input.Sum{Algorithm: input.MD5, Hex: hexMD5("other")},
			fault.Checksum},
		{"wrong sha256", &bucket{data: map[string]string{"o": "bytes"}},
			input.Sum{Algorithm: input.SHA256, Hex: hexSHA256("other")}, fault.Checksum},
		{"wrong md5 attribute", &bucket{data: map[string]string{"o": "bytes"}, md5: map[string]string{"o": hexMD5("other")}},
			input.Sum{}, fault.Checksum},
		{"md5 attribute against the md5 beside",
			&bucket{data: map[string]string{"o": "bytes"}, md5: map[string]string{"o": hexMD5("bytes")}},
			input.Sum{Algorithm: input.MD5, Hex: hexMD5("other")}, fault.Checksum},
		{"missing", &bucket{}, input.Sum{}, fault.InputMissing},
		{"shorter than promised", &bucket{data: map[string]string{"o": "bytes"}, size: 9}, input.Sum{}, fault.Transient},
		{"longer than promised", &bucket{data: map[string]string{"o": "bytes"}, size: 3}, input.Sum{}, fault.Checksum},
	}
	for _, r := range rows {
		f := newFetcher(t, r.b)
		_, _, err := f.Blob(t.Context(), "o", r.sum)
		if !fault.Is(err, r.kind) {
			t.Errorf("%s: Blob = %v; want %v", r.name, err, r.kind)
		}
		if r.kind != fault.InputMissing && (err == nil || !strings.Contains(err.Error(), "https://bucket.example/o")) {
			t.Errorf("%s: %v does not name the object", r.name, err)
		}
		if n := blobs(t, f); n != 0 {
			t.Errorf("%s: %d blobs were kept", r.name, n)
		}
	}
}

func TestBlobTriesABrokenStreamAgain(t *testing.T) {
	t.Parallel()
	cut := func() io.Reader {
		return io.MultiReader(strings.NewReader("by"), iotest.ErrReader(errors.New("connection reset")))
	}
	b := &bucket{data: map[string]string{"o": "bytes"},
		bodies: map[string][]io.Reader{"o": {cut(), strings.NewReader("byt")}}}
	if _, _, err := newFetcher(t, b).Blob(t.Context(), "o",
		input.Sum{Algorithm: input.MD5, Hex: hexMD5("bytes")}); err != nil || b.gets != 3 {
		t.Errorf("Blob = %v after %d downloads; want success at the third", err, b.gets)
	}
	b.bodies["o"] = []io.Reader{cut(), cut(), cut()}
	if _, _, err := newFetcher(t, b).Blob(t.Context(), "o", input.Sum{}); !fault.Is(err, fault.Transient) || b.gets != 6 {
		t.Errorf("Blob = %v after %d downloads; want it to give up as transient after three", err, b.gets-3)
	}
}

// TestMaterialNamesTheMirror checks that the material has the URL of the mirror from which the object, or its checksum,
// came.
func TestMaterialNamesTheMirror(t *testing.T) {
	t.Parallel()
	b := &bucket{data: map[string]string{"d/o": "bytes", "d/o.md5": hexMD5("bytes"), "d/p": "p"},
		mirror: "https://mirror.example/"}
	f := newFetcher(t, b)
	for _, how := range []string{"fetched", "recalled"} {
		sum, err := f.ChecksumFile(t.Context(), "d/o")
		if err != nil {
			t.Fatal(err)
		}
		if m, _, err := f.Blob(t.Context(), "d/o", sum); err != nil || m.URI != "https://mirror.example/d/o" {
			t.Errorf("%s: material %+v, %v; want it at the mirror", how, m, err)
		}
	}
	if _, m, err := f.Small(t.Context(), "d/p", 10); err != nil || m.URI != "https://mirror.example/d/p" {
		t.Errorf("small: material %+v, %v; want it at the mirror", m, err)
	}
	if _, _, err := f.Small(t.Context(), "d/o", 4); !fault.Is(err, fault.Unsupported) || fault.Hint(err) == "" {
		t.Errorf("Small beyond the limit = %v; want unsupported, with a hint", err)
	}
}

func TestSmall(t *testing.T) {
	t.Parallel()
	b := &bucket{data: map[string]string{"env": "CC=gcc\n", "env.md5": hexMD5("CC=gcc\n"), "bad": "x",
		"bad.md5": hexMD5("y"), "bare": "z"}}
	f := newFetcher(t, b)
	data, m, err := f.Small(t.Context(), "env", 100)
	want := input.Material{Name: "env", URI: "https://bucket.example/env", Digest: "sha256:" + hexSHA256("CC=gcc\n"),
		Size: 7}
	if err != nil || string(data) != "CC=gcc\n" || m != want {
		t.Errorf("Small = %q, %+v, %v; want %+v", data, m, err, want)
	}
	if _, m, err := f.Small(t.Context(), "bare", 100); err != nil || !m.Unverified {
		t.Errorf("Small without a checksum = %+v, %v; want it marked unverified", m, err)
	}
	if _, _, err := f.Small(t.Context(), "bad", 100); !fault.Is(err, fault.Checksum) {
		t.Errorf("Small with a wrong checksum = %v", err)
	}
}

func TestParseSum(t *testing.T) {
	t.Parallel()
	a, b := hexMD5("a"), hexMD5("b")
	rows := []struct {
		name, text, want string
	}{
		{"bare", a, a},
		{"bare with newline", a + "\n", a},
		{"upper case", strings.ToUpper(a), a},
		{"with name", a + "  o.tgz\n", a},
		{"binary mode", a + " *o.tgz\n", a},
		{"with a path", a + "  ./out/o.tgz\n", a},
		{"among others", b + "  other\n" + a + "  o.tgz\n", a},
		{"only others", b + "  other\n", ""},
		{"empty", "", ""},
		{"not hex", strings.Repeat("z", 32), ""},
		{"wrong length", a[:30], ""},
		{"html", "<html>" + a + "</html>", ""},
	}
	for _, r := range rows {
		got, err := input.ParseSum(input.MD5, []byte(r.text), "d/o.tgz")
		if got.Hex != r.want || (err == nil) != (r.want != "") || err != nil && !fault.Is(err, fault.Checksum) {
			t.Errorf("%s: ParseSum(%q) = %q, %v; want %q", r.name, r.text, got.Hex, err, r.want)
		}
	}
}

func FuzzParseSum(f *testing.F) {
	f.Add([]byte(hexMD5("a") + "  o\n"))
	f.Add([]byte(hexSHA256("a")))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, a := range []input.Algorithm{input.MD5, input.SHA256} {
			sum, err := input.ParseSum(a, text, "o")
			if err == nil && !bytes.Contains(bytes.ToLower(text), []byte(sum.Hex)) {
				t.Errorf("ParseSum(%q) = %q, which is not in it", text, sum.Hex)
			}
		}
	})
}
