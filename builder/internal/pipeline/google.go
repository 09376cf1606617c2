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
	"github.com/prebake/prebake/builder/internal/gate"
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

// FactGoogleSignatures is the word under which the provenance names the archive
// whose signatures the modules carry, by digest.
const FactGoogleSignatures = "googleSignatures"

// FactGoogleModules is the word under which the provenance names the archive
// that Google's own modules come from, by digest.
const FactGoogleModules = "googleModules"

// googleSignatures are those of this run's COS build and driver.
type googleSignatures struct {
	*modsign.Detached
	materials []cossrc.Material // the archive first
	attached  bool
}

// Signing says in words how modules get signatures for the kernel, and which
// objects of the kernel bucket those come from; nil is none.
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
	return fmt.Sprintf("module key %q, certificate %q, Google's signatures %s, Google's modules %t", c.ModuleKey, c.ModuleCert, c.GoogleSignatures, c.GoogleModules), objects
}

// fetchSignatures reads Google's signatures, where there are some and this
// build wants them.
func (r *run) fetchSignatures(ctx context.Context, kernels *cosbucket.Bucket) error {
	if r.cfg.ModuleKey != "" || r.cfg.GoogleModules || r.cfg.GoogleSignatures == GoogleOff {
		return nil
	}
	s, err := cossrc.FetchSignatures(ctx, kernels, r.cfg.Cache, r.kernel.Kernel, r.res.Driver.Version)
	if err != nil {
		return err
	}
	if s == nil {
		if r.cfg.GoogleSignatures != GoogleRequire {
			return nil
		}
		archive := cosbucket.SignatureNames(r.kernel.Kernel, r.res.Driver.Version)[0]
		return fault.New(fault.InputMissing, "the bucket has no signatures by Google for this driver: there is no "+kernels.URL(archive),
			"name a bucket that has them with --kernel-mirror, or build with --google-signatures auto")
	}
	detached, err := modsign.ReadDetached(bytes.NewReader(s.Archive), s.TrustedKey)
	if err != nil {
		return fmt.Errorf("%s: %w", s.Materials[0].URI, err)
	}
	r.google = &googleSignatures{Detached: detached, materials: s.Materials}
	return nil
}

// attachSignatures puts modules with Google's signatures in the place of
// stamped ones: all of them, or none.
func (r *run) attachSignatures(ctx context.Context) (string, error) {
	cached, err := r.signEach(ctx, func(src, dst, name string) error {
		module, err := gate.Unstamped(src)
		if err != nil {
			return err
		}
		return r.google.Attach(dst, name, module)
	})
	switch {
	case errors.Is(err, modsign.ErrLeftOut) && r.cfg.GoogleSignatures != GoogleRequire:
		fmt.Fprintln(r.log, err)
		return err.Error(), nil
	case errors.Is(err, modsign.ErrLeftOut):
		hint := "publish the modules without them: --google-signatures auto"
		if r.forced {
			hint = hintSigned
		}
		return "", fault.Wrap(fault.CheckFailed, err, hint)
	case err != nil:
		return "", err
	}
	r.google.attached = true
	note := fmt.Sprintf("%d of Google's signatures", len(r.modules))
	if cached {
		note += ", cached"
	}
	return note, nil
}

// googleModules are those that Google compiled for this run's COS build.
type googleModules struct {
	*cossrc.SignedDriver
	dir    string // the verified modules
	cached bool
}

// fetchModules fetches them, and verifies each, before anything is decided.
func (r *run) fetchModules(ctx context.Context, kernels *cosbucket.Bucket) error {
	switch {
	case !r.cfg.GoogleModules:
		return nil
	case r.req.Flavour != target.Open:
		return fault.New(fault.Unsupported, fmt.Sprintf("Google ships no modules of flavour %s, but what it takes to link them", r.req.Flavour), "--flavour open, or build without --google-modules")
	}
	driver, err := cossrc.FetchSignedDriver(ctx, kernels, r.cfg.Cache, r.kernel.Kernel, r.res.Driver.Version, r.say("source"))
	if err != nil {
		return err
	}
	trusted, err := r.kernelTrusts(driver)
	if err != nil {
		return err
	}
	parts := []string{modsign.UnpackRecipe, driver.Materials[0].Digest}
	for _, cert := range trusted {
		parts = append(parts, modsign.Fingerprint(cert))
	}
	dir, cached, err := r.products.Tree(ctx, "google", r.key(parts...), func(_ context.Context, dir string) (err error) {
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
	r.prebuilt = &googleModules{driver, dir, cached}
	return err
}

// kernelTrusts are the certificates that Google's modules are held against.
func (r *run) kernelTrusts(driver *cossrc.SignedDriver) ([]*x509.Certificate, error) {
	switch {
	case r.cfg.ModuleCert != "":
		return modsign.ReadCertificates(r.cfg.ModuleCert)
	case driver.TrustedKey == nil:
		return nil, fault.New(fault.InputMissing, "the bucket does not show the certificate that this kernel was built with: there is no trusted_key.pem", "give it with --module-cert FILE")
	}
	trusted, err := modsign.ParseCertificates(driver.TrustedKey)
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read %s: %w", driver.Materials[1].URI, err), "replace it in the bucket, or give the certificate with --module-cert FILE")
	}
	return trusted, nil
}

// takeModules goes on with Google's modules in the place of compiled ones.
func (r *run) takeModules(context.Context) (string, error) {
	if err := r.findModules(r.prebuilt.dir); err != nil {
		return "", err
	}
	note := fmt.Sprintf("%d modules, signed by Google", len(r.modules))
	if r.prebuilt.cached {
		note += ", cached"
	}
	return note, nil
}

// carries says whose signatures the modules of an artifact carry, as its
// provenance names them; all "" is nobody's.
type carries struct {
	key     string // the certificate of the farm's own key
	google  string // the digest of Google's signature archive
	modules string // the digest of Google's archive of modules
}

func (r *run) carries() carries {
	switch {
	case r.moduleSigner != nil:
		return carries{key: r.moduleSigner.Identity()}
	case r.prebuilt != nil:
		return carries{modules: r.prebuilt.Materials[0].Digest}
	case r.google != nil && r.google.attached:
		return carries{google: r.google.materials[0].Digest}
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
		return FactModuleKey, c.key, true
	case c.google != "":
		return FactGoogleSignatures, c.google, true
	case c.modules != "":
		return FactGoogleModules, c.modules, true
	}
	return "", "", false
}

// takes reports whether an artifact with such modules, made of these inputs, is
// what this run is asked for. What Google signed for a sibling build is as good
// as unsigned where nobody asked for signatures, and as good as this build's own
// modules where both kernels were built with the same root.
func (r *run) takes(c carries, inputs []trust.Material) bool {
	among := func(wanted []cossrc.Material) bool {
		return !slices.ContainsFunc(wanted, func(w cossrc.Material) bool {
			return !slices.ContainsFunc(inputs, func(m trust.Material) bool { return m.Digest == w.Digest })
		})
	}
	switch {
	case r.prebuilt != nil:
		return c == r.carries() || c.modules != "" && r.prebuilt.TrustedKey != nil && among(r.prebuilt.Materials[1:])
	case r.moduleSigner != nil || r.cfg.GoogleSignatures == GoogleOff:
		return c == r.carries()
	case r.cfg.GoogleSignatures == GoogleRequire:
		return c.google != "" && among(r.google.materials)
	}
	return c.key == "" && c.modules == ""
}

func (c carries) String() string {
	if name, value, ok := c.fact(); ok {
		return "signed: " + name + " " + value
	}
	return "unsigned"
}
