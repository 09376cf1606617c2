package tarball_test

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/target"
)

// ima returns a security.ima attribute for every firmware file. The value contains binary bytes, as a real one does.
func ima(f *os.File, name string) ([]byte, error) {
	if !strings.HasSuffix(f.Name(), ".bin") {
		return nil, nil
	}
	return []byte("\x03\x02\x04\x00signature of " + name), nil
}

// TestPackIsPinned compares tarballs with fixed digests. Whoever changes how a tarball is packed must also change
// [tarball.Recipe].
func TestPackIsPinned(t *testing.T) {
	t.Parallel()
	if tarball.Recipe != "tgz-1" {
		t.Errorf("Recipe = %s; want the one of the digests below", tarball.Recipe)
	}
	r := newRelease(t, nil, open, "")
	for name, row := range map[string]struct {
		xattr func(*os.File, string) ([]byte, error)
		want  string
	}{
		"plain":      {nil, "sha256:132af81eb72ca48641c2cab38f8861f67647bb5b3f2afe2e0f7621fdc59324de"},
		"attributes": {ima, "sha256:49a8d7752f3592a836d4d468ec907ed9fbe4d4f84a12375df6a536424deee808"},
	} {
		got, err := tarball.Pack(t.Context(), r, filepath.Join(t.TempDir(), "tgz"), row.xattr)
		if err != nil || got != row.want {
			t.Errorf("%s: pack = %s, %v; want %s", name, got, err, row.want)
		}
		again, err := tarball.Pack(t.Context(), newReleaseAgain(t, r), filepath.Join(t.TempDir(), "tgz"), row.xattr)
		if err != nil || again != got {
			t.Errorf("%s: pack on another machine = %s, %v; want %s", name, again, err, got)
		}
	}
}

// headers returns the headers of a tarball's entries.
func headers(t *testing.T, file string) []*tar.Header {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zr, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	if zr.Name != "" || !zr.ModTime.IsZero() && zr.ModTime.Unix() != 0 {
		t.Errorf("gzip header has name %q and time %v; want none", zr.Name, zr.ModTime)
	}
	var all []*tar.Header
	for tr := tar.NewReader(zr); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h)
	}
}

func TestPackLayout(t *testing.T) {
	t.Parallel()
	r := newRelease(t, nil, target.Driver{Version: "535.1.1", Flavour: target.Open}, "")
	file := filepath.Join(t.TempDir(), "tgz")
	if _, err := tarball.Pack(t.Context(), r, file, ima); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, h := range headers(t, file) {
		names = append(names, h.Name)
		mode := int64(0o644)
		if h.Typeflag == tar.TypeDir {
			mode = 0o755
		}
		if h.Mode != mode || h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "" || h.ModTime.Unix() != 0 {
			t.Errorf("%s: %+v; want mode %o, owner root, no names, no time", h.Name, h, mode)
		}
		want := ""
		if strings.HasSuffix(h.Name, ".bin") {
			want = "\x03\x02\x04\x00signature of security.ima"
		}
		if got := h.PAXRecords["SCHILY.xattr.security.ima"]; got != want {
			t.Errorf("%s: security.ima = %q; want %q", h.Name, got, want)
		}
	}
	want := []string{
		"drivers/", "drivers/nvidia-drm.ko", "drivers/nvidia-modeset.ko", "drivers/nvidia-uvm.ko", "drivers/nvidia.ko",
		"firmware/", "firmware/nvidia/", "firmware/nvidia/535.1.1/", "firmware/nvidia/535.1.1/gsp_tu10x.bin",
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	if out, err := exec.CommandContext(t.Context(), "tar", "--xattrs", "--xattrs-include=*", "-tvvzf",
		file).CombinedOutput(); err != nil || !strings.Contains(string(out), "x: ") ||
		!strings.Contains(string(out), "security.ima") {
		t.Errorf("GNU tar sees no attribute: %s, %v", out, err)
	}
}

// TestXattr packs a file that has the extended attribute security.ima, and unpacks it with GNU tar. The test needs the
// right to set this attribute.
func TestXattr(t *testing.T) {
	t.Parallel()
	r := newRelease(t, nil, open, "")
	const value = "\x03\x02\x04\x00binary"
	bin := filepath.Join(r.Firmware, "firmware/nvidia", open.Version, "gsp_tu10x.bin")
	if err := unix.Setxattr(bin, "security.ima", []byte(value), 0); errors.Is(err, unix.EPERM) ||
		errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("security.ima cannot be set here: %v: the test needs root, and a TMPDIR that has such attributes", err)
	} else if err != nil {
		t.Fatal(err)
	}
	file, dir := filepath.Join(t.TempDir(), "tgz"), t.TempDir()
	if _, err := tarball.Pack(t.Context(), r, file, nil); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "tar", "--xattrs", "--xattrs-include=*", "-xzf", file, "-C",
		dir).CombinedOutput(); err != nil {
		t.Fatalf("tar: %s, %v", out, err)
	}
	got := make([]byte, 100)
	n, err := unix.Getxattr(filepath.Join(dir, "firmware/nvidia", open.Version, "gsp_tu10x.bin"), "security.ima", got)
	if err != nil || string(got[:n]) != value {
		t.Errorf("security.ima = %q, %v; want %q", got[:max(n, 0)], err, value)
	}
}
