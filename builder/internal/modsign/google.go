package modsign

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Detached are Google's signatures over the driver of one COS build, from
// extensions/gpu/nvidia-drivers-<VERSION>-signature.tar.gz. They are over the
// bytes that Google compiled and linked; a module that was compiled again has
// other bytes as a rule, and then they are of no use.
type Detached struct {
	// Certificates come with the signatures, and prove by themselves nothing
	// about who made them: the kernel knows its root.
	Certificates []*x509.Certificate
	// Modules are CMS signatures by module file name, such as nvidia.ko.
	Modules map[string][]byte
	// Firmware are IMA signatures by file name, such as gsp_tu10x.bin. They go
	// into the extended attribute security.ima, and not into the file.
	Firmware map[string][]byte
}

// Bounds of both archives.
const (
	maxEntries      = 1024
	maxSignatureTar = 64 << 20
	maxDriverTar    = 8 << 30
)

// ReadDetached reads such an archive, and leaves what it does not know.
func ReadDetached(r io.Reader) (*Detached, error) {
	d := &Detached{Modules: map[string][]byte{}, Firmware: map[string][]byte{}}
	err := eachFile(r, maxSignatureTar, func(h *tar.Header, body io.Reader) error {
		name := path.Base(h.Name)
		file, isSignature := strings.CutSuffix(name, ".sig")
		certificate := strings.HasSuffix(name, ".pem") || strings.HasSuffix(name, ".der")
		if !isSignature && !certificate {
			return nil
		}
		raw, err := io.ReadAll(io.LimitReader(body, maxSignature+1))
		switch {
		case err != nil:
			return err
		case len(raw) > maxSignature:
			return fmt.Errorf("%.100q has more than %d bytes", h.Name, maxSignature)
		case certificate:
			certs, err := parseCertificates(raw)
			if err != nil {
				return fmt.Errorf("%.100q: %w", h.Name, err)
			}
			if d.Certificates = append(d.Certificates, certs...); len(d.Certificates) > maxSent {
				return fmt.Errorf("more than %d certificates", maxSent)
			}
			return nil
		}
		into := d.Firmware
		if strings.HasSuffix(file, ".ko") {
			into = d.Modules
		}
		if into[file] != nil {
			return fmt.Errorf("%.100q is there twice", file)
		}
		into[file] = raw
		return nil
	})
	if err == nil && len(d.Modules) == 0 {
		err = errors.New("no signature of a module")
	}
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read detached signatures: %w", err), "fetch nvidia-drivers-<VERSION>-signature.tar.gz of this COS build again")
	}
	return d, nil
}

// Attach writes the module src with Google's signature to the new file dst, if
// there is one that holds for exactly these bytes. Otherwise nothing is
// written, and why says in a line what was left out. trusted is the kernel's
// root certificate, trusted_key.pem of the COS build; without it a signature
// is held against the certificates that came with it.
func (d *Detached) Attach(src, dst string, trusted []*x509.Certificate) (attached bool, why string, err error) {
	attached, why, err = d.attach(src, dst, trusted)
	if err != nil {
		return false, "", fmt.Errorf("attach Google's signature to %s: %w", src, err)
	}
	return attached, why, nil
}

func (d *Detached) attach(src, dst string, trusted []*x509.Certificate) (bool, string, error) {
	name := path.Base(src)
	signature := d.Modules[name]
	if signature == nil {
		return false, "Google's archive has no signature of " + name, nil
	}
	module, err := readModule(src)
	if err != nil {
		return false, "", err
	}
	if _, own, err := Split(module); err != nil || own != nil {
		return false, "", errors.Join(err, fault.New(fault.CheckFailed, "it is signed already", "attach to the module as it was compiled"))
	}
	if err := d.holds(module, signature, trusted); err != nil {
		return false, fmt.Sprintf("Google's signature of %s is not over these bytes: %v", name, err), nil
	}
	return true, "", writeNew(dst, module, signature)
}

// holds verifies with the certificates at hand. With a root, those that came
// along may only stand between it and the signer.
func (d *Detached) holds(module, signature []byte, trusted []*x509.Certificate) error {
	candidates := d.Certificates
	if len(trusted) > 0 {
		candidates = trusted
		for _, c := range d.Certificates {
			if chains(c, d.Certificates, trusted) {
				candidates = append(candidates[:len(candidates):len(candidates)], c)
			}
		}
	}
	_, err := verify(module, signature, candidates)
	return err
}

// SignedDriver is what an archive of Google's own modules holds.
type SignedDriver struct {
	// Digest and Size are those of the archive.
	Digest string
	Size   int64
	Files  []SignedFile
}

// SignedFile is a module or a firmware image.
type SignedFile struct {
	Name, Digest string
	// Signed says that there is a signature: in the file of a module, in the
	// extended attribute security.ima of firmware.
	Signed bool
	// Problem says why a module's signature does not hold; empty where it does,
	// or where nobody said which certificates to hold it against.
	Problem string
}

// PassThrough copies Google's archive of signed modules,
// nvidia-drivers-<VERSION>.tgz, byte by byte, and says what is in it. Where a
// node takes Google's key only, this is the only driver that it loads, so
// nothing in it may be packed anew. trusted may be empty.
func PassThrough(dst io.Writer, src io.Reader, trusted []*x509.Certificate) (*SignedDriver, error) {
	sum := sha256.New()
	counted := &counter{w: io.MultiWriter(dst, sum)}
	in := io.TeeReader(io.LimitReader(src, maxDriverTar+1), counted)
	d := &SignedDriver{}
	err := eachFile(in, maxDriverTar, func(h *tar.Header, body io.Reader) error {
		f := SignedFile{Name: h.Name}
		var err error
		switch {
		case strings.HasSuffix(h.Name, ".ko"):
			err = f.readModule(body, trusted)
		case strings.HasSuffix(h.Name, ".bin"):
			f.Signed = h.PAXRecords["SCHILY.xattr.security.ima"] != ""
			own := sha256.New()
			_, err = io.Copy(own, body)
			f.Digest = digest(own)
		default:
			return nil
		}
		if err != nil {
			return fmt.Errorf("%.100q: %w", h.Name, err)
		}
		d.Files = append(d.Files, f)
		return nil
	})
	if err == nil { // the padding behind the last entry
		_, err = io.Copy(io.Discard, in)
	}
	d.Digest, d.Size = digest(sum), counted.n
	switch {
	case err == nil && counted.n > maxDriverTar:
		err = fmt.Errorf("more than %d bytes", int64(maxDriverTar))
	case err == nil && len(d.Files) == 0:
		err = errors.New("neither modules nor firmware")
	}
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("copy signed driver: %w", err), "fetch nvidia-drivers-<VERSION>.tgz of this COS build again")
	}
	return d, nil
}

func (f *SignedFile) readModule(body io.Reader, trusted []*x509.Certificate) error {
	module, err := io.ReadAll(io.LimitReader(body, maxModule+1))
	if err != nil {
		return err
	}
	if len(module) > maxModule {
		return fmt.Errorf("more than %d bytes", maxModule)
	}
	sum := sha256.Sum256(module)
	f.Digest = "sha256:" + hex.EncodeToString(sum[:])
	_, signature, err := Split(module)
	f.Signed = err == nil && signature != nil
	if err == nil && f.Signed && len(trusted) > 0 {
		_, err = Verify(module, trusted)
	}
	if err != nil {
		f.Problem = err.Error()
	}
	return nil
}

// eachFile calls do for every regular file of a tar in gzip.
func eachFile(r io.Reader, most int64, do func(h *tar.Header, body io.Reader) error) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	defer z.Close()
	left := &io.LimitedReader{R: z, N: most}
	in := tar.NewReader(left)
	for n := 0; ; n++ {
		h, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			if left.N <= 0 {
				return fmt.Errorf("more than %d bytes unpacked", most)
			}
			return nil
		case err != nil:
			return err
		case n == maxEntries:
			return fmt.Errorf("more than %d entries", maxEntries)
		case h.Typeflag != tar.TypeReg:
			continue
		}
		if err := do(h, in); err != nil {
			return err
		}
	}
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func digest(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }
