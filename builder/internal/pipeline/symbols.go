package pipeline

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/pkg/hostfile"
)

// debugFolder is the name of the folder with the unstripped modules, next to the modules in the cache.
const debugFolder = "debug"

// keepDebug copies the unstripped modules into the cache's folder of modules.
func keepDebug(dir string, debug map[string]string) error {
	if len(debug) == 0 {
		return nil
	}
	if err := os.Mkdir(filepath.Join(dir, debugFolder), 0o755); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(debug)) {
		if _, err := hostfile.CopySum(filepath.Join(dir, debugFolder, name+".ko"), debug[name]); err != nil {
			return err
		}
	}
	return nil
}

// haveSymbols reports whether every repository has debug symbols, signed by our key, of the artifact with this digest.
func (o *publication) haveSymbols(ctx context.Context, digest string) (bool, error) {
	for _, p := range o.destinations {
		if have, err := symbols.Have(ctx, p.repo, digest, o.verifier); err != nil || !have {
			return false, err
		}
	}
	return true, nil
}

// publishSymbols attaches the debug symbols to the artifact in every repository.
func (r *run) publishSymbols(ctx context.Context, to *publication, m *modules, a *artifact) (err error) {
	if !r.cfg.DebugSymbols || a.wasPublished() { // for a reused artifact, the method reuse has checked haveSymbols
		return nil
	}
	debug := map[string]string{}
	for name := range m.files {
		debug[name] = filepath.Join(m.debug, name+".ko")
	}
	scratch, cleanup, err := r.products.TempDir("symbols-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	for _, p := range to.destinations {
		d, existed, err := symbols.Publish(ctx, p.repo, a.digest, symbols.Set{
			Identity: a.identity, Debug: debug, Published: m.files, Recipe: r.recipe, Signer: to.signer, Verifier: to.verifier,
			Scratch: scratch,
		})
		if err != nil {
			return err
		}
		r.res.Existed = r.res.Existed && existed
		r.res.Symbols = d.Digest.String()
		fmt.Fprintf(r.log, "debug symbols %s in %s\n", d.Digest, p.name)
	}
	return nil
}
