package modsign_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/fault"
)

// entry is a file of an archive.
type entry struct {
	name, data string
	kind       byte
	ima        string
}

func tgz(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	w := tar.NewWriter(z)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Typeflag: tar.TypeReg, Format: tar.FormatPAX}
		if e.kind != 0 {
			h.Typeflag, h.Size, h.Linkname = e.kind, 0, e.data
		}
		if e.ima != "" {
			h.PAXRecords = map[string]string{"SCHILY.xattr.security.ima": e.ima}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if e.kind == 0 {
			if _, err := w.Write([]byte(e.data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// google is what a COS build ships: a root that the kernel has, and a key for
// drivers that the root has certified.
type google struct {
	root, driver *pair
	archive      []byte
}

// newGoogle signs one module and the firmware of a driver.
func newGoogle(t testing.TB) google {
	t.Helper()
	root := newPair(t, rsaKey(t, 2048), nil, x509.KeyUsageCertSign)
	g := google{root: root, driver: newPair(t, rsaKey(t, 2048), root, x509.KeyUsageDigitalSignature)}
	_, signature, err := modsign.Split(signed(t, load(t, g.driver), module, "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.driver.cert.Raw}))
	g.archive = tgz(t,
		entry{name: "./", kind: tar.TypeDir}, entry{name: "./gpu-driver-cert.pem", data: cert}, entry{name: "./gpu-driver-cert.der", data: string(g.driver.cert.Raw)},
		entry{name: "./nvidia.ko.sig", data: string(signature)}, entry{name: "./gsp_tu10x.bin.sig", data: "\x03\x02ima"}, entry{name: "./sign-file", data: "\x7fELF"},
	)
	return g
}

func TestDetached(t *testing.T) {
	t.Parallel()
	g, stranger := newGoogle(t), rsaPair(t)
	d, err := modsign.ReadDetached(bytes.NewReader(g.archive))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(slices.Sorted(maps.Keys(d.Modules)), []string{"nvidia.ko"}) || string(d.Firmware["gsp_tu10x.bin"]) != "\x03\x02ima" || len(d.Certificates) != 2 {
		t.Errorf("ReadDetached = %+v", d)
	}
	recompiled := append(bytes.Clone(module), '!')
	for name, row := range map[string]struct {
		file     string
		module   []byte
		trusted  []*x509.Certificate
		attached bool
		why      string
	}{
		"the very bytes, root known":   {"nvidia.ko", module, []*x509.Certificate{g.root.cert}, true, ""},
		"the very bytes, root unknown": {"nvidia.ko", module, nil, true, ""},
		"the very bytes, another root": {"nvidia.ko", module, []*x509.Certificate{stranger.cert}, false, "not over these bytes"},
		"compiled again":               {"nvidia.ko", recompiled, []*x509.Certificate{g.root.cert}, false, "not over these bytes"},
		"not signed by Google":         {"nvidia-uvm.ko", module, nil, false, "no signature of nvidia-uvm.ko"},
	} {
		dir := t.TempDir()
		dst := filepath.Join(dir, "out.ko")
		attached, why, err := d.Attach(write(t, filepath.Join(dir, row.file), row.module), dst, row.trusted)
		if err != nil || attached != row.attached || !strings.Contains(why, row.why) || attached != (why == "") {
			t.Errorf("%s: Attach = %v, %q, %v; want %v, %q", name, attached, why, err, row.attached, row.why)
		}
		switch _, err := os.Stat(dst); {
		case !row.attached && !errors.Is(err, os.ErrNotExist):
			t.Errorf("%s: Attach left a file: %v", name, err)
		case row.attached:
			if _, err := modsign.VerifyFile(dst, []*x509.Certificate{g.driver.cert}); err != nil {
				t.Errorf("%s: VerifyFile = %v", name, err)
			}
		}
	}
	own := write(t, filepath.Join(t.TempDir(), "nvidia.ko"), signed(t, load(t, stranger), module, "sha256"))
	if _, _, err := d.Attach(own, filepath.Join(t.TempDir(), "x"), nil); !fault.Is(err, fault.CheckFailed) {
		t.Errorf("Attach(signed already) = %v; want check failed", err)
	}
}

func TestReadDetachedRefuses(t *testing.T) {
	t.Parallel()
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rsaPair(t).cert.Raw}))
	for name, archive := range map[string][]byte{
		"no archive":        []byte("hello"),
		"cut off":           tgz(t, entry{name: "nvidia.ko.sig", data: "x"})[:40],
		"no signatures":     tgz(t, entry{name: "README", data: "x"}),
		"firmware only":     tgz(t, entry{name: "gsp.bin.sig", data: "x"}),
		"twice":             tgz(t, entry{name: "nvidia.ko.sig", data: "x"}, entry{name: "./a/nvidia.ko.sig", data: "y"}),
		"no certificate":    tgz(t, entry{name: "nvidia.ko.sig", data: "x"}, entry{name: "gpu-driver-cert.pem", data: "x"}),
		"a link":            tgz(t, entry{name: "nvidia.ko.sig", data: "/etc/passwd", kind: tar.TypeSymlink}),
		"a long signature":  tgz(t, entry{name: "nvidia.ko.sig", data: strings.Repeat("x", 1<<20+1)}),
		"many certificates": tgz(t, entry{name: "nvidia.ko.sig", data: "x"}, entry{name: "gpu-driver-cert.pem", data: strings.Repeat(cert, 17)}),
		"a bomb":            tgz(t, entry{name: "nvidia.ko.sig", data: "x"}, entry{name: "zeros", data: strings.Repeat("\x00", 65<<20)}),
		"too many":          tgz(t, slices.Repeat([]entry{{name: "x", data: ""}}, 1100)...),
		"another container": append([]byte("\x1f\x8b\x08\x00"), 0, 0, 0, 0, 0, 3, 1, 0, 0, 0xff, 0xff),
	} {
		if d, err := modsign.ReadDetached(bytes.NewReader(archive)); !fault.Is(err, fault.CheckFailed) || fault.Hint(err) == "" {
			t.Errorf("%s: ReadDetached = %+v, %v; want check failed and a hint", name, d, err)
		}
	}
}

func TestPassThrough(t *testing.T) {
	t.Parallel()
	g, stranger := newGoogle(t), rsaPair(t)
	good := signed(t, load(t, g.driver), module, "sha256")
	sum := func(data []byte) string {
		h := sha256.Sum256(data)
		return "sha256:" + hex.EncodeToString(h[:])
	}
	changed := append([]byte("x"), good...)
	archive := tgz(t, entry{name: "drivers/", kind: tar.TypeDir}, entry{name: "drivers/nvidia.ko", data: string(good)},
		entry{name: "drivers/nvidia-uvm.ko", data: string(module)}, entry{name: "drivers/nvidia-drm.ko", data: string(changed)},
		entry{name: "firmware/nvidia/1/gsp_tu10x.bin", data: "gsp", ima: "\x03sig"}, entry{name: "firmware/nvidia/1/gsp_ga10x.bin", data: "gsp"})
	archive = append(archive, 0, 0, 0, 0) // nothing may be lost, not even this
	// A signer that is trusted itself, or through its root: that certificate is
	// not in the modules, so only the first is enough here, as in the kernel.
	for name, trusted := range map[string][]*x509.Certificate{"trusted": {g.driver.cert}, "stranger": {stranger.cert}, "nobody": nil} {
		var out bytes.Buffer
		got, err := modsign.PassThrough(&out, bytes.NewReader(archive), trusted)
		if err != nil || !bytes.Equal(out.Bytes(), archive) || got.Digest != sum(archive) || got.Size != int64(len(archive)) {
			t.Fatalf("%s: PassThrough = %+v, %v; want every byte as it was", name, got, err)
		}
		problems := map[string]bool{}
		for i := range got.Files {
			problems[got.Files[i].Name] = got.Files[i].Problem != ""
			got.Files[i].Problem = ""
		}
		want := []modsign.SignedFile{
			{Name: "drivers/nvidia.ko", Digest: sum(good), Signed: true}, {Name: "drivers/nvidia-uvm.ko", Digest: sum(module)},
			{Name: "drivers/nvidia-drm.ko", Digest: sum(changed), Signed: true},
			{Name: "firmware/nvidia/1/gsp_tu10x.bin", Digest: sum([]byte("gsp")), Signed: true},
			{Name: "firmware/nvidia/1/gsp_ga10x.bin", Digest: sum([]byte("gsp"))},
		}
		if diff := cmp.Diff(want, got.Files); diff != "" {
			t.Errorf("%s: PassThrough (-want +got):\n%s", name, diff)
		}
		if problems["drivers/nvidia.ko"] != (name == "stranger") || problems["drivers/nvidia-drm.ko"] != (name != "nobody") {
			t.Errorf("%s: problems = %v", name, problems)
		}
	}
	for name, archive := range map[string][]byte{"no archive": []byte("x"), "no driver": tgz(t, entry{name: "x", data: "y"}), "cut off": archive[:len(archive)/2]} {
		if got, err := modsign.PassThrough(&bytes.Buffer{}, bytes.NewReader(archive), nil); !fault.Is(err, fault.CheckFailed) {
			t.Errorf("%s: PassThrough = %+v, %v; want check failed", name, got, err)
		}
	}
}

func FuzzReadDetached(f *testing.F) {
	g := newGoogle(f)
	f.Add(g.archive)
	f.Add([]byte("\x1f\x8b\x08"))
	path := write(f, filepath.Join(f.TempDir(), "nvidia.ko"), module)
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := modsign.ReadDetached(bytes.NewReader(raw))
		if err != nil {
			return
		}
		// Whatever comes along, only Google's own key makes a signature hold.
		dst := filepath.Join(t.TempDir(), "x")
		if attached, _, err := d.Attach(path, dst, []*x509.Certificate{g.root.cert}); err == nil && attached {
			if _, err := modsign.VerifyFile(dst, []*x509.Certificate{g.driver.cert}); err != nil {
				t.Errorf("Attach took a signature by another key: %v", err)
			}
		}
	})
}
