package modsign_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature/kms/fake"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// pair is a key and its certificate, both in memory and in files.
type pair struct {
	key           crypto.Signer
	cert          *x509.Certificate
	keyPath, path string
}

// newPair makes a certificate for a key. The key of by signs the certificate. If by is nil, the key signs it itself.
func newPair(t testing.TB, key crypto.Signer, by *pair, usage x509.KeyUsage) *pair {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "modules " + serial.String()}, KeyUsage: usage,
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0), // the kernel does not check validity periods
	}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	p := &pair{key: key, keyPath: filepath.Join(t.TempDir(), "key"), path: filepath.Join(t.TempDir(), "crt")}
	if p.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, p.keyPath, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	write(t, p.path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return p
}

func rsaPair(t testing.TB) *pair {
	t.Helper()
	return newPair(t, rsaKey(t, 2048), nil, x509.KeyUsageDigitalSignature)
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t testing.TB, p *pair) *modsign.Signer {
	t.Helper()
	s, err := modsign.Load(t.Context(), p.keyPath, p.path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// signModule signs a module and returns the signed module.
func signModule(t testing.TB, s *modsign.Signer, module []byte, hash string) []byte {
	t.Helper()
	dst := filepath.Join(t.TempDir(), "signed.ko")
	if err := s.Sign(t.Context(), write(t, filepath.Join(t.TempDir(), "x.ko"), module), dst, hash); err != nil {
		t.Fatal(err)
	}
	out, err := os.ReadFile(dst)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var module = []byte("\x7fELF not much of a module")

func TestSign(t *testing.T) {
	t.Parallel()
	p, other := rsaPair(t), rsaPair(t)
	s := load(t, p)
	for _, hash := range []string{"sha256", "sha384", "sha512"} {
		one, two := signModule(t, s, module, hash), signModule(t, load(t, p), module, hash)
		if !bytes.Equal(one, two) {
			t.Errorf("%s: two signatures of the same module differ", hash)
		}
		body, _, err := modsign.Split(one)
		if err != nil || !bytes.Equal(body, module) {
			t.Errorf("%s: Split = %q, %v; want the module as it was", hash, body, err)
		}
		sig, err := modsign.Verify(one, []*x509.Certificate{other.cert, p.cert})
		if err != nil || !sig.Signer.Equal(p.cert) {
			t.Errorf("%s: Verify = %v, %v", hash, sig, err)
		}
		if _, err := modsign.Verify(one, []*x509.Certificate{other.cert}); !errors.Is(err, modsign.ErrUnknownKey) {
			t.Errorf("%s: Verify(another key) = %v; want an unknown key", hash, err)
		}
		one[3] ^= 1
		if _, err := modsign.Verify(one, []*x509.Certificate{p.cert}); !errors.Is(err, modsign.ErrChanged) {
			t.Errorf("%s: Verify(changed module) = %v; want changed", hash, err)
		}
	}
	if modsign.Fingerprint(p.cert) != s.Identity() || s.Identity() == modsign.Fingerprint(other.cert) {
		t.Errorf("Identity = %s", s.Identity())
	}
	if _, err := modsign.Verify(module, []*x509.Certificate{p.cert}); !errors.Is(err, modsign.ErrUnsigned) ||
		fault.Hint(err) == "" {
		t.Errorf("Verify(unsigned) = %v; want unsigned, with a hint", err)
	}
}

func TestSignReplacesNothing(t *testing.T) {
	t.Parallel()
	p := rsaPair(t)
	s := load(t, p)
	src := write(t, filepath.Join(t.TempDir(), "x"), append([]byte("nvidia"), module...))
	dst := filepath.Join(t.TempDir(), "nvidia.ko")
	if err := s.Sign(t.Context(), src, dst, "sha256"); err != nil {
		t.Fatal(err)
	}
	if _, err := modsign.VerifyFile(dst, []*x509.Certificate{p.cert}); err != nil {
		t.Errorf("VerifyFile = %v", err)
	}
	if err := s.Sign(t.Context(), src, dst, "sha256"); err == nil {
		t.Error("Sign replaced a file")
	}
	if s.Key("sha256") == s.Key("sha512") || s.Key("sha256") == load(t, rsaPair(t)).Key("sha256") {
		t.Errorf("Key = %s for another hash or certificate too", s.Key("sha256"))
	}
}

func TestSignRefuses(t *testing.T) {
	t.Parallel()
	p := rsaPair(t)
	s := load(t, p)
	src := write(t, filepath.Join(t.TempDir(), "x.ko"), module)
	dst := filepath.Join(t.TempDir(), "y.ko")
	for _, hash := range []string{"", "sha1", "sha3-256"} {
		if err := s.Sign(t.Context(), src, dst, hash); !fault.Is(err, fault.Unsupported) {
			t.Errorf("Sign with hash %q = %v; want unsupported", hash, err)
		}
	}
	again := write(t, filepath.Join(t.TempDir(), "x.ko"), signModule(t, s, module, "sha256"))
	if err := s.Sign(t.Context(), again, dst, "sha256"); !fault.Is(err, fault.CheckFailed) {
		t.Errorf("Sign(signed already) = %v; want check failed", err)
	}
	if _, err := os.Stat(dst); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused signature left a file: %v", err)
	}
	if err := s.Sign(t.Context(), src, src, "sha256"); err == nil {
		t.Error("Sign replaced a file")
	}
	if got, err := os.ReadFile(src); err != nil || !bytes.Equal(got, module) {
		t.Errorf("Sign changed its input: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("told to stop"))
	if err := s.Sign(ctx, src, dst, "sha256"); err == nil || !strings.Contains(err.Error(), "told to stop") {
		t.Errorf("Sign(cancelled) = %v; want the cause", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	t.Parallel()
	p, other := rsaPair(t), rsaPair(t)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec := newPair(t, p256, nil, x509.KeyUsageDigitalSignature)
	odd := newPair(t, rsaKey(t, 2560), nil, x509.KeyUsageDigitalSignature)
	noSign := newPair(t, p.key, nil, x509.KeyUsageKeyEncipherment)
	text, err := os.ReadFile(p.path)
	if err != nil {
		t.Fatal(err)
	}
	two := write(t, filepath.Join(t.TempDir(), "crt"), append(text, text...))
	none := filepath.Join(t.TempDir(), "none")
	for name, row := range map[string]struct{ key, cert, text string }{
		"ECDSA":                     {ec.keyPath, ec.path, "whose signatures are the same each time"},
		"odd length":                {odd.keyPath, odd.path, "2560 bits"},
		"another key's certificate": {p.keyPath, other.path, "does not belong to key"},
		"not for signatures":        {noSign.keyPath, noSign.path, "not for signatures"},
		"two certificates":          {p.keyPath, two, "2 certificates"},
		"no certificate":            {p.keyPath, p.keyPath, "PRIVATE KEY"},
		"no file":                   {p.keyPath, none, "none"},
		"no key":                    {none, p.path, "none"},
		"not PEM": {p.keyPath, write(t, filepath.Join(t.TempDir(), "crt"), []byte("hello")),
			"read certificate"},
	} {
		_, err := modsign.Load(t.Context(), row.key, row.cert)
		if !fault.Is(err, fault.Usage) || fault.Hint(err) == "" || !strings.Contains(err.Error(), row.text) {
			t.Errorf("%s: Load = %v, hint %q; want usage, %q and a hint", name, err, fault.Hint(err), row.text)
		}
	}
}

// TestKMS signs with a key in a key management service, through Sigstore's KMS interface.
func TestKMS(t *testing.T) {
	t.Parallel()
	p := rsaPair(t)
	ctx := context.WithValue(t.Context(), fake.KmsCtxKey{}, p.key)
	s, err := modsign.Load(ctx, "fakekms://key", p.path)
	if err != nil {
		t.Fatal(err)
	}
	got, want := signModule(t, s, module, "sha256"), signModule(t, load(t, p), module, "sha256")
	if !bytes.Equal(got, want) {
		t.Error("a key in a KMS and the same key in a file sign differently")
	}
}

// TestTrailer checks the trailer that follows a signature. The first example comes from the tests of COS's own
// installer.
func TestTrailer(t *testing.T) {
	t.Parallel()
	vector, err := hex.DecodeString("6D6F64756C65" + "7369676E6174757265" + "000002000000000000000009" +
		"7E4D6F64756C65207369676E617475726520617070656E6465647E0A")
	if err != nil {
		t.Fatal(err)
	}
	body, signature, err := modsign.Split(vector)
	if err != nil || string(body) != "module" || string(signature) != "signature" {
		t.Errorf("Split = %q, %q, %v; want module and signature", body, signature, err)
	}
	got := signModule(t, load(t, rsaPair(t)), module, "sha256")
	_, signature, err = modsign.Split(got)
	if err != nil {
		t.Fatal(err)
	}
	tail := got[len(module)+len(signature):]
	if want := vector[15:]; !bytes.Equal(tail[:10], want[:10]) || !bytes.Equal(tail[12:], want[12:]) ||
		int(tail[10])<<8+int(tail[11]) != len(signature) {
		t.Errorf("trailer = %x; want %x with a length of %d", tail, want, len(signature))
	}
	for name, spoil := range map[string]func([]byte){
		"algorithm":   func(b []byte) { b[0] = 1 },
		"hash":        func(b []byte) { b[1] = 4 },
		"kind":        func(b []byte) { b[2] = 1 },
		"signer":      func(b []byte) { b[3] = 1 },
		"key id":      func(b []byte) { b[4] = 1 },
		"padding":     func(b []byte) { b[5] = 1 },
		"no length":   func(b []byte) { copy(b[8:], "\x00\x00\x00\x00") },
		"long length": func(b []byte) { copy(b[8:], "\xff\xff\xff\xff") },
	} {
		bad := bytes.Clone(got)
		spoil(bad[len(bad)-len(tail):])
		if _, _, err := modsign.Split(bad); !errors.Is(err, modsign.ErrMalformed) || !fault.Is(err, fault.CheckFailed) {
			t.Errorf("%s: Split = %v; want malformed", name, err)
		}
	}
}

// TestOpenSSL checks both directions: openssl must verify signatures of this package, and Verify must judge signatures
// of openssl as the kernel does.
func TestOpenSSL(t *testing.T) {
	t.Parallel()
	openssl := installed.Program(t, "openssl")
	run := func(args ...string) error {
		out, err := exec.CommandContext(t.Context(), openssl, args...).CombinedOutput()
		if err != nil {
			t.Logf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return err
	}
	p, other := rsaPair(t), rsaPair(t)
	dir := t.TempDir()
	src := write(t, filepath.Join(dir, "x.ko"), module)
	for _, hash := range []string{"sha256", "sha512"} {
		_, signature, err := modsign.Split(signModule(t, load(t, p), module, hash))
		if err != nil {
			t.Fatal(err)
		}
		sig := write(t, filepath.Join(dir, "x.p7s"), signature)
		verify := []string{"cms", "-verify", "-binary", "-inform", "DER", "-in", sig, "-content", src, "-noverify", "-out",
			os.DevNull, "-certfile"}
		if err := run(append(verify, p.path)...); err != nil {
			t.Errorf("%s: openssl cms -verify = %v", hash, err)
		}
		if err := run(append(verify, other.path)...); err == nil {
			t.Errorf("%s: openssl cms -verify took another certificate", hash)
		}
	}
	for name, row := range map[string]struct {
		args []string
		is   error
	}{
		"as sign-file":             {[]string{"-nocerts", "-noattr"}, nil},
		"with its certificate":     {[]string{"-noattr"}, nil},
		"with signed attributes":   {[]string{"-nocerts"}, modsign.ErrMalformed},
		"with the module in it":    {[]string{"-nocerts", "-noattr", "-nodetach"}, modsign.ErrMalformed},
		"signer by key identifier": {[]string{"-nocerts", "-noattr", "-keyid"}, modsign.ErrMalformed},
	} {
		out := filepath.Join(t.TempDir(), "out.p7s")
		args := append([]string{"cms", "-sign", "-binary", "-in", src, "-signer", p.path, "-inkey", p.keyPath, "-md",
			"sha256", "-outform", "DER", "-out", out}, row.args...)
		if err := run(args...); err != nil {
			if strings.Contains(name, "identifier") {
				continue // the certificate has no key identifier, so openssl cannot name the signer by it
			}
			t.Fatal(err)
		}
		signature, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		_, err = modsign.Verify(appendSignature(module, signature), []*x509.Certificate{p.cert})
		if row.is == nil && err != nil || row.is != nil && !errors.Is(err, row.is) {
			t.Errorf("%s: Verify = %v; want %v", name, err, row.is)
		}
	}
}

// appendSignature appends a signature to a module in the kernel's format.
func appendSignature(module, signature []byte) []byte {
	out := append(bytes.Clone(module), signature...)
	out = append(out, 0, 0, 2, 0, 0, 0, 0, 0, byte(len(signature)>>24), byte(len(signature)>>16), byte(len(signature)>>8),
		byte(len(signature)))
	return append(out, "~Module signature appended~\n"...)
}

// TestSignFile compares the signed module with the output of the kernel's program sign-file, byte by byte.
func TestSignFile(t *testing.T) {
	t.Parallel()
	signFile := signFile(t)
	p := rsaPair(t)
	for _, hash := range []string{"sha256", "sha384", "sha512"} {
		src, want := write(t, filepath.Join(t.TempDir(), "x.ko"), module), filepath.Join(t.TempDir(), "want.ko")
		if out, err := exec.CommandContext(t.Context(), signFile, hash, p.keyPath, p.path, src,
			want).CombinedOutput(); err != nil {
			t.Fatalf("sign-file: %v\n%s", err, out)
		}
		theirs, err := os.ReadFile(want)
		if err != nil {
			t.Fatal(err)
		}
		if ours := signModule(t, load(t, p), module, hash); !bytes.Equal(ours, theirs) {
			t.Errorf("%s: Sign = %x; sign-file makes %x", hash, ours, theirs)
		}
	}
}

// signFile extracts scripts/sign-file from Debian's linux-kbuild package.
func signFile(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("PREBAKE_MIRROR_CACHE")
	if state := os.Getenv("PREBAKE_STATE"); cache == "" && state != "" {
		cache = filepath.Join(state, "packages")
	}
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(dir, "prebake", "packages")
	}
	debs, err := filepath.Glob(filepath.Join(cache, "debian/packages/linux-kbuild-*.deb"))
	if err != nil {
		t.Fatal(err)
	}
	if len(debs) == 0 {
		t.Skipf("no linux-kbuild package under %s: make demo fetches it", cache)
	}
	dir := t.TempDir()
	out, err := exec.CommandContext(t.Context(), "dpkg-deb", "-x", debs[0], dir).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("dpkg-deb is missing: the test unpacks a Debian package with it")
	}
	if err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	found, err := filepath.Glob(filepath.Join(dir, "usr/lib/linux-kbuild-*/scripts/sign-file"))
	if err != nil || len(found) != 1 {
		t.Fatalf("sign-file in %s: %v, %v", debs[0], found, err)
	}
	return found[0]
}

func TestReadConfig(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		text string
		want modsign.Config
		ok   bool
	}{
		"COS": {"CONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not " +
			"set\nCONFIG_MODULE_SIG_HASH=\"sha256\"\n", modsign.Config{Checks: true, Hash: "sha256"}, true},
		"forced": {
			"CONFIG_MODULE_SIG_FORCE=y\nCONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_HASH=\"sha512\"\n",
			modsign.Config{Checks: true, Forced: true, Hash: "sha512"}, true},
		"locked down": {
			"CONFIG_MODULE_SIG=y\nCONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y\nCONFIG_MODULE_SIG_HASH=\"sha256\"\n",
			modsign.Config{Checks: true, Forced: true, Hash: "sha256"}, true},
		"locked down, but checks nothing": {"CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y\n", modsign.Config{}, true},
		"none":                            {"# CONFIG_MODULE_SIG is not set\n", modsign.Config{}, true},
		"broken":                          {"CONFIG_MODULE_SIG=y\n", modsign.Config{}, false},
		"long":                            {strings.Repeat("x", 1<<20), modsign.Config{}, false},
	} {
		got, err := modsign.ReadConfig(strings.NewReader(row.text))
		if got != row.want || row.ok != (err == nil) {
			t.Errorf("%s: ReadConfig = %+v, %v; want %+v", name, got, err, row.want)
		}
	}
}

// FuzzVerify checks that Verify does not crash, and that it accepts no module that the test's key did not sign.
func FuzzVerify(f *testing.F) {
	p := rsaPair(f)
	good := signModule(f, load(f, p), module, "sha256")
	f.Add(good)
	f.Add(module)
	f.Add(appendSignature(module, []byte("signature")))
	f.Add(appendSignature(module, []byte("\x30\x80\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02\xa0\x80\x00\x00\x00\x00")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := modsign.Verify(raw, []*x509.Certificate{p.cert}); err != nil {
			if !fault.Is(err, fault.CheckFailed) {
				t.Errorf("Verify = %v of kind %v; want check failed", err, fault.Of(err))
			}
			return
		}
		if !bytes.HasPrefix(raw, module) {
			t.Errorf("Verify(%x) held; nobody signed that", raw)
		}
	})
}
