package modsign

import (
	"archive/tar"
	"compress/gzip"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// AttachRecipe is the version of the files that [Detached.Attach] writes, and part of their cache keys. Raise it if
// Attach would write another file for the same module and signature.
const AttachRecipe = "attach-1"

// ErrLeftOut means that Google's signatures cannot be used for a driver. A build may then publish the modules without
// them.
var ErrLeftOut = errors.New("signatures by Google cannot be used")

// Detached has Google's signatures for the driver of one COS build. They come from an archive in the COS bucket, such
// as extensions/gpu/nvidia-drivers-<VERSION>-signature.tar.gz. Google signed modules that Google compiled itself.
type Detached struct {
	certificates, roots []*x509.Certificate
	modules             map[string][]byte // signatures by the name of the module, without .ko
}

// Limits of an archive: the number of entries, and the unpacked bytes.
const (
	maxEntries      = 1024
	maxSignatureTar = 64 << 20
	maxDriverTar    = 8 << 30
)

// ReadDetached reads a signature archive, a gzip-compressed tar: the signatures *.ko.sig and the certificates *.pem and
// *.der. root is the content of trusted_key.pem. If root is nil, only the archive's certificates are used.
func ReadDetached(archive io.Reader, root []byte) (*Detached, error) {
	d := &Detached{modules: map[string][]byte{}}
	err := eachFile(archive, maxSignatureTar, d.add)
	if err == nil && len(d.modules) == 0 {
		err = errors.New("the archive has no signature of any module")
	}
	if err == nil && root != nil {
		if d.roots, err = ParseCertificates(root); err != nil {
			err = fmt.Errorf("read trusted_key.pem: %w", err)
		}
	}
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read Google's signatures: %w", err),
			"replace the archive in the bucket, or build with --google-signatures off")
	}
	return d, nil
}

func (d *Detached) add(h *tar.Header, body io.Reader) error {
	name := path.Base(h.Name)
	module, signature := strings.CutSuffix(name, ".ko.sig")
	certificate := strings.HasSuffix(name, ".pem") || strings.HasSuffix(name, ".der")
	if !signature && !certificate {
		return nil
	}
	raw, err := io.ReadAll(io.LimitReader(body, maxSignature+1))
	switch {
	case err != nil:
		return err
	case len(raw) > maxSignature:
		return fmt.Errorf("the file %.100q has more than %d bytes", h.Name, maxSignature)
	case certificate:
		certs, err := ParseCertificates(raw)
		if err != nil {
			return fmt.Errorf("check the file %.100q: %w", h.Name, err)
		}
		if d.certificates = append(d.certificates, certs...); len(d.certificates) > maxSent {
			return fmt.Errorf("the archive has more than %d certificates", maxSent)
		}
		return nil
	case d.modules[module] != nil:
		return fmt.Errorf("the file %.100q is in the archive twice", name)
	}
	d.modules[module] = raw
	return nil
}

// Attach writes an unsigned module, followed by Google's signature of the module with this name (without .ko), to the
// new file dst. The error wraps [ErrLeftOut] if
//
//   - the archive has no signature for the module,
//   - the signature was made over other bytes, or
//   - the kernel's root certificate did not certify the signer.
//
// The error does not wrap ErrLeftOut if the archive is damaged: the signature is malformed, or its signer has no known
// certificate.
func (d *Detached) Attach(dst, name string, module []byte) error {
	signature := d.modules[name]
	if signature == nil {
		return fault.Errorf(fault.CheckFailed, "%w: the archive has no signature for module %s", ErrLeftOut, name)
	}
	switch _, own, err := Split(module); {
	case err != nil:
		return fmt.Errorf("attach Google's signature to module %s: %w", name, err)
	case own != nil:
		return fault.New(fault.CheckFailed, "attach Google's signature to module "+name+": the module is signed already",
			"attach the signature to the unsigned module that the compiler made")
	}
	s, err := verify(module, signature, slices.Concat(d.certificates, d.roots))
	switch {
	case errors.Is(err, ErrChanged):
		return fault.Errorf(fault.CheckFailed, "%w: the signature for module %s was made over other bytes", ErrLeftOut, name)
	case err != nil:
		return fault.Wrap(fault.CheckFailed, fmt.Errorf("verify Google's signature of %s: %w", name, err),
			"replace the archive in the bucket, or build with --google-signatures off")
	case !d.certified(s.Signer):
		return fault.Errorf(fault.CheckFailed,
			"%w: the signature for module %s is by %.200q, which the kernel's root certificate did not certify",
			ErrLeftOut, name, s.Signer.Subject.String())
	}
	return writeNew(dst, module, signature, trailer(signature))
}

// certified reports whether a signer's certificate is a root certificate of the kernel, or was certified by one. If no
// root certificate is known, certified returns true.
func (d *Detached) certified(signer *x509.Certificate) bool {
	return len(d.roots) == 0 || slices.ContainsFunc(d.roots, signer.Equal) ||
		isCertified(signer, d.certificates, d.roots)
}

// CheckSigners checks every signature without its module, and returns the names of the modules, without .ko. It returns
// an error if a signature is malformed, or if none of its signers has a known certificate that the kernel's root
// certificate certified. Only [Detached.Attach] can tell whether a signature fits a module.
func (d *Detached) CheckSigners() ([]string, error) {
	names := slices.Sorted(maps.Keys(d.modules))
	known := slices.Concat(d.certificates, d.roots)
	for _, name := range names {
		p7, err := parse(d.modules[name])
		if err != nil {
			return names, fault.Wrap(fault.CheckFailed, fmt.Errorf("check Google's signature of %s: %w", name, err),
				"replace the archive in the bucket, or build with --google-signatures off")
		}
		good := false
		for _, s := range p7.Signers {
			cert := trustedSigner(s.IssuerAndSerialNumber.IssuerName.FullBytes, s.IssuerAndSerialNumber.SerialNumber.String(),
				p7.Certificates, known)
			good = good || cert != nil && d.certified(cert)
		}
		if !good {
			return names, fault.New(fault.CheckFailed,
				"check Google's signature of "+name+": neither the archive nor trusted_key.pem has a certificate for the signer",
				"replace the archive or trusted_key.pem in the bucket, or build with --google-signatures off")
		}
	}
	return names, nil
}

// UnpackRecipe is the version of the files that [UnpackSigned] writes, and part of their cache keys.
const UnpackRecipe = "unpack-signed-1"

// UnpackSigned writes the modules of nvidia-drivers-<VERSION>.tgz into a folder, and returns their names without .ko.
// Each module must have a valid signature by a trusted certificate. The modules stay unchanged, because a kernel that
// trusts only Google's key loads only these bytes.
func UnpackSigned(archive io.Reader, dir string, trusted []*x509.Certificate) ([]string, error) {
	var names []string
	err := eachFile(archive, maxDriverTar, func(h *tar.Header, body io.Reader) error {
		name, isModule := strings.CutSuffix(path.Base(h.Name), ".ko")
		if !isModule {
			return nil
		}
		if slices.Contains(names, name) {
			return fmt.Errorf("the file %.100q is in the archive twice", name)
		}
		module, err := readBounded(body)
		if err != nil {
			return fmt.Errorf("check the file %.100q: %w", h.Name, err)
		}
		if _, err := Verify(module, trusted); err != nil {
			return fmt.Errorf("check the file %.100q: %w", h.Name, err)
		}
		names = append(names, name)
		return writeNew(filepath.Join(dir, name+".ko"), module)
	})
	if err == nil && len(names) == 0 {
		err = errors.New("the archive has no modules")
	}
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("unpack Google's modules: %w", err),
			"check which certificate the kernel was built with, and give it with --module-cert; if the archive in the bucket "+
				"is damaged, replace it; or build without --google-modules")
	}
	return names, nil
}

// eachFile passes every regular file of a gzip-compressed tar to the callback. More than maxEntries entries, or more
// unpacked bytes than the limit, are an error.
func eachFile(r io.Reader, limit int64, do func(h *tar.Header, body io.Reader) error) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	defer z.Close()
	left := &io.LimitedReader{R: z, N: limit}
	in := tar.NewReader(left)
	for n := 0; ; n++ {
		h, err := in.Next()
		switch {
		case errors.Is(err, io.EOF):
			if left.N <= 0 {
				return fmt.Errorf("the archive unpacks to more than %d bytes", limit)
			}
			return nil
		case err != nil:
			return err
		case n == maxEntries:
			return fmt.Errorf("the archive has more than %d entries", maxEntries)
		case h.Typeflag != tar.TypeReg: // links and folders are ignored
			continue
		case !filepath.IsLocal(h.Name):
			return fmt.Errorf("the file name %.100q leads out of the archive", h.Name)
		}
		if err := do(h, in); err != nil {
			return err
		}
	}
}
