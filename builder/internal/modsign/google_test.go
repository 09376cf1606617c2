package modsign_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/smallstep/pkcs7"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/fault"
)

// entry is one file or folder of an archive.
type entry struct {
	name, data string
	kind       byte
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

// google stands for Google: a root certificate that the kernel trusts, and a key for drivers whose certificate the root
// signed.
type google struct {
	root, driver *pair
	archive      []byte
}

// newGoogle makes an archive with the signatures of one module and of the driver's firmware.
func newGoogle(t testing.TB) google {
	t.Helper()
	root := newPair(t, rsaKey(t, 2048), nil, x509.KeyUsageCertSign)
	g := google{root: root, driver: newPair(t, rsaKey(t, 2048), root, x509.KeyUsageDigitalSignature)}
	_, signature, err := modsign.Split(signModule(t, load(t, g.driver), module, "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	cert := string(pemOf(g.driver.cert))
	g.archive = tgz(t,
		entry{name: "./", kind: tar.TypeDir}, entry{name: "./gpu-driver-cert.pem", data: cert},
		entry{name: "./gpu-driver-cert.der", data: string(g.driver.cert.Raw)},
		entry{name: "./nvidia.ko.sig", data: string(signature)}, entry{name: "./gsp_tu10x.bin.sig", data: "\x03\x02ima"},
		entry{name: "./sign-file", data: "\x7fELF"},
	)
	return g
}

func pemOf(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func TestAttach(t *testing.T) {
	t.Parallel()
	g, stranger := newGoogle(t), rsaPair(t)
	_, another, err := modsign.Split(signModule(t, load(t, stranger), module, "sha256"))
	if err != nil {
		t.Fatal(err)
	}
	withCertificate := func(signature []byte) []byte {
		return tgz(t, entry{name: "gpu-driver-cert.pem", data: string(pemOf(g.driver.cert))},
			entry{name: "nvidia.ko.sig", data: string(signature)})
	}
	for _, row := range []struct {
		name, file    string
		archive, root []byte
		module        []byte
		leftOut       string // reason of ErrLeftOut; "" means that Attach returns another error or none
		refused       error
	}{
		{name: "the very bytes, root known", root: pemOf(g.root.cert)},
		{name: "the very bytes, the root itself is the signer", root: g.driver.cert.Raw},
		{name: "the very bytes, root unknown"},
		{name: "the very bytes, another root", root: pemOf(stranger.cert),
			leftOut: "which the kernel's root certificate did not certify"},
		{name: "compiled again", root: pemOf(g.root.cert), module: append(bytes.Clone(module), '!'),
			leftOut: "the signature for module nvidia was made over other bytes"},
		{name: "not signed by Google", file: "nvidia-uvm", leftOut: "the archive has no signature for module nvidia-uvm"},
		{name: "signed by somebody whose certificate is not there", archive: withCertificate(another),
			refused: modsign.ErrUnknownKey},
		{name: "no signature", archive: withCertificate([]byte("x")), refused: modsign.ErrMalformed},
	} {
		if row.archive == nil {
			row.archive = g.archive
		}
		if row.file == "" {
			row.file = "nvidia"
		}
		if row.module == nil {
			row.module = module
		}
		d, err := modsign.ReadDetached(bytes.NewReader(row.archive), row.root)
		if err != nil {
			t.Errorf("%s: ReadDetached = %v", row.name, err)
			continue
		}
		// Whoever signed is known without the module.
		badSigner := row.refused != nil || strings.Contains(row.leftOut, "root certificate")
		if names, err := d.CheckSigners(); fault.Is(err, fault.CheckFailed) != badSigner || !badSigner && err != nil ||
			!slices.Equal(names, []string{"nvidia"}) {
			t.Errorf("%s: CheckSigners = %v, %v; want an error: %t", row.name, names, err, badSigner)
		}
		dst := filepath.Join(t.TempDir(), "out.ko")
		err = d.Attach(dst, row.file, row.module)
		switch {
		case row.leftOut != "":
			if !errors.Is(err, modsign.ErrLeftOut) || !strings.Contains(err.Error(), row.leftOut) {
				t.Errorf("%s: Attach = %v; want it left out: %s", row.name, err, row.leftOut)
			}
		case row.refused != nil:
			if !errors.Is(err, row.refused) || errors.Is(err, modsign.ErrLeftOut) || !fault.Is(err, fault.CheckFailed) ||
				!strings.Contains(fault.Hint(err), "--google-signatures") {
				t.Errorf("%s: Attach = %v, hint %q; want %v and what to do", row.name, err, fault.Hint(err), row.refused)
			}
		case err != nil:
			t.Errorf("%s: Attach = %v", row.name, err)
		default:
			if _, err := modsign.VerifyFile(dst, []*x509.Certificate{g.driver.cert}); err != nil {
				t.Errorf("%s: VerifyFile = %v", row.name, err)
			}
		}
		if _, serr := os.Stat(dst); err != nil && !errors.Is(serr, os.ErrNotExist) {
			t.Errorf("%s: Attach left a file: %v", row.name, serr)
		}
	}
	d, err := modsign.ReadDetached(bytes.NewReader(g.archive), nil)
	if err != nil {
		t.Fatal(err)
	}
	own := signModule(t, load(t, stranger), module, "sha256")
	if err := d.Attach(filepath.Join(t.TempDir(), "x"), "nvidia", own); !fault.Is(err, fault.CheckFailed) ||
		errors.Is(err, modsign.ErrLeftOut) {
		t.Errorf("Attach(signed already) = %v; want check failed", err)
	}
}

func TestReadDetachedRefuses(t *testing.T) {
	t.Parallel()
	cert := string(pemOf(rsaPair(t).cert))
	for name, archive := range map[string][]byte{
		"no archive":       []byte("hello"),
		"cut off":          tgz(t, entry{name: "nvidia.ko.sig", data: "x"})[:40],
		"no signatures":    tgz(t, entry{name: "README", data: "x"}),
		"firmware only":    tgz(t, entry{name: "gsp.bin.sig", data: "x"}),
		"twice":            tgz(t, entry{name: "nvidia.ko.sig", data: "x"}, entry{name: "./a/nvidia.ko.sig", data: "y"}),
		"no certificate":   tgz(t, entry{name: "nvidia.ko.sig", data: "x"}, entry{name: "gpu-driver-cert.pem", data: "x"}),
		"a link":           tgz(t, entry{name: "nvidia.ko.sig", data: "/etc/passwd", kind: tar.TypeSymlink}),
		"a way out":        tgz(t, entry{name: "../nvidia.ko.sig", data: "x"}),
		"a path of ours":   tgz(t, entry{name: "/etc/nvidia.ko.sig", data: "x"}),
		"a long signature": tgz(t, entry{name: "nvidia.ko.sig", data: strings.Repeat("x", 1<<20+1)}),
		"many certificates": tgz(t, entry{name: "nvidia.ko.sig", data: "x"},
			entry{name: "gpu-driver-cert.pem", data: strings.Repeat(cert, 17)}),
		"a bomb": tgz(t, entry{name: "nvidia.ko.sig", data: "x"},
			entry{name: "zeros", data: strings.Repeat("\x00", 65<<20)}),
		"too many":          tgz(t, slices.Repeat([]entry{{name: "x", data: ""}}, 1100)...),
		"another container": append([]byte("\x1f\x8b\x08\x00"), 0, 0, 0, 0, 0, 3, 1, 0, 0, 0xff, 0xff),
	} {
		if d, err := modsign.ReadDetached(bytes.NewReader(archive), nil); !fault.Is(err, fault.CheckFailed) ||
			fault.Hint(err) == "" {
			t.Errorf("%s: ReadDetached = %+v, %v; want check failed and a hint", name, d, err)
		}
	}
	good := tgz(t, entry{name: "nvidia.ko.sig", data: "x"})
	if _, err := modsign.ReadDetached(bytes.NewReader(good), []byte("no certificate")); !fault.Is(err,
		fault.CheckFailed) || !strings.Contains(err.Error(), "trusted_key.pem") {
		t.Errorf("ReadDetached(a root that is no certificate) = %v; want check failed", err)
	}
}

// withCertificate returns the module with a signature by p that contains p's certificate.
func withCertificate(t *testing.T, p *pair) []byte {
	t.Helper()
	sd, err := pkcs7.NewSignedData(module)
	if err != nil {
		t.Fatal(err)
	}
	sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	sd.SetEncryptionAlgorithm(pkcs7.OIDEncryptionAlgorithmRSA)
	if err := sd.SignWithoutAttr(p.cert, p.key, pkcs7.SignerInfoConfig{}); err != nil {
		t.Fatal(err)
	}
	sd.Detach()
	signature, err := sd.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return appendSignature(module, signature)
}

func TestUnpackSigned(t *testing.T) {
	t.Parallel()
	g, stranger := newGoogle(t), rsaPair(t)
	good := signModule(t, load(t, g.driver), module, "sha256")
	changed := append([]byte("x"), good...)
	withCertificate := withCertificate(t, g.driver)
	nvidia := entry{name: "drivers/nvidia.ko", data: string(good)}
	rest := []entry{{name: "drivers/", kind: tar.TypeDir}, {name: "firmware/nvidia/1/gsp_tu10x.bin", data: "gsp"},
		{name: "firmware/gsp.bin", data: "nvidia/1/gsp_tu10x.bin", kind: tar.TypeSymlink}}
	for _, row := range []struct {
		name    string
		entries []entry
		trusted *x509.Certificate
		want    map[string]string // nil means that the archive is refused
		cause   error
	}{
		{"the signer is trusted", append(rest, nvidia, entry{name: "drivers/nvidia-uvm.ko", data: string(good)}),
			g.driver.cert, map[string]string{"nvidia": string(good), "nvidia-uvm": string(good)}, nil},
		{"the signer's certificate comes along, its root is trusted",
			[]entry{{name: "nvidia.ko", data: string(withCertificate)}}, g.root.cert,
			map[string]string{"nvidia": string(withCertificate)}, nil},
		{"nobody knows the signer", []entry{nvidia}, stranger.cert, nil, modsign.ErrUnknownKey},
		{"one is not signed", []entry{nvidia, {name: "drivers/nvidia-uvm.ko", data: string(module)}}, g.driver.cert, nil,
			modsign.ErrUnsigned},
		{"one was changed", []entry{nvidia, {name: "drivers/nvidia-uvm.ko", data: string(changed)}}, g.driver.cert, nil,
			modsign.ErrChanged},
		{"one is there twice", []entry{nvidia, {name: "nvidia.ko", data: string(good)}}, g.driver.cert, nil, nil},
		{"a way out", []entry{{name: "../nvidia.ko", data: string(good)}}, g.driver.cert, nil, nil},
		{"no modules", rest, g.driver.cert, nil, nil},
	} {
		dir := t.TempDir()
		names, err := modsign.UnpackSigned(bytes.NewReader(tgz(t, row.entries...)), dir, []*x509.Certificate{row.trusted})
		if row.want == nil {
			if !fault.Is(err, fault.CheckFailed) || row.cause != nil && !errors.Is(err, row.cause) ||
				!strings.Contains(fault.Hint(err), "--google-modules") {
				t.Errorf("%s: UnpackSigned = %q, %v, hint %q; want check failed, %v", row.name, names, err, fault.Hint(err),
					row.cause)
			}
			continue
		}
		got := map[string]string{}
		for _, name := range names {
			data, rerr := os.ReadFile(filepath.Join(dir, name+".ko"))
			err = errors.Join(err, rerr)
			got[name] = string(data)
		}
		if diff := cmp.Diff(row.want, got); err != nil || diff != "" {
			t.Errorf("%s: UnpackSigned: %v; modules (-want +got):\n%s", row.name, err, diff)
		}
	}
}

func FuzzUnpackSigned(f *testing.F) {
	g := newGoogle(f)
	f.Add(tgz(f, entry{name: "drivers/nvidia.ko", data: string(signModule(f, load(f, g.driver), module, "sha256"))}))
	f.Add([]byte("\x1f\x8b\x08"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		names, err := modsign.UnpackSigned(bytes.NewReader(raw), dir, []*x509.Certificate{g.driver.cert})
		for _, name := range names {
			if _, verr := modsign.VerifyFile(filepath.Join(dir, name+".ko"), []*x509.Certificate{g.driver.cert}); err != nil ||
				verr != nil {
				t.Errorf("UnpackSigned wrote %q, %v; it verifies: %v", name, err, verr)
			}
		}
	})
}

func FuzzReadDetached(f *testing.F) {
	g := newGoogle(f)
	f.Add(g.archive)
	f.Add([]byte("\x1f\x8b\x08"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := modsign.ReadDetached(bytes.NewReader(raw), g.root.cert.Raw)
		if err != nil {
			return
		}
		// The archive may contain anything. Only a signature by Google's own key may be valid.
		dst := filepath.Join(t.TempDir(), "x")
		if err := d.Attach(dst, "nvidia", module); err == nil {
			if _, err := modsign.VerifyFile(dst, []*x509.Certificate{g.driver.cert}); err != nil {
				t.Errorf("Attach took a signature by another key: %v", err)
			}
		}
	})
}
