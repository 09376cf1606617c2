package localbuild_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gofrs/flock"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestMain lets the test binary act as two other programs: the one that enters an image, and the builder in that image.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) > 1 && os.Args[1] == localbuild.EnterCommand:
		fmt.Fprintf(os.Stderr, "error: %v\n", localbuild.Enter(os.Args[2:]))
		os.Exit(1)
	case filepath.Base(os.Args[0]) == "image-builder":
		imageBuilder()
		return
	}
	os.Exit(m.Run())
}

// lackingMirror is the name of a kernel mirror. If imageBuilder gets it, it ends as if it ran out of memory.
const lackingMirror = "lacking"

// imageBuilder stands in for the builder in an image. It prints the folders, files and environment variables that it
// sees.
func imageBuilder() {
	if os.Args[1] == "keygen" {
		for _, name := range []string{os.Args[2], os.Args[2] + ".pub"} {
			if err := os.WriteFile(name, []byte("-----BEGIN X-----\n-----END X-----\n"), 0o600); err != nil {
				panic(err)
			}
		}
		return
	}
	seen := func(path string) string {
		raw, err := os.ReadFile(path)
		if err != nil {
			return errors.Unwrap(err).Error()
		}
		return strings.TrimSpace(string(raw))
	}
	names := func(dir string) []string {
		entries, _ := os.ReadDir(dir) // an unreadable folder counts as empty
		var all []string
		for _, e := range entries {
			all = append(all, e.Name())
		}
		return all
	}
	mirror := os.Args[slices.Index(os.Args, "--kernel-mirror")+1]
	if filepath.Base(mirror) == lackingMirror {
		os.Exit(fault.OutOfMemory.ExitCode())
	}
	raw, err := json.Marshal(map[string]any{
		"root": names(
			"/",
		), "etc": names("/etc"), "tmp": names("/tmp"), "link": seen("/opt/link"),
		"mirror":  seen(strings.TrimPrefix(mirror, "file://") + "/there"),
		"outside": seen(os.Getenv("HOME") + "/outside"), "environment": os.Environ(),
	})
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(os.Stderr, string(raw))
	fmt.Println(`{"digest":"sha256:ab","driver":{"version":"535.1.1","flavour":"open"}}`)
}

// layer makes an image layer. Each entry is a tar header, or a pair of a file's name and content.
func layer(t *testing.T, entries ...any) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		var content []byte
		h, ok := e.(*tar.Header)
		if !ok {
			pair := e.([2]string)
			content, h = []byte(
				pair[1],
			), &tar.Header{
				Name:     pair[0],
				Typeflag: tar.TypeReg,
				Mode:     0o755,
				Size:     int64(len(pair[1])),
			}
		}
		if err := errors.Join(w.WriteHeader(h), second(w.Write(content))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
	)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func second(_ int, err error) error { return err }

// image pushes an image to a new registry. Its builder is this test binary.
func image(t *testing.T, entrypoint []string, more ...v1.Layer) (*registry.Repository, string) {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	base := layer(
		t,
		[2]string{"usr/local/bin/image-builder", string(self)},
		[2]string{"etc/gone", "old"},
		[2]string{"etc/kept", "kept"},
		&tar.Header{
			Name:     "opt/link",
			Typeflag: tar.TypeSymlink,
			Linkname: "/etc/kept",
		},
		&tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
		&tar.Header{Name: "etc/resolv.conf", Typeflag: tar.TypeSymlink, Linkname: "/etc/gone"},
	)
	img, err := mutate.AppendLayers(
		empty.Image,
		append([]v1.Layer{base, layer(t, [2]string{"etc/.wh.gone", ""})}, more...)...)
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.Config(img, v1.Config{Entrypoint: entrypoint}); err != nil {
		t.Fatal(err)
	}
	repo, err := registry.Open(testkit.Registry(t, true)+"/prebake/builder", registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	return repo, d.Digest.String()
}

func TestBuildInImage(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	repo, digest := image(t, []string{"/usr/local/bin/image-builder"})
	t.Run("plain", func(t *testing.T) { buildInImage(t, repo, digest, t.TempDir()) })
	// On COS, the state folder is on a partition that is mounted noexec.
	t.Run("noexec", func(t *testing.T) {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
		sub := filepath.Join(dir, "node")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		buildInImage(t, repo, digest, sub)
	})
}

// buildInImage compiles below a folder. The cache folder is a link, as on a machine with a separate disk for the cache.
func buildInImage(t *testing.T, repo *registry.Repository, digest, dir string) {
	mirror := filepath.Join(dir, "mirror")
	if err := os.Mkdir(mirror, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"mirror/there": "a kernel", "outside": "of the image"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "state"), 0o700), os.Mkdir(filepath.Join(dir, "disk"), 0o700),
		os.Symlink(filepath.Join(dir, "disk"), filepath.Join(dir, "state", "cache"))); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", dir)
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	t.Setenv("SECRET", "token")
	var said []string
	b := localbuild.Builder{
		Image: &localbuild.Image{
			Repository: repo,
			Digest:     digest,
		}, StateDir: filepath.Join(dir, "state"), CacheDir: filepath.Join(dir, "state", "cache"),
		KernelMirror: "file://" + mirror, Progress: func(line string) { said = append(said, line) },
	}
	a, err := build(t.Context(), b, question)
	if err != nil {
		t.Fatalf("%v; said %q", err, said)
	}
	if a.Digest != "sha256:ab" || a.Repository != b.Layout() {
		t.Errorf("Build = %+v", a)
	}
	var seen struct {
		Root, Etc, TMP, Environment []string
		Link, Mirror, Outside       string
	}
	if err := json.Unmarshal([]byte(said[len(said)-1]), &seen); err != nil {
		t.Fatalf("%v in %q", err, said)
	}
	top := strings.Split(dir, "/")[1]
	for _, name := range seen.Root {
		if !slices.Contains([]string{"usr", "etc", "opt", "dev", "proc", "tmp", top}, name) {
			t.Errorf("the builder sees /%s", name)
		}
	}
	if slices.Contains(seen.Etc, "gone") || !slices.Contains(seen.Etc, "kept") {
		t.Errorf("/etc has %q; want kept, and not what a later layer took away", seen.Etc)
	}
	if seen.Link != "kept" || seen.Mirror != "a kernel" || seen.Outside != "no such file or directory" ||
		top != "tmp" && len(seen.TMP) > 0 {
		t.Errorf("the builder sees %+v", seen)
	}
	if text := strings.Join(seen.Environment, " "); strings.Contains(text, "token") ||
		!strings.Contains(text, "HTTPS_PROXY=") {
		t.Errorf("the builder's environment is %q", text)
	}
	if left, err := filepath.Glob(b.StateDir + "/builder-image"); err != nil || len(left) > 0 {
		t.Errorf("left %q, %v", left, err)
	}
	if to, err := os.Readlink(filepath.Join(dir, "state", "cache")); err != nil || to != filepath.Join(dir, "disk") {
		t.Errorf("the link to the cache leads to %q, %v", to, err)
	}
	raw, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(raw, []byte(dir+"/")) {
		t.Errorf("mounts of it are left: %v", err)
	}
}

func TestImageRefused(t *testing.T) {
	t.Parallel()
	repo, none := image(t, nil)
	for name, digest := range map[string]string{"no entry point": none,
		"no such image": "sha256:" + strings.Repeat("0", 64)} {
		b := localbuild.Builder{
			Image:    &localbuild.Image{Repository: repo, Digest: digest},
			StateDir: t.TempDir(),
			CacheDir: t.TempDir(),
		}
		if _, err := build(t.Context(), b, question); err == nil ||
			fault.Hint(err) == "" && !fault.Is(err, fault.NoArtifact) {
			t.Errorf("Build with %s = %v (hint %q)", name, err, fault.Hint(err))
		}
		if left, err := filepath.Glob(b.StateDir + "/builder-image"); err != nil || len(left) > 0 {
			t.Errorf("%s left %q, %v", name, left, err)
		}
	}
}

// TestSweep checks that Sweep removes the image that a killed run left behind, but not the image of a compile that
// still runs.
func TestSweep(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	if err := localbuild.Sweep(state); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(state, "builder-image", "root")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	lock := flock.New(filepath.Join(state, "builder-image.lock"))
	if held, err := lock.TryLock(); err != nil || !held {
		t.Fatal(held, err)
	}
	if err := localbuild.Sweep(state); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Errorf("the image of a compile that runs: %v", err)
	}
	repo, digest := image(t, nil)
	b := localbuild.Builder{Image: &localbuild.Image{Repository: repo, Digest: digest}, StateDir: state,
		CacheDir: t.TempDir()}
	if _, err := build(t.Context(), b, question); !fault.Is(err, fault.Busy) {
		t.Errorf("a second compile = %v; want busy", err)
	}
	if err := errors.Join(lock.Unlock(), localbuild.Sweep(state)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a killed run left: %v", err)
	}
}
