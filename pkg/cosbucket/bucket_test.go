package cosbucket_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const textproto = `
gpu_driver_version_info {
  gpu_device { gpu_type: "NVIDIA_L4" }
  supported_driver_versions { label: "DEFAULT" version: "535.1.1" }
  supported_driver_versions { label: "R470" version: "470.256.02" }
}
gpu_driver_version_info {
  gpu_device { gpu_type: "OTHERS" }
  supported_driver_versions { label: "DEFAULT" version: "535.261.03" }
  supported_driver_versions { label: "LATEST" version: "550.90.07" }
  supported_driver_versions { label: "R550" version: "550.54.15" }
  supported_driver_versions { version: "570.10.2" }
  newer_field { x: 1 }
}
`

var objects = map[string]string{
	"17800.0.47/lakitu/kernel_commit":                 strings.Repeat("ab", 20) + "\n",
	"17800.0.47/lakitu/gpu_default_version":           "535.261.03\n",
	"17800.0.47/lakitu/gpu_latest_version":            "570.9.9\n",
	"17800.0.47/lakitu/gpu_R535_version":              "535.309.01\n",
	"17800.0.47/lakitu/gpu_driver_versions.textproto": textproto,
	"17800.0.50/lakitu-arm64/kernel_commit":           "nonsense\n",
	"17800.0.50/lakitu-arm64/big":                     strings.Repeat("x", 5000),
	"notabuild/lakitu/kernel_commit":                  "x",
	// This build has the former layout. Its list of drivers exists only as a serialized protocol buffer.
	"17412.0.9/kernel_commit":           strings.Repeat("cd", 20) + "\n",
	"17412.0.9/gpu_driver_versions.bin": "\x0a\x1f\x0a\x08\x0a\x06OTHERS\x12\x13\x0a\x07DEFAULT\x12\x08470.82.1",
	"17412.0.9/gpu_R470_version":        "470.256.02\n",
	"17412.0.9/extensions/gpu/x":        "not a board",
}

var (
	kernel47 = target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Milestone: 109, Arch: target.AMD64}
	kernel9  = target.Kernel{BuildID: "17412.0.9", Board: "lakitu", Milestone: 105, Arch: target.AMD64}
)

func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range objects {
		file := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func open(t *testing.T, rawURL string) *cosbucket.Bucket {
	t.Helper()
	b, err := cosbucket.Open(t.Context(), rawURL)
	if err != nil {
		t.Fatalf("Open(%s): %v", rawURL, err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return b
}

// conform checks what every kind of bucket must do.
func conform(t *testing.T, b *cosbucket.Bucket, lists bool) {
	t.Helper()
	ctx := t.Context()
	got, err := b.ReadSmall(ctx, cosbucket.DefaultVersionName(kernel47), 100)
	if err != nil || string(got) != "535.261.03\n" {
		t.Errorf("ReadSmall(gpu_default_version) = %q, %v; want 535.261.03", got, err)
	}
	r, attrs, err := b.Get(ctx, "17800.0.50/lakitu-arm64/big")
	if err != nil {
		t.Fatalf("Get(big): %v", err)
	}
	text, err := io.ReadAll(r)
	if err != nil || len(text) != 5000 || attrs.Size != 5000 {
		t.Errorf("Get(big) = %d bytes, %v, size %d; want 5000", len(text), err, attrs.Size)
	}
	if err := r.Close(); err != nil {
		t.Errorf("Close(big): %v", err)
	}
	if _, err := b.ReadSmall(ctx, "17800.0.50/lakitu-arm64/big", 4999); !fault.Is(err, fault.Unsupported) {
		t.Errorf("ReadSmall(big, 4999) = %v; want unsupported", err)
	}
	if _, _, err := b.Get(ctx, "17800.0.47/lakitu/toolchain.tar.xz"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Get(absent) = %v; want input-missing", err)
	}
	for _, name := range []string{"", ".", "/etc/passwd", "../x", "a/../../x", "a//b", "a\nb"} {
		if _, _, err := b.Get(ctx, name); !fault.Is(err, fault.Usage) {
			t.Errorf("Get(%q) = %v; want usage", name, err)
		}
	}
	k, err := b.Describe(ctx, kernel47)
	if err != nil || k.Commit != strings.Repeat("ab", 20) {
		t.Errorf("Describe = %+v, %v", k, err)
	}
	if _, err := b.Describe(ctx, target.Kernel{BuildID: "17800.0.50", Board: "lakitu-arm64"}); !fault.Is(err,
		fault.Unsupported) {
		t.Errorf("Describe(bad commit) = %v; want unsupported", err)
	}
	drivers, err := b.Drivers(ctx, kernel47)
	want := cosbucket.DriverList{
		Default: "535.261.03", Latest: "570.9.9",
		Branches: map[string]string{"R470": "470.256.02", "R535": "535.309.01", "R550": "550.54.15"},
		GPUs: map[string]cosbucket.DriverList{"NVIDIA_L4": {Default: "535.1.1",
			Branches: map[string]string{"R470": "470.256.02"}, Versions: []string{"470.256.02", "535.1.1"}}},
		Versions: []string{"470.256.02", "535.1.1", "535.261.03", "535.309.01", "550.54.15", "550.90.07", "570.9.9",
			"570.10.2"},
	}
	if diff := cmp.Diff(want, drivers); err != nil || diff != "" {
		t.Errorf("Drivers: %v (-want +got)\n%s", err, diff)
	}
	drivers, err = b.Drivers(ctx, kernel9)
	want = cosbucket.DriverList{Default: "470.82.1", Branches: map[string]string{"R470": "470.256.02"},
		Versions: []string{"470.82.1", "470.256.02"}}
	if diff := cmp.Diff(want, drivers); err != nil || diff != "" {
		t.Errorf("Drivers of the older layout: %v (-want +got)\n%s", err, diff)
	}
	if k, err := b.Describe(ctx, kernel9); err != nil || k.Commit != strings.Repeat("cd", 20) {
		t.Errorf("Describe of the older layout = %+v, %v", k, err)
	}
	if _, err := b.Describe(ctx, target.Kernel{BuildID: "17412.0.9", Board: "lakitu-arm64"}); !fault.Is(err,
		fault.InputMissing) {
		t.Errorf("Describe(an Arm board in the older layout) = %v; want input-missing", err)
	}
	if _, err := b.Drivers(ctx, target.Kernel{BuildID: "1.2.3", Board: "lakitu"}); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Drivers(no such build) = %v; want input-missing", err)
	}
	if !lists {
		if _, err := b.List(ctx, ""); !fault.Is(err, fault.Unsupported) {
			t.Errorf("List = %v; want unsupported", err)
		}
		return
	}
	names, err := b.List(ctx, "17800.0.47/lakitu/gpu_R")
	if diff := cmp.Diff([]string{"17800.0.47/lakitu/gpu_R535_version"}, names); err != nil || diff != "" {
		t.Errorf("List(gpu_R): %v (-want +got)\n%s", err, diff)
	}
	if names, err := b.List(ctx, "none/such/"); err != nil || len(names) != 0 {
		t.Errorf("List(none) = %v, %v; want nothing", names, err)
	}
	builds, err := b.Builds(ctx)
	wantBuilds := []target.Kernel{kernel9, kernel47,
		{BuildID: "17800.0.50", Board: "lakitu-arm64", Milestone: 109, Arch: target.ARM64}}
	if diff := cmp.Diff(wantBuilds, builds); err != nil || diff != "" {
		t.Errorf("Builds: %v (-want +got)\n%s", err, diff)
	}
}

func TestFolder(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	b := open(t, "file://"+dir)
	conform(t, b, true)
	if got, want := b.URL("a/b"), (&url.URL{Scheme: "file", Path: dir + "/a/b"}).String(); got != want {
		t.Errorf("URL = %s; want %s", got, want)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(dir, "planted")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Get(t.Context(), "planted"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Get(link out of the folder) = %v; want input-missing", err)
	}
	if _, _, err := b.Get(t.Context(), "17800.0.47/lakitu/kernel_commit/x"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Get(below a file) = %v; want input-missing", err)
	}
	// Another error of the file system must not count as a missing object.
	if _, _, err := b.Get(t.Context(), strings.Repeat("x", 300)); err == nil || fault.Is(err, fault.InputMissing) {
		t.Errorf("Get(name that the file system refuses) = %v; want another error than input-missing", err)
	}
	if _, _, err := b.Get(t.Context(), "17800.0.47"); !fault.Is(err, fault.InputMissing) {
		t.Errorf("Get(folder) = %v; want input-missing", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string]fault.Kind{
		"":                            fault.Usage,
		"/tmp":                        fault.Usage,
		"ftp://host/x":                fault.Usage,
		"file://relative/x":           fault.Usage,
		"file:///does/not/exist/here": fault.InputMissing,
		"https:///x":                  fault.Usage,
		"https://user:word@host/x":    fault.Usage,
		"https://host/x?token=1":      fault.Usage,
		"gs://":                       fault.Usage,
		"gs://abc,ftp://host/x":       fault.Usage,
		"gs://Capitals":               fault.Usage,
		"gs://abc,":                   fault.Usage,
		"http://[::1":                 fault.Usage,
	} {
		if _, err := cosbucket.Open(t.Context(), rawURL); !fault.Is(err, want) {
			t.Errorf("Open(%q) = %v; want %v", rawURL, err, want)
		}
	}
}

// flaky is a web server that fails the first requests for each object. It breaks the first download of the object
// "big".
type flaky struct {
	dir http.Handler

	mu    sync.Mutex
	calls map[string]int
	auth  bool
}

func (f *flaky) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.calls[r.URL.Path]++
	call := f.calls[r.URL.Path]
	f.auth = f.auth || r.Header.Get("Authorization") != ""
	f.mu.Unlock()
	switch {
	case path.Base(r.URL.Path) == "always-down", call <= 2 && path.Base(r.URL.Path) != "big":
		http.Error(w, "down", http.StatusServiceUnavailable)
	case call == 1:
		w.Header().Set("Content-Length", "5000")
		w.Header().Set("Accept-Ranges", "bytes")
		w.Header().Set("Etag", `"1"`)
		_, _ = io.WriteString(w, strings.Repeat("x", 1234))
		panic(http.ErrAbortHandler)
	default:
		w.Header().Set("Etag", `"1"`)
		f.dir.ServeHTTP(w, r)
	}
}

func TestWeb(t *testing.T) {
	t.Parallel()
	f := &flaky{dir: http.FileServer(http.Dir(folder(t))), calls: map[string]int{}}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	b := openQuick(t, server.URL)
	conform(t, b, false)
	if _, _, err := b.Get(t.Context(), "always-down"); !fault.Is(err, fault.Transient) {
		t.Errorf("Get(always-down) = %v; want transient", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if got := f.calls["/always-down"]; got != 5 {
		t.Errorf("Get(always-down) asked %d times; want 5", got)
	}
	if f.auth {
		t.Error("an Authorization header was sent to a bucket that nobody gave credentials for")
	}
}

// TestWebBrokenFile breaks a download that cannot be resumed. The reader must get an error, and not a shorter file.
func TestWebBrokenFile(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "5000")
		_, _ = io.WriteString(w, "short")
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(server.Close)
	if _, err := openQuick(t, server.URL).ReadSmall(t.Context(), "x", 1<<20); !fault.Is(err, fault.Transient) {
		t.Errorf("ReadSmall = %v; want transient", err)
	}
}

func TestWebCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		http.Error(w, "down", http.StatusBadGateway)
	}))
	t.Cleanup(server.Close)
	if _, _, err := openQuick(t, server.URL).Get(ctx, "x"); !fault.Is(err, fault.Cancelled) {
		t.Errorf("Get = %v; want cancelled", err)
	}
}

// TestSilence checks that a read fails if the bucket sends nothing for a long time. A slow reader must not cause this
// error.
func TestSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, err := cosbucket.OpenSilent().Get(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * cosbucket.StallLimit)
		b := make([]byte, 2)
		if _, err := io.ReadFull(r, b); err != nil || string(b) != "ab" {
			t.Errorf("a reader that took its time read %q, %v; want ab", b, err)
		}
		if _, err := r.Read(b); !fault.Is(err, fault.Transient) {
			t.Errorf("Read of a silent bucket = %v; want transient", err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r, _, err := cosbucket.OpenSilent().Get(ctx, "x")
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := io.ReadAll(r); !fault.Is(err, fault.Cancelled) {
			t.Errorf("Read after cancel = %v; want cancelled", err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}
