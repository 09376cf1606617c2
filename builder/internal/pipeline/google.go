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

// GoogleSignatures says what to do with the signatures that Google ships with a
// COS build. They replace the stamp: that would change the bytes that they are
// over.
type GoogleSignatures string

// The modes. With a module key of one's own, none of Google's is looked for.
const (
	// GoogleAuto attaches them where every one holds for what was compiled.
	GoogleAuto GoogleSignatures = "auto"
	// GoogleRequire fails the build where they are missing or do not hold.
	GoogleRequire GoogleSignatures = "require"
	// GoogleOff does not look for them.
	GoogleOff GoogleSignatures = "off"
)

// googleSignatures are those of this run's COS build and driver.
type googleSignatures struct {
	*modsign.Detached
	materials []cossrc.Material // the archive first
}

// Signing describes how modules get signatures for the kernel, and which
// objects of the kernel bucket those come from; nil means none.
func (c Config) Signing() (how string, objects func(k target.Kernel, version string) []string) {
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

// fetchSignatures reads Google's signatures, where there are some and this
// build wants them.
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
			"the bucket has no signatures by Google for this driver: there is no "+kernels.URL(archive),
			"name a bucket that has them with --kernel-mirror, or build with --google-signatures auto")
	}
	detached, err := modsign.ReadDetached(bytes.NewReader(s.Archive), s.TrustedKey)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.Materials[0].URI, err)
	}
	return &googleSignatures{Detached: detached, materials: s.Materials}, nil
}

// attachSignatures puts modules with Google's signatures in the place of
// stamped ones: all of them, or none.
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
		hint := "publish the modules without them: --google-signatures auto"
		if s.forced {
			hint = hintSigned
		}
		return nil, "", fault.Wrap(fault.CheckFailed, err, hint)
	case err != nil:
		return nil, "", err
	}
	signed.carries = carries{google: in.google.materials[0].Digest}
	note := fmt.Sprintf("%d of Google's signatures", len(signed.files))
	if cached {
		note += ", cached"
	}
	return signed, note, nil
}

// googleModules are those that Google compiled for this run's COS build.
type googleModules struct {
	*cossrc.SignedDriver
	dir    string // the verified modules
	cached bool
}

// fetchModules fetches them, and verifies each, before anything is decided.
func (r *run) fetchModules(ctx context.Context, kernels *cosbucket.Bucket, in *inputs) (*googleModules, error) {
	switch {
	case !r.cfg.GoogleModules:
		return nil, nil
	case r.req.Flavour != target.Open:
		return nil, fault.New(fault.Unsupported,
			fmt.Sprintf("Google ships no linked modules of flavour %s, only the parts to link them", r.req.Flavour),
			"use --flavour open, or build without --google-modules")
	}
	driver, err := cossrc.FetchSignedDriver(ctx, kernels, r.cfg.Cache, in.kernel.Kernel, in.driver.Version,
		r.progress("source"))
	if err != nil {
		return nil, err
	}
	trusted, err := r.kernelTrusts(driver)
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
			return fmt.Errorf("%s: %w", driver.Materials[0].URI, err)
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

// kernelTrusts are the certificates that Google's modules are checked against.
func (r *run) kernelTrusts(driver *cossrc.SignedDriver) ([]*x509.Certificate, error) {
	switch {
	case r.cfg.ModuleCert != "":
		return modsign.ReadCertificates(r.cfg.ModuleCert)
	case driver.TrustedKey == nil:
		return nil, fault.New(fault.InputMissing,
			"the bucket has no certificate of this kernel: there is no trusted_key.pem",
			"give it with --module-cert FILE")
	}
	trusted, err := modsign.ParseCertificates(driver.TrustedKey)
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read %s: %w", driver.Materials[1].URI, err),
			"replace it in the bucket, or give the certificate with --module-cert FILE")
	}
	return trusted, nil
}

// takeModules goes on with Google's modules in the place of compiled ones.
func takeModules(in *inputs) (*modules, string, error) {
	m, err := readModules(in.prebuilt.dir)
	if err != nil {
		return nil, "", err
	}
	archive := in.prebuilt.Materials[0].Digest
	m.carries, m.signedBy = carries{modules: archive}, []string{modsign.UnpackRecipe, archive}
	note := fmt.Sprintf("%d modules, signed by Google", len(m.files))
	if in.prebuilt.cached {
		note += ", cached"
	}
	return m, note, nil
}

// carries says whose signatures the modules of an artifact carry, as its
// provenance names them; all "" is nobody's.
type carries struct {
	key     string // the certificate of the farm's own key
	google  string // the digest of Google's signature archive
	modules string // the digest of Google's archive of modules
}

// willCarry says whose signatures modules of these inputs will carry, as far as that
// is certain before they are made: Google's may not hold for them.
func (s signing) willCarry(in *inputs) carries {
	switch {
	case s.own != nil:
		return carries{key: s.own.Identity()}
	case in.prebuilt != nil:
		return carries{modules: in.prebuilt.Materials[0].Digest}
	}
	return carries{}
}

// byGoogle reports whether the modules are as Google signed them, without our
// stamp.
func (c carries) byGoogle() bool { return c.google != "" || c.modules != "" }

// fact is what the provenance says of it.
func (c carries) fact() (name, value string, ok bool) {
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

// takes reports whether an artifact with such modules, made of these inputs, is
// what this run is asked for. What Google signed for a sibling build is as good
// as unsigned where nobody asked for signatures, and as good as this build's own
// modules where both kernels were built with the same root.
func (s signing) takes(c carries, in *inputs, madeOf []trust.Material) bool {
	among := func(wanted []cossrc.Material) bool {
		return !slices.ContainsFunc(wanted, func(w cossrc.Material) bool {
			return !slices.ContainsFunc(madeOf, func(m trust.Material) bool { return m.Digest == w.Digest })
		})
	}
	switch {
	case in.prebuilt != nil:
		return c == s.willCarry(in) || c.modules != "" && in.prebuilt.TrustedKey != nil && among(in.prebuilt.Materials[1:])
	case s.own != nil || s.google == GoogleOff:
		return c == s.willCarry(in)
	case s.google == GoogleRequire:
		return c.google != "" && among(in.google.materials)
	}
	return c.key == "" && c.modules == ""
}

func (c carries) String() string {
	if name, value, ok := c.fact(); ok {
		return "signed: " + name + " " + value
	}
	return "unsigned"
}
