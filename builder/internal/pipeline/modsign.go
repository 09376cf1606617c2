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
	"github.com/prebake/prebake/pkg/trust"
)

// FactModuleKey is the word under which the provenance names the certificate
// whose key signed the modules; there is none for unsigned ones.
const FactModuleKey = "moduleKey"

// loadModuleKey opens the key for the modules, where there is one.
func (r *run) loadModuleKey(ctx context.Context) error {
	if r.cfg.ModuleKey == "" {
		return nil
	}
	f, err := os.Open(filepath.Join(r.kernel.Headers, ".config"))
	if err != nil {
		return fault.Wrap(fault.InputMissing, err, "publish a kernel-headers.tgz that holds the kernel's .config")
	}
	defer f.Close()
	config, err := modsign.ReadConfig(f)
	if err != nil {
		return err
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
	parts := slices.Concat(more, []string{compile.Recipe, gate.Recipe, string(r.kernel.Fingerprint)})
	if r.moduleSigner != nil {
		parts = append(parts, modsign.Recipe, r.moduleSigner.Identity(), r.moduleHash)
	}
	return r.key(parts...)
}

// signedBy is the certificate that the modules of this run are signed under.
func (r *run) signedBy() string {
	if r.moduleSigner == nil {
		return ""
	}
	return r.moduleSigner.Identity()
}

// signModules puts signed modules in the place of unsigned ones. It comes after
// the sandbox, which the key never enters.
func (r *run) signModules(ctx context.Context) (string, error) {
	dir, cached, err := r.products.Tree(ctx, "signed", r.moduleKey(), func(ctx context.Context, dir string) error {
		sums := map[string]string{}
		for _, name := range slices.Sorted(maps.Keys(r.modules)) {
			if sum, err := fileSum(r.modules[name]); err != nil || sum != r.sums[name] {
				return changed(name, r.products.Dir())
			}
			path := filepath.Join(dir, name+".ko")
			if err := r.moduleSigner.Sign(ctx, r.modules[name], path, r.moduleHash); err != nil {
				return err
			}
			var err error
			if sums[name], err = fileSum(path); err != nil {
				return err
			}
		}
		return writeSums(dir, sums)
	})
	if err != nil {
		return "", err
	}
	if err := r.findModules(dir); err != nil {
		return "", err
	}
	note := fmt.Sprintf("%s, %s", r.moduleHash, r.moduleSigner.Certificate().Subject)
	if cached {
		note += ", cached"
	}
	return note, nil
}

// moduleKeyOf reads out of provenance which certificate the modules of an
// artifact are signed under; "" is none.
func moduleKeyOf(st *trust.Statement) (string, error) {
	var p struct {
		BuildDefinition struct {
			InternalParameters map[string]string `json:"internalParameters"`
		} `json:"buildDefinition"`
	}
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return "", fault.Errorf(fault.Unverified, "read provenance: %w", err)
	}
	return p.BuildDefinition.InternalParameters[FactModuleKey], nil
}
