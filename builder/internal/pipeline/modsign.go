package pipeline

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/trust"
)

// hintSigned is the hint for a kernel that loads signed modules only.
const hintSigned = "sign the modules with a key that this kernel trusts: --module-key FILE --module-cert FILE; or " +
	"publish the modules that Google signed: --google-modules"

// signing describes the module signatures that a build makes for the kernel.
type signing struct {
	own  *modsign.Signer // nil without Config.ModuleKey
	hash string          // the hash algorithm for signatures by own; the kernel demands it
	// google decides about Google's signatures, if own is nil.
	google GoogleSignatures
	// forced is true if the kernel loads signed modules only.
	forced bool
}

// openSigning opens the key for the modules, if one is configured. If the kernel loads signed modules only, and this
// build cannot sign them, openSigning returns an error.
func (r *run) openSigning(ctx context.Context, in *inputs) (s signing, err error) {
	f, err := os.Open(filepath.Join(in.kernel.Headers, ".config"))
	if err != nil {
		return s, fault.Wrap(fault.InputMissing, fmt.Errorf("read kernel configuration: %w", err),
			"publish a kernel-headers.tgz that contains the kernel's .config")
	}
	defer f.Close()
	config, err := modsign.ReadConfig(f)
	if err != nil {
		return s, err
	}
	s = signing{google: r.cfg.GoogleSignatures, forced: config.Forced}
	switch {
	case r.cfg.ModuleKey != "":
	case !s.forced || in.prebuilt != nil:
		return s, nil
	case in.google != nil:
		s.google = GoogleRequire // without Google's signatures the modules would be unsigned
		return s, nil
	default:
		return s, fault.New(fault.Unsupported,
			fmt.Sprintf("kernel %s loads only signed modules, but this build has no key to sign the modules",
				in.kernel.Kernel), hintSigned)
	}
	if !config.Checks {
		return s, fault.New(fault.Unsupported, fmt.Sprintf("kernel %s does not support module signatures", in.kernel.Kernel),
			"build for this kernel without --module-key")
	}
	s.hash = config.Hash
	s.own, err = modsign.Load(ctx, r.cfg.ModuleKey, r.cfg.ModuleCert)
	return s, err
}

// signModules replaces the unsigned modules by signed ones. It runs after the sandbox ended, so the key is never inside
// the sandbox.
func (r *run) signModules(ctx context.Context, in *inputs, s signing, m *modules) (*modules, string, error) {
	if s.own == nil {
		return r.attachSignatures(ctx, in, s, m)
	}
	by := []string{modsign.Recipe, s.own.Identity(), s.hash}
	signed, cached, err := r.signEach(ctx, in, m, by,
		func(src, dst, _ string) error { return s.own.Sign(ctx, src, dst, s.hash) })
	if err != nil {
		return nil, "", err
	}
	signed.signer = moduleSigner{key: s.own.Identity()}
	note := fmt.Sprintf("%s, %s", s.hash, s.own.Certificate().Subject)
	if cached {
		note += ", cached"
	}
	return signed, note, nil
}

// signEach makes a signed copy of each module with the callback. by lists everything besides the modules that decides
// the signatures, for the cache key.
func (r *run) signEach(ctx context.Context, in *inputs, m *modules, by []string,
	sign func(src, dst, name string) error) (_ *modules, cached bool, err error) {
	key := in.stampedKey(slices.Concat(by, m.sumList())...)
	dir, cached, err := r.moduleTree(ctx, "signed", key, func(_ context.Context, dir string) error {
		sums := map[string]string{}
		for _, name := range slices.Sorted(maps.Keys(m.files)) {
			switch sum, err := hostfile.Sum(m.files[name]); {
			case err != nil:
				return fmt.Errorf("read module %s: %w", name, err)
			case sum != m.sums[name]:
				return changedError(name, r.products.Dir())
			}
			path := filepath.Join(dir, name+".ko")
			if err := sign(m.files[name], path, name); err != nil {
				return err
			}
			var err error
			if sums[name], err = hostfile.Sum(path); err != nil {
				return err
			}
		}
		return writeSums(dir, sums)
	})
	if err != nil {
		return nil, false, err
	}
	signed, err := readModules(dir)
	if err != nil {
		return nil, false, err
	}
	signed.debug, signed.madeOf, signed.signedBy = m.debug, m.madeOf, by
	return signed, cached, nil
}

// moduleSignerOf returns who signed the modules, according to a provenance statement.
func moduleSignerOf(st *trust.Statement) (moduleSigner, error) {
	facts, err := factsOf(st)
	return moduleSigner{key: facts[trust.FactModuleKey], google: facts[trust.FactGoogleSignatures],
		modules: facts[trust.FactGoogleModules]}, err
}
