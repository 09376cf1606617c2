package pipeline

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// Names of facts in the provenance. FactPack and factImage are in [Recipes]. factBuilder is the builder's version.
const (
	FactPack    = "pack"
	factImage   = "image"
	factBuilder = "builder"
)

// chooseRecipe chooses the recipe of the published artifact for the layers that this run packs. Other bytes would be
// refused after the compile, because the artifact's tag, and a bucket's index, keep their digest. If this builder does
// not know the recipe, the build ends here.
//
// Our provenance says which recipe it is. If there is none, as after a change of the key or in a bucket, chooseRecipe
// sets r.wanted.
func (r *run) chooseRecipe(ctx context.Context, in *inputs, to *publication) error {
	if r.req.PackRecipe != "" {
		return nil
	}
	for _, p := range to.destinations {
		if p.published == "" {
			continue
		}
		facts, err := to.buildFacts(ctx, p)
		switch {
		case err != nil:
			return err
		case facts[FactPack] == "":
			r.wanted = p.published
			continue
		}
		if err := checkRecipes(facts); err != nil {
			return fmt.Errorf("make artifact %s in %s again: %w", p.published, p.name, err)
		}
		r.recipe, r.wanted = facts[FactPack], ""
		return nil
	}
	for _, b := range to.buckets {
		if r.wanted != "" {
			break
		}
		var err error
		if r.wanted, err = tarball.ArtifactOf(ctx, b, in.kernel.Kernel, in.driver); err != nil {
			return err
		}
	}
	return nil
}

// buildFacts returns the facts in a provenance by our key about the artifact in a repository, or nil.
func (o *publication) buildFacts(ctx context.Context, p destination) (map[string]string, error) {
	ours := func(payload []byte) map[string]string {
		for _, st := range o.verifier.Statements([][]byte{payload}, p.published, trust.PredicateProvenance) {
			if facts, err := factsOf(st); err == nil {
				return facts
			}
		}
		return nil
	}
	attached, err := p.repo.AttachedIf(ctx, p.published, trust.ArtifactTypeBundle,
		func(payload []byte) string { return ours(payload)[FactPack] }, trust.OfType(trust.PredicateProvenance))
	if err != nil || len(attached) == 0 {
		return nil, err
	}
	return ours(attached[0]), nil
}

// factsOf returns the facts in a provenance statement, by name.
func factsOf(st *trust.Statement) (map[string]string, error) {
	var p struct {
		BuildDefinition struct {
			InternalParameters map[string]string `json:"internalParameters"`
		} `json:"buildDefinition"`
	}
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return nil, fault.Errorf(fault.Unverified, "read provenance: %w", err)
	}
	return p.BuildDefinition.InternalParameters, nil
}

// checkRecipes returns an error if this builder cannot make the image of a build with these facts.
func checkRecipes(facts map[string]string) error {
	for _, step := range []struct {
		name  string
		known []string
	}{{FactPack, bundle.PackRecipes()}, {factImage, []string{bundle.ImageRecipe}}} {
		if have := facts[step.name]; !slices.Contains(step.known, have) {
			hint := fmt.Sprintf("make this artifact again with version %s of builder, which made it", facts[factBuilder])
			if step.name == FactPack { // a builder knows all earlier recipes for layers, but only one for images
				hint += "; or upgrade this builder"
			}
			return fault.New(fault.PublishRefused,
				fmt.Sprintf("its recipe %s is %q; this builder knows %s, and others give other bytes", step.name, have,
					strings.Join(step.known, ", ")), hint)
		}
	}
	return nil
}
