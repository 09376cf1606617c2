package cossrc_test

import (
	"crypto/md5"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// put writes objects below root, and the MD5 checksum of each. The first part of an object's name is its bucket.
func put(t testing.TB, root string, objects map[string][]byte) {
	t.Helper()
	for name, data := range objects {
		file := filepath.Join(root, filepath.FromSlash(name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
			t.Fatal(err)
		}
		if _, own := objects[name+".md5"]; own || strings.HasSuffix(name, ".md5") {
			continue // objects has a checksum for this object
		}
		if err := os.WriteFile(file+".md5", fmt.Appendf(nil, "%x", md5.Sum(data)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// sdk is the object with the toolchain, in Google's bucket chromiumos-sdk.
const sdk = "2023/08/x86_64-cros-linux-gnu-2023.08.01.tar.xz"

// layouts returns the same COS build in each layout that Google's bucket has or had.
func layouts(t testing.TB) []layout {
	headers, toolchain, env, commit := "kernel-headers.tgz", "toolchain.tar.xz", "toolchain_env", "kernel_commit"
	r := release(t, headerFiles(), toolchainFiles(), day, 0)
	const b = "cos-tools/17800.0.9/"
	return []layout{
		{"current", "lakitu", map[string][]byte{b + "lakitu/" + headers: r[headers], b + "lakitu/" + toolchain: r[toolchain],
			b + "lakitu/" + env: r[env], b + "lakitu/" + commit: r[commit]}, nil},
		{"older", "lakitu", map[string][]byte{b + headers: r[headers], b + toolchain: r[toolchain], b + env: r[env],
			b + commit: r[commit]},
			[]string{b + headers, b + toolchain, b + env, b + commit}},
		{"some of each", "lakitu",
			map[string][]byte{b + "lakitu/" + headers: r[headers], b + toolchain: r[toolchain], b + "lakitu/" + env: r[env],
				b + commit: r[commit]},
			[]string{b + "lakitu/" + headers, b + toolchain, b + "lakitu/" + env, b + commit}},
		{"Arm", "lakitu-arm64", map[string][]byte{b + "lakitu-arm64/" + headers: r[headers],
			b + "lakitu-arm64/" + toolchain: r[toolchain], b + "lakitu-arm64/" + env: r[env],
			b + "lakitu-arm64/" + commit: r[commit]}, nil},
		{"pointer", "lakitu", map[string][]byte{b + "lakitu/" + headers: r[headers], b + "lakitu/" + env: r[env],
			b + "lakitu/" + commit:            r[commit],
			b + "lakitu/toolchain.tar.xz.gcs": []byte("bucket: chromiumos-sdk\npath: " + sdk + "\n"),
			"chromiumos-sdk/" + sdk:           r[toolchain]},
			[]string{b + "lakitu/" + headers, "chromiumos-sdk/" + sdk, b + "lakitu/toolchain.tar.xz.gcs", b + "lakitu/" + env,
				b + "lakitu/" + commit}},
		{"older pointer", "lakitu", map[string][]byte{b + headers: r[headers], b + env: r[env], b + commit: r[commit],
			b + "toolchain_url":     []byte("https://storage.googleapis.com/chromiumos-sdk/" + sdk + "\n"),
			"chromiumos-sdk/" + sdk: r[toolchain]},
			[]string{b + headers, "chromiumos-sdk/" + sdk, b + "toolchain_url", b + env, b + commit}},
		{"path in the second SDK bucket", "lakitu",
			map[string][]byte{b + "lakitu/" + headers: r[headers], b + "lakitu/" + env: r[env],
				b + "lakitu/" + commit:      r[commit],
				b + "lakitu/toolchain_path": []byte(sdk), "chromiumos-sdk/" + sdk: r[toolchain]},
			[]string{b + "lakitu/" + headers, "chromiumos-sdk/" + sdk, b + "lakitu/toolchain_path", b + "lakitu/" + env,
				b + "lakitu/" + commit}},
	}
}

type layout struct {
	name, board string
	objects     map[string][]byte
	want        []string // expected materials; nil means all objects
}

// golden is the fingerprint of the COS build. It is the same for every layout.
const golden = target.Fingerprint("sha256:6866f2e7d30d976270d18df370b872174504aa92fed2251cffbf2e93b0625f82")

func (l layout) check(t *testing.T, bucketURL string, in *cossrc.Inputs) {
	t.Helper()
	if in.Fingerprint != golden || in.Kernel.Arch != target.BoardArch(l.board) || in.Kernel.Commit == "" {
		t.Errorf("inputs %+v; want fingerprint %s", in, golden)
	}
	want := l.want
	if want == nil {
		for name := range l.objects {
			want = append(want, name)
		}
	}
	var got []string
	for _, m := range in.Materials {
		got = append(got, strings.TrimPrefix(m.URI, strings.TrimSuffix(bucketURL, "cos-tools")))
		if m.Unverified {
			t.Errorf("material %+v; want it verified", m)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the materials' places differ (-want +got)\n%s", diff)
	}
}

func fetchFrom(t *testing.T, bucketURL, board string, options ...cossrc.Option) (*cossrc.Inputs, error) {
	t.Helper()
	bucket, cache := openEmpty(t, bucketURL)
	return cossrc.Fetch(t.Context(), bucket, cache, "17800.0.9", board, nil, options...)
}

func TestLayouts(t *testing.T) {
	t.Parallel()
	for _, l := range layouts(t) {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			put(t, root, l.objects)
			web := httptest.NewServer(http.FileServer(http.Dir(root)))
			t.Cleanup(web.Close)
			for _, bucketURL := range []string{(&url.URL{Scheme: "file", Path: root + "/cos-tools"}).String(),
				web.URL + "/cos-tools"} {
				if in, err := fetchFrom(t, bucketURL, l.board); err != nil {
					t.Errorf("Fetch: %v", err)
				} else {
					l.check(t, bucketURL, in)
				}
			}
		})
	}
}

// TestEmulatorLayouts reads each layout from an emulator, through Google's API and by plain HTTP. The emulator's
// buckets have no checksum files, so Fetch must use the checksums in the objects' metadata.
func TestEmulatorLayouts(t *testing.T) {
	for _, l := range layouts(t) {
		t.Run(l.name, func(t *testing.T) {
			s := gcs.Start(t)
			s.Use(t)
			s.Bucket(t, "cos-tools")
			s.Bucket(t, "chromiumos-sdk")
			for name, data := range l.objects {
				bucket, object, _ := strings.Cut(name, "/")
				s.Put(t, bucket, object, data)
			}
			for _, bucketURL := range []string{"gs://cos-tools", s.Endpoint + "/cos-tools"} {
				if in, err := fetchFrom(t, bucketURL, l.board); err != nil {
					t.Errorf("Fetch from %s: %v", bucketURL, err)
				} else {
					l.check(t, bucketURL, in)
				}
			}
		})
	}
}

func TestArmHasNoOlderLayout(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	put(t, root, layouts(t)[1].objects)
	_, err := fetchFrom(t, "file://"+root+"/cos-tools", "lakitu-arm64")
	if !fault.Is(err, fault.InputMissing) || strings.Contains(err.Error(), "17800.0.9/toolchain_env") {
		t.Errorf("Fetch = %v; want input-missing for the Arm board, without a search for the x86 board's objects", err)
	}
}

func TestInfo(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	objects := layouts(t)[0].objects
	const info = "cos-tools/17800.0.9/lakitu/kernel_info"
	objects[info] = []byte("URL=https://cos.googlesource.com/third_party/kernel\n")
	put(t, root, objects)
	url := "file://" + root + "/cos-tools"
	in, err := fetchFrom(t, url, "lakitu")
	if err != nil || in.Fingerprint != golden || in.SourceURL != "https://cos.googlesource.com/third_party/kernel" {
		t.Errorf("Fetch = %+v, %v; want the source's URL, and the fingerprint that the COS build has without kernel_info",
			in, err)
	}
	put(t, root, map[string][]byte{info: []byte("<html>")})
	if _, err := fetchFrom(t, url, "lakitu"); !fault.Is(err, fault.Unsupported) || fault.Hint(err) == "" {
		t.Errorf("Fetch with HTML in kernel_info = %v; want unsupported, with a hint", err)
	}
}

// TestMissingObjects checks the error about a missing object. It must have the object's name, each place where Fetch
// looked, and a hint.
func TestMissingObjects(t *testing.T) {
	t.Parallel()
	rows := []struct {
		layout int
		remove string
		texts  []string
		hint   string
	}{
		{0, "17800.0.9/lakitu/kernel-headers.tgz",
			[]string{"no kernel-headers.tgz", "/17800.0.9/lakitu/kernel-headers.tgz", "/17800.0.9/kernel-headers.tgz"},
			"--kernel-mirror"},
		{0, "17800.0.9/lakitu/toolchain.tar.xz",
			[]string{"no toolchain.tar.xz", "/17800.0.9/lakitu/toolchain.tar.xz", "/17800.0.9/toolchain.tar.xz"},
			"toolchain.tar.xz.gcs"},
		{0, "17800.0.9/lakitu/toolchain_env", []string{"no toolchain_env", "/17800.0.9/lakitu/toolchain_env"}, "CC="},
		{4, "../chromiumos-sdk/" + sdk, []string{"/17800.0.9/lakitu/toolchain.tar.xz.gcs", "/chromiumos-sdk/" + sdk},
			"/cos-tools/17800.0.9/lakitu/toolchain.tar.xz"},
		{4, "../chromiumos-sdk", []string{"/17800.0.9/lakitu/toolchain.tar.xz.gcs", "chromiumos-sdk"},
			"beside --kernel-mirror"},
		{6, "../chromiumos-sdk", []string{"/17800.0.9/lakitu/toolchain_path", "cos-sdk", "chromiumos-sdk"}, "beside"},
	}
	for _, r := range rows {
		root := t.TempDir()
		l := layouts(t)[r.layout]
		put(t, root, l.objects)
		if err := os.RemoveAll(filepath.Join(root, "cos-tools", r.remove)); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(root, "cos-tools", r.remove+".md5")); err != nil &&
			!errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		_, err := fetchFrom(t, "file://"+root+"/cos-tools", l.board)
		if !fault.Is(err, fault.InputMissing) || !strings.Contains(fault.Hint(err), r.hint) {
			t.Errorf("without %s: %v, hint %q; want input-missing, with a hint that has %s", r.remove, err, fault.Hint(err),
				r.hint)
			continue
		}
		for _, text := range r.texts {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("without %s: %v; want it to name %s", r.remove, err, text)
			}
		}
	}
}

// TestPointersThatLie checks a COS build with a pointer, a small file that names the toolchain's bucket and path. Fetch
// must refuse a pointer to a forbidden place, and a pointer to an object that is damaged or no toolchain.
func TestPointersThatLie(t *testing.T) {
	t.Parallel()
	rows := map[string]fault.Kind{
		"bucket: ..\npath: etc/passwd\n":                     fault.Unsupported,
		"bucket: chromiumos-sdk\npath: ../../etc/passwd\n":   fault.Unsupported,
		"bucket: chromiumos-sdk\npath: http://evil.example/": fault.Unsupported,
		"bucket: evil.example\npath: x\n":                    fault.Unsupported,
		strings.Repeat("x", 100_000):                         fault.Unsupported,
		"bucket: chromiumos-sdk\npath: damaged\n":            fault.Checksum,
		"bucket: chromiumos-sdk\npath: page\n":               fault.Unverified,
	}
	for text, want := range rows {
		root := t.TempDir()
		objects := layouts(t)[4].objects
		objects["cos-tools/17800.0.9/lakitu/toolchain.tar.xz.gcs"] = []byte(text)
		objects["chromiumos-sdk/damaged"], objects["chromiumos-sdk/page"] = []byte("x"), []byte("<html>")
		put(t, root, objects)
		if err := os.WriteFile(filepath.Join(root, "chromiumos-sdk", "damaged"), []byte("y"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := fetchFrom(t, "file://"+root+"/cos-tools", "lakitu"); !fault.Is(err, want) || fault.Hint(err) == "" {
			t.Errorf("Fetch by the pointer %.60q = %v, hint %q; want %v, with a hint", text, err, fault.Hint(err), want)
		}
	}
}

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte("URL=https://cos.googlesource.com/third_party/kernel\n"))
	f.Add([]byte("# comment\nURL='deb:linux@6.1.176-1'\nURL=\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		url, err := cossrc.ParseInfo(text)
		if err != nil {
			return
		}
		if strings.ContainsAny(url, " \n\r\x00\x1b") || len(url) > 600 {
			t.Errorf("ParseInfo(%q) let %q through", text, url)
		}
		if again, err := cossrc.ParseInfo([]byte("URL=" + url)); err != nil || again != url {
			t.Errorf("ParseInfo(%q) = %q, printed and parsed again %q, %v", text, url, again, err)
		}
	})
}
