package pipeline

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/gate"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/trust"
)

// FactModuleKey is the word under which the provenance names the certificate
// whose key signed the modules; there is none for unsigned ones.
const FactModuleKey = "moduleKey"

// hintSigned is what to do for a kernel that takes signed modules only.
const hintSigned = "sign them with a key that this kernel trusts: --module-key FILE --module-cert FILE; or publish those that Google signed: --google-modules"

// loadModuleKey opens the key for the modules, where there is one. A kernel that
// takes signed modules only is refused where nobody signs them.
func (r *run) loadModuleKey(ctx context.Context) error {
	f, err := os.Open(filepath.Join(r.kernel.Headers, ".config"))
	if err != nil {
		return fault.Wrap(fault.InputMissing, err, "publish a kernel-headers.tgz that holds the kernel's .config")
	}
	defer f.Close()
	config, err := modsign.ReadConfig(f)
	if err != nil {
		return err
	}
	r.forced = config.Forced
	if r.cfg.ModuleKey == "" {
		switch {
		case !r.forced || r.prebuilt != nil:
		case r.google != nil:
			r.cfg.GoogleSignatures = GoogleRequire // left out, they would leave unsigned modules
		default:
			return fault.New(fault.Unsupported, fmt.Sprintf("kernel %s takes signed modules only, and nobody signs these", r.kernel.Kernel), hintSigned)
		}
		return nil
	}
	if !config.Checks {
		return fault.New(fault.Unsupported, fmt.Sprintf("kernel %s does not know module signatures", r.kernel.Kernel), "build for it without --module-key")
	}
	r.moduleHash = config.Hash
	r.moduleSigner, err = modsign.Load(ctx, r.cfg.ModuleKey, r.cfg.ModuleCert)
	return err
}

// moduleKey names a cached product that is made of the modules as they are
// published: everything that decides their bytes, and more where it is given.
func (r *run) moduleKey(more ...string) string {
	if r.carries() != (carries{}) {
		more = slices.Concat(more, r.signatureParts())
	}
	return r.stampedKey(more...)
}

// stampedKey names what is made of the modules as they left the compiler.
func (r *run) stampedKey(more ...string) string {
	return r.key(append(slices.Clone(more), compile.Recipe, gate.Recipe, string(r.kernel.Fingerprint))...)
}

// signatureParts are what decides over the modules' signatures, for cache keys.
func (r *run) signatureParts() []string {
	switch {
	case r.moduleSigner != nil:
		return []string{modsign.Recipe, r.moduleSigner.Identity(), r.moduleHash}
	case r.prebuilt != nil:
		return []string{modsign.UnpackRecipe, r.prebuilt.Materials[0].Digest}
	}
	parts := []string{modsign.AttachRecipe}
	for _, m := range r.google.materials {
		parts = append(parts, m.Digest)
	}
	return parts
}

// signModules puts signed modules in the place of unsigned ones. It comes after
// the sandbox, which the key never enters.
func (r *run) signModules(ctx context.Context) (string, error) {
	if r.moduleSigner == nil {
		return r.attachSignatures(ctx)
	}
	cached, err := r.signEach(ctx, func(src, dst, _ string) error {
		return r.moduleSigner.Sign(ctx, src, dst, r.moduleHash)
	})
	if err != nil {
		return "", err
	}
	note := fmt.Sprintf("%s, %s", r.moduleHash, r.moduleSigner.Certificate().Subject)
	if cached {
		note += ", cached"
	}
	return note, nil
}

// signEach makes signed modules out of those at hand, and goes on with them.
func (r *run) signEach(ctx context.Context, sign func(src, dst, name string) error) (cached bool, err error) {
	dir, cached, err := r.products.Tree(ctx, "signed", r.stampedKey(r.signatureParts()...), func(_ context.Context, dir string) error {
		sums := map[string]string{}
		for _, name := range slices.Sorted(maps.Keys(r.modules)) {
			if sum, err := hostfile.Sum(r.modules[name]); err != nil || sum != r.sums[name] {
				return changed(name, r.products.Dir())
			}
			path := filepath.Join(dir, name+".ko")
			if err := sign(r.modules[name], path, name); err != nil {
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
		return false, err
	}
	return cached, r.findModules(dir)
}

// carriesOf reads out of provenance whose signatures the modules carry.
func carriesOf(st *trust.Statement) (carries, error) {
	var p struct {
		BuildDefinition struct {
			InternalParameters map[string]string `json:"internalParameters"`
		} `json:"buildDefinition"`
	}
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return carries{}, fault.Errorf(fault.Unverified, "read provenance: %w", err)
	}
	facts := p.BuildDefinition.InternalParameters
	return carries{key: facts[FactModuleKey], google: facts[FactGoogleSignatures], modules: facts[FactGoogleModules]}, nil
}
