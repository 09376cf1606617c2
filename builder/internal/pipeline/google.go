package pipeline

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// GoogleSignatures decides what a build does with the module signatures that Google ships with a COS build. A module
// with Google's signature has no stamp, the ELF note with the kernel's ABI fingerprint, because Google signed the bytes
// without it.
type GoogleSignatures string

// The modes of GoogleSignatures. With Config.ModuleKey, a build ignores Google's signatures.
const (
	// GoogleAuto attaches Google's signatures if all of them fit the compiled modules.
	GoogleAuto GoogleSignatures = "auto"
	// GoogleRequire fails the build if a signature is missing or does not fit.
	GoogleRequire GoogleSignatures = "require"
	// GoogleOff ignores Google's signatures.
	GoogleOff GoogleSignatures = "off"
)

// googleSignatures has Google's signatures for the COS build and the driver of this run.
type googleSignatures struct {
	*modsign.Detached
	materials []cossrc.Material // the signature archive comes first
}

// Signing describes which signatures the modules get for the kernel. The first result is a text with all settings that
// decide this. Failures are stored under this text, so a stored failure does not stop a build with other settings.
//
// The second result is a function that returns the names of the objects in the kernel bucket with the signatures or the
// signed modules. It is nil if the build uses no such objects.
func (c Config) Signing() (settings string, objects func(k target.Kernel, version string) []string) {
	c = c.withDefaults(Request{})
	switch {
	case c.GoogleModules:
		objects = func(k target.Kernel, version string) []string {
			return []string{cosbucket.SignedDriverName(k, version)}
		}
	case c.ModuleKey == "" && c.GoogleSignatures != GoogleOff:
		objects = cosbucket.SignatureNames
	}
	return fmt.Sprintf("module key %q, certificate %q, Google's signatures %s, Google's modules %t", c.ModuleKey,
		c.ModuleCert, c.GoogleSignatures, c.GoogleModules), objects
}

// fetchSignatures fetches Google's signatures. It returns nil if this build uses none. It also returns nil if the
// bucket has none, except in the mode GoogleRequire, where this is an error.
func (r *run) fetchSignatures(ctx context.Context, kernels *cosbucket.Bucket, in *inputs) (*googleSignatures, error) {
	if r.cfg.ModuleKey != "" || r.cfg.GoogleModules || r.cfg.GoogleSignatures == GoogleOff {
		return nil, nil
	}
	s, err := cossrc.FetchSignatures(ctx, kernels, r.cfg.Cache, in.kernel.Kernel, in.driver.Version)
	if err != nil {
		return nil, err
	}
	if s == nil {
		if r.cfg.GoogleSignatures != GoogleRequire {
			return nil, nil
		}
		archive := cosbucket.SignatureNames(in.kernel.Kernel, in.driver.Version)[0]
		return nil, fault.New(fault.InputMissing,
			"the bucket does not have Google's signatures for this driver: "+kernels.URL(archive)+" is missing",
			"set --kernel-mirror to a bucket that has these signatures; or publish the modules without them: "+
				"--google-signatures auto")
	}
	detached, err := modsign.ReadDetached(bytes.NewReader(s.Archive), s.TrustedKey)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.Materials[0].URI, err)
	}
	return &googleSignatures{Detached: detached, materials: s.Materials}, nil
}

// attachSignatures replaces the stamped modules by modules with Google's signatures: either all of them, or none.
func (r *run) attachSignatures(ctx context.Context, in *inputs, s signing, m *modules) (*modules, string, error) {
	by := []string{modsign.AttachRecipe}
	for _, m := range in.google.materials {
		by = append(by, m.Digest)
	}
	signed, cached, err := r.signEach(ctx, in, m, by, func(src, dst, name string) error {
		module, err := modcheck.Unstamped(src)
		if err != nil {
			return err
		}
		return in.google.Attach(dst, name, module)
	})
	switch {
	case errors.Is(err, modsign.ErrLeftOut) && s.google != GoogleRequire:
		fmt.Fprintln(r.log, err)
		return m, err.Error(), nil
	case errors.Is(err, modsign.ErrLeftOut):
		hint := "publish the modules without Google's signatures: --google-signatures auto"
		if s.forced {
			hint = hintSigned
		}
		return nil, "", fault.Wrap(fault.CheckFailed, err, hint)
	case err != nil:
		return nil, "", err
	}
	signed.signer = moduleSigner{google: in.google.materials[0].Digest}
	note := fmt.Sprintf("%d of Google's signatures", len(signed.files))
	if cached {
		note += ", cached"
	}
	return signed, note, nil
}

// googleModules has the modules that Google compiled for the COS build of this run.
type googleModules struct {
	*cossrc.SignedDriver
	dir    string // the folder of the verified modules
	cached bool
}

// fetchModules fetches Google's modules and verifies each signature. Without Config.GoogleModules, it returns nil. It
// runs in the source phase, so a missing or unsigned module ends the build early.
func (r *run) fetchModules(ctx context.Context, kernels *cosbucket.Bucket, in *inputs) (*googleModules, error) {
	switch {
	case !r.cfg.GoogleModules:
		return nil, nil
	case r.req.Flavour != target.Open:
		return nil, fault.New(fault.Unsupported,
			fmt.Sprintf("Google publishes no modules of flavour %s, only the parts from which the modules are linked",
				r.req.Flavour),
			"use --flavour open, or build without --google-modules")
	}
	driver, err := cossrc.FetchSignedDriver(ctx, kernels, r.cfg.Cache, in.kernel.Kernel, in.driver.Version,
		r.progress("source"))
	if err != nil {
		return nil, err
	}
	trusted, err := r.moduleCertificates(driver)
	if err != nil {
		return nil, err
	}
	parts := []string{modsign.UnpackRecipe, driver.Materials[0].Digest}
	for _, cert := range trusted {
		parts = append(parts, modsign.Fingerprint(cert))
	}
	dir, cached, err := r.products.Tree(ctx, "google", in.key(parts...), func(_ context.Context, dir string) (err error) {
		f, err := os.Open(driver.Archive)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		names, err := modsign.UnpackSigned(f, dir, trusted)
		if err != nil {
			return fmt.Errorf("unpack %s: %w", driver.Materials[0].URI, err)
		}
		sums := map[string]string{}
		for _, name := range names {
			if sums[name], err = hostfile.Sum(filepath.Join(dir, name+".ko")); err != nil {
				return err
			}
		}
		return writeSums(dir, sums)
	})
	if err != nil {
		return nil, err
	}
	return &googleModules{driver, dir, cached}, nil
}

// moduleCertificates returns the certificates with which this run verifies Google's modules. They come from the file
// Config.ModuleCert or, if it is "", from the bucket's trusted_key.pem.
func (r *run) moduleCertificates(driver *cossrc.SignedDriver) ([]*x509.Certificate, error) {
	switch {
	case r.cfg.ModuleCert != "":
		return modsign.ReadCertificates(r.cfg.ModuleCert)
	case driver.TrustedKey == nil:
		return nil, fault.New(fault.InputMissing,
			"the bucket has no certificate of this kernel: trusted_key.pem is missing",
			"give the certificate with --module-cert FILE")
	}
	trusted, err := modsign.ParseCertificates(driver.TrustedKey)
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read %s: %w", driver.Materials[1].URI, err),
			"replace trusted_key.pem in the bucket, or give the certificate with --module-cert FILE")
	}
	return trusted, nil
}

// takeModules returns Google's modules, for use in place of compiled ones.
func takeModules(in *inputs) (*modules, string, error) {
	m, err := readModules(in.prebuilt.dir)
	if err != nil {
		return nil, "", err
	}
	archive := in.prebuilt.Materials[0].Digest
	m.signer, m.signedBy = moduleSigner{modules: archive}, []string{modsign.UnpackRecipe, archive}
	note := fmt.Sprintf("%d modules, signed by Google", len(m.files))
	if in.prebuilt.cached {
		note += ", cached"
	}
	return m, note, nil
}

// moduleSigner says who signed the modules of an artifact. At most one field is set; for unsigned modules all are "".
type moduleSigner struct {
	key     string // the fingerprint of the certificate of Config.ModuleKey
	google  string // the digest of Google's signature archive
	modules string // the digest of Google's archive of modules
}

// expectedSigner returns who will sign the modules, as far as this is certain before a build makes them. Google's
// signatures are not certain, because they may not fit: the result is then the same as for unsigned modules.
func (s signing) expectedSigner(in *inputs) moduleSigner {
	switch {
	case s.own != nil:
		return moduleSigner{key: s.own.Identity()}
	case in.prebuilt != nil:
		return moduleSigner{modules: in.prebuilt.Materials[0].Digest}
	}
	return moduleSigner{}
}

// byGoogle reports whether the modules have the content that Google signed, which has no stamp with the ABI
// fingerprint.
func (c moduleSigner) byGoogle() bool { return c.google != "" || c.modules != "" }

// fact returns the name and value of the fact in the provenance that says who signed the modules. For unsigned modules
// ok is false.
func (c moduleSigner) fact() (name, value string, ok bool) {
	switch {
	case c.key != "":
		return trust.FactModuleKey, c.key, true
	case c.google != "":
		return trust.FactGoogleSignatures, c.google, true
	case c.modules != "":
		return trust.FactGoogleModules, c.modules, true
	}
	return "", "", false
}

// accepts reports whether this run can reuse an artifact with this signer, made of the given inputs.
//
// The artifact may have been made for another COS build with the same fingerprint, with Google's signatures for that
// COS build. A run that requires no signatures reuses such an artifact, as it would reuse one with unsigned modules. A
// run that wants Google's modules reuses Google's modules for that COS build only if both kernels were built with the
// same root certificate.
func (s signing) accepts(c moduleSigner, in *inputs, madeOf []trust.Material) bool {
	among := func(wanted []cossrc.Material) bool {
		return !slices.ContainsFunc(wanted, func(w cossrc.Material) bool {
			return !slices.ContainsFunc(madeOf, func(m trust.Material) bool { return m.Digest == w.Digest })
		})
	}
	switch {
	case in.prebuilt != nil:
		return c == s.expectedSigner(in) ||
			c.modules != "" && in.prebuilt.TrustedKey != nil && among(in.prebuilt.Materials[1:])
	case s.own != nil || s.google == GoogleOff:
		return c == s.expectedSigner(in)
	case s.google == GoogleRequire:
		return c.google != "" && among(in.google.materials)
	}
	return c.key == "" && c.modules == ""
}

func (c moduleSigner) String() string {
	if name, value, ok := c.fact(); ok {
		return "signed: " + name + " " + value
	}
	return "unsigned"
}
