package pipeline

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// Made describes the artifact of a cell that Make made and did not publish.
type Made struct {
	Kernel      target.Kernel
	Fingerprint target.Fingerprint
	Driver      target.Driver
	Identity    bundle.Identity
	// Layers are the artifact's layers. Their files are in the cache that Make was given.
	Layers    []bundle.Layer
	Image     v1.Image
	Materials []sign.Material
}

// Make builds one cell again from its sources. Make stores modules, compiled objects and layers in the cache products,
// and reuses those that are there. If products is empty, Make uses no result of an earlier build.
//
// From Config.Cache, Make uses only fetched inputs, and compares them with their digests. Make needs no key. It runs no
// load test, signs nothing with our keys and publishes nothing.
func Make(ctx context.Context, cfg Config, req Request, products *cas.Cache, log io.Writer, line *timeline.Run) (*Made,
	error) {
	cfg = cfg.withDefaults(req)
	defer cfg.Cache.Begin()()
	r := &run{cfg: cfg, req: req, log: log, line: line, started: time.Now().UTC(), products: products,
		recipe: cmp.Or(req.PackRecipe, bundle.PackRecipe)}
	in, err := phase(r, "source", func() (*inputs, string, error) { return r.source(ctx) })
	if err != nil {
		return nil, err
	}
	m, err := r.makeModules(ctx, in, signing{google: r.cfg.GoogleSignatures})
	if err != nil {
		return nil, err
	}
	layers, err := phase(r, "package", func() ([]bundle.Layer, string, error) { return r.pack(ctx, in, m, nil) })
	if err != nil {
		return nil, err
	}
	made := &Made{
		Kernel: in.kernel.Kernel, Fingerprint: in.kernel.Fingerprint, Driver: in.driver,
		Identity: m.identity, Layers: layers, Materials: in.materials(m.signer),
	}
	if made.Image, err = bundle.Image(made.Identity, made.Layers); err != nil {
		return nil, fmt.Errorf("package the layers: %w", err)
	}
	return made, nil
}

// Recipes returns the recipe of each step that decides the bytes of an artifact, by the step's name. A recipe is the
// version of the step's code. A builder with the same recipes can make the same artifact again. It can also pack with
// the earlier recipes in [bundle.PackRecipes].
func Recipes() map[string]string {
	return map[string]string{"compile": compile.Recipe, factStage: nvsrc.StageRecipe, FactPack: bundle.PackRecipe,
		factImage: bundle.ImageRecipe, "stamp": modcheck.Recipe}
}
