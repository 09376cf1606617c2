package pipeline

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// Names of facts in the provenance. FactPack, factImage and factStage are in [Recipes]. factBuilder is the builder's
// version.
const (
	FactPack    = "pack"
	factImage   = "image"
	factStage   = "stage"
	factBuilder = "builder"
)

// chooseRecipe chooses the recipe for the layers that this run packs: that of the published artifact. A destination
// never replaces the digest under the artifact's tag or in its index, so after the compile it would refuse an artifact
// with other bytes. If this builder cannot pack the same bytes by its recipes, the build ends here. Another recipe for
// compiling or stamping, or another pahole, does not end the build here, because it may give the same bytes.
//
// The provenance by our key contains the recipe of the artifact. Without such a provenance, as after a change of the
// key or in a bucket, chooseRecipe sets r.wanted.
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
		r.comparePahole(in, p, facts)
		err = checkRecipes(facts)
		if err == nil {
			err = r.checkStage(ctx, in, p, facts)
		}
		if err != nil {
			return fmt.Errorf("build the published artifact %s of %s again: %w", p.published, p.name, err)
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

// checkRecipes returns an error if this builder cannot make the layers or the image of a build with these facts.
func checkRecipes(facts map[string]string) error {
	for _, step := range []struct {
		name  string
		known []string
	}{{FactPack, bundle.PackRecipes()}, {factImage, []string{bundle.ImageRecipe}}} {
		if have := facts[step.name]; !slices.Contains(step.known, have) {
			return fault.New(fault.PublishRefused,
				fmt.Sprintf("recipe %s of the artifact is %q; this builder knows only %s, and would make other bytes", step.name,
					have,
					strings.Join(step.known, ", ")),
				hintRecipe(facts, step.name == FactPack))
		}
	}
	return nil
}

// hintRecipe returns the hint for a published artifact that this builder cannot make again. facts are the facts in the
// artifact's provenance. A newer builder may help only for a recipe of layers, because each builder knows all earlier
// recipes of layers.
func hintRecipe(facts map[string]string, layers bool) string {
	hint := fmt.Sprintf("make this artifact again with the builder of version %s, which made the artifact",
		facts[factBuilder])
	if layers {
		hint += "; or upgrade this builder"
	}
	return hint
}

// otherPahole describes a published artifact whose modules have BTF by another version of pahole than this machine has.
type otherPahole struct {
	published      string // digest of the artifact
	version, local string // of pahole: that of the artifact, and this machine's
}

// comparePahole sets r.otherPahole if the published modules have BTF by another version of pahole than this machine
// has. This is no error, because two versions often make the same bytes.
func (r *run) comparePahole(in *inputs, p destination, facts map[string]string) {
	have := facts[FactBTF]
	if have == "" || in.pahole == "" || have == in.pahole {
		return
	}
	r.otherPahole = otherPahole{p.published, have, in.pahole}
	r.progress("look up")(fmt.Sprintf(
		"%s; if this machine's pahole makes other bytes, publishing fails after the compile; then %s",
		r.otherPahole, hintPahole(have)))
}

func (o otherPahole) String() string {
	return fmt.Sprintf("the published modules have BTF by pahole %s, and this machine has pahole %s", o.version, o.local)
}

// explain adds the other version of pahole to the error with which a destination refused the artifact with this digest,
// because it is a possible reason why the bytes differ from the published ones. Any other error stays unchanged.
func (o otherPahole) explain(digest string, err error) error {
	if o.published == "" || digest == o.published || !fault.Is(err, fault.PublishRefused) {
		return err
	}
	hint := hintPahole(o.version) + ", and build again"
	if next := fault.Hint(err); next != "" {
		hint += "; if that does not help: " + next
	}
	return fault.Wrap(fault.PublishRefused, fmt.Errorf("%w; a possible reason is that %s", err, o), hint)
}

// checkStage returns an error if this builder lays out user space or firmware in another way than the builder of the
// published artifact. A new recipe changes the layout of some releases only. So checkStage makes these two layers and
// compares them with the published ones, which takes less time than a compile.
func (r *run) checkStage(ctx context.Context, in *inputs, p destination, facts map[string]string) error {
	have := facts[factStage]
	if have == nvsrc.StageRecipe {
		return nil
	}
	content, ok, err := p.content(ctx, p.published)
	if err != nil || !ok {
		return err
	}
	r.progress("look up")(fmt.Sprintf(
		"recipe %s of the published artifact is %q: compares the artifact's user space and firmware",
		factStage, have))
	for _, published := range content.Layers {
		if published.Kind == bundle.LayerModules {
			continue
		}
		l := r.driverLayer(ctx, in, facts[FactPack], published.Kind)
		if l.err != nil {
			return fmt.Errorf("make the %s layer: %w", published.Kind, l.err)
		}
		if l.Digest != published.Digest {
			return fault.New(fault.PublishRefused,
				fmt.Sprintf("recipe %s of the artifact is %q; this builder has %s, which gives other bytes in the %s layer",
					factStage, have,
					nvsrc.StageRecipe, published.Kind),
				hintRecipe(facts, false))
		}
	}
	return nil
}

// content reads the manifest and the config of an artifact. ok is false if the repository has lost or damaged them; a
// push may repair this.
func (p destination) content(ctx context.Context, digest string) (c bundle.Content, ok bool, err error) {
	c, err = publish.Content(ctx, p.repo, digest)
	if fault.Is(err, fault.Unverified) || fault.Is(err, fault.Mismatch) || fault.Is(err, fault.NoArtifact) {
		return c, false, nil
	}
	return c, err == nil, err
}

// checkKernelTags returns an error if the tag of this COS build and driver refers to an artifact that this build cannot
// make again, because it is for another fingerprint. A kernel has one fingerprint for modules with BTF, and another for
// modules without.
func (r *run) checkKernelTags(ctx context.Context, in *inputs, to *publication) error {
	tag := bundle.KernelTag(in.kernel.Kernel, in.driver)
	for _, p := range to.destinations {
		digest, ok, err := publish.Existing(ctx, p.repo, tag)
		if err != nil {
			return err
		}
		if !ok || digest == p.published {
			continue
		}
		content, ok, err := p.content(ctx, digest)
		if err != nil {
			return err
		}
		if !ok || content.Identity.Fingerprint == in.kernel.Fingerprint {
			continue
		}
		flag := "give --btf"
		if r.cfg.BTF {
			flag = "leave out --btf"
		}
		return fault.New(fault.PublishRefused,
			fmt.Sprintf("publish to %s: tag %s refers to artifact %s for ABI fingerprint %s; this build is for %s", p.name, tag,
				digest, content.Identity.Fingerprint, in.kernel.Fingerprint),
			"if only one of the two has BTF, "+flag+"; otherwise the kernel's files in the bucket changed: publish to another "+
				"repository, or remove the tag by hand if the published artifact is wrong")
	}
	return nil
}
