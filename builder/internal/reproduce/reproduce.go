// Package reproduce builds a published artifact again from the inputs in its provenance. It reports file by file
// whether the result is the same. If the result is the same, a second party may sign a statement that says so. The
// package refuses an artifact whose provenance does not verify. It uses no other inputs, and nothing that an earlier
// build left in a cache.
package reproduce

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Config says which artifact to build again, and how.
type Config struct {
	Repo *registry.Repository
	// Ref is a tag or a digest in Repo.
	Ref string
	// Verifier has the keys whose provenance is trusted.
	Verifier *trust.Verifier
	// Make builds the cell by pipeline.Make, with a cache for products that was empty when the program began.
	Make func(ctx context.Context, req pipeline.Request) (*pipeline.Made, error)
	// TempDir returns an empty folder with room for two unpacked copies of the artifact, and a function that removes it.
	TempDir func(prefix string) (dir string, cleanup func() error, err error)
	// Attest signs the statement that this builder made the same artifact, if Report.Identical is true. If nil, nothing is
	// signed.
	Attest *sign.Signer
	// By is a URI that says in the signed statement who built the artifact again.
	By string
}

// Report is the result of Run.
type Report struct {
	Repository  string             `json:"repository"`
	Digest      string             `json:"digest"`
	Kernel      target.Kernel      `json:"kernel"`
	Driver      target.Driver      `json:"driver"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	// BuilderID is the URI of the published artifact's builder, from the newest provenance that verifies. BuiltOn is
	// when that build ended; zero means unknown.
	BuilderID string    `json:"builderId"`
	BuiltOn   time.Time `json:"builtOn,omitzero"`
	// Identical is true if the new artifact has the same digest. If ModuleKey is set, the signatures in the modules may
	// differ.
	Identical bool `json:"identical"`
	// ModuleKey is the fingerprint of the certificate whose key signed the published modules. It is set only if the
	// digests differ. The comparison ignores these signatures, because only the key's owner can make them.
	ModuleKey string `json:"moduleKey,omitempty"`
	// Made is the digest of the new artifact.
	Made string `json:"made"`
	// Files is the number of compared files, and Differences are the differing ones by name. Both cover only layers whose
	// digests differ.
	Files       int          `json:"files"`
	Differences []Difference `json:"differences,omitempty"`
	// Attested is the digest of the statement that was attached, if any.
	Attested string `json:"attested,omitempty"`
}

// provenance has the facts of the artifact's provenance that Run needs. recipes has the versions of the builder's code
// for each step (see [pipeline.Recipes]), and other facts of the build, by name.
type provenance struct {
	trust.Verdict
	recipes map[string]string
}

// Run builds the artifact again and compares the results. A difference is in the report, and is not an error.
func Run(ctx context.Context, c Config) (_ *Report, err error) {
	desc, err := c.Repo.Resolve(ctx, c.Ref)
	if err != nil {
		return nil, err
	}
	digest := desc.Digest.String()
	defer func() {
		if err != nil {
			err = fmt.Errorf("reproduce %s: %w", digest, err)
		}
	}()
	content, err := publish.Content(ctx, c.Repo, digest)
	if err != nil {
		return nil, err
	}
	p, err := c.provenance(ctx, digest, content)
	if err != nil {
		return nil, err
	}
	if err := checkRecipes(p.recipes); err != nil {
		return nil, err
	}
	dir, cleanup, err := c.TempDir("reproduce-")
	if err != nil {
		return nil, err
	}
	// An error of cleanup does not matter: the next start of the program also removes the folder.
	defer func() { _ = cleanup() }()
	folder := func(name string) (string, error) {
		path := filepath.Join(dir, name)
		return path, os.Mkdir(path, 0o755)
	}
	google := pipeline.GoogleOff
	if p.recipes[trust.FactGoogleSignatures] != "" {
		google = pipeline.GoogleRequire
	}
	made, err := c.Make(ctx, pipeline.Request{
		BuildID: p.Built.Kernel.BuildID, Board: p.Built.Kernel.Board, GoogleSignatures: google,
		GoogleModules: p.recipes[trust.FactGoogleModules] != "", BTF: p.recipes[pipeline.FactBTF],
		Driver: target.Wish(p.Built.Driver.Version), Flavour: p.Built.Driver.Flavour,
		PackRecipe: p.recipes[pipeline.FactPack],
	})
	if err != nil {
		return nil, fmt.Errorf("build the artifact again: %w", err)
	}
	if err := checkInputs(p.Materials, made); err != nil {
		return nil, err
	}
	hash, err := made.Image.Digest()
	if err != nil {
		return nil, err
	}
	report := &Report{
		Repository: c.Repo.Name(), Digest: digest, Made: hash.String(), Identical: hash == desc.Digest,
		Kernel: p.Built.Kernel, Driver: p.Built.Driver, Fingerprint: p.Built.Fingerprint, BuilderID: p.BuilderID,
		BuiltOn: p.BuiltOn,
	}
	if !report.Identical {
		report.ModuleKey = p.recipes[trust.FactModuleKey]
		if err := c.compare(ctx, content, made, folder, report); err != nil {
			return nil, err
		}
		report.Identical = report.ModuleKey != "" && len(report.Differences) == 0
	}
	if report.Identical && c.Attest != nil {
		report.Attested, err = c.attest(ctx, digest, p)
	}
	return report, err
}

// provenance returns the artifact's newest provenance that verifies. It verifies one provenance at a time, as a node
// does that has the kernel in this provenance.
func (c Config) provenance(ctx context.Context, digest string, content bundle.Content) (*provenance, error) {
	all, err := c.trusted(ctx, digest)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		// Without a trusted provenance there is no kernel. Verify needs one to report what is wrong with the statements.
		all = []candidate{{kernel: target.Kernel{BuildID: "0.0.0", Board: "none"}}}
	}
	var refused error
	for _, p := range all {
		switch verdict, err := c.verify(ctx, digest, content, p); {
		case err == nil:
			return &provenance{*verdict, p.recipes}, nil
		case !fault.Is(err, fault.Unverified) && !fault.Is(err, fault.Mismatch):
			return nil, err
		case refused == nil:
			refused = err
		}
	}
	return nil, refused
}

// candidate is a provenance with a trusted signature.
type candidate struct {
	raw      []byte
	kernel   target.Kernel
	recipes  map[string]string
	finished time.Time
}

// trusted returns all provenances of the artifact with a trusted signature, newest first.
func (c Config) trusted(ctx context.Context, digest string) ([]candidate, error) {
	attached, err := c.Repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(c.Verifier, digest),
		trust.OfType(trust.PredicateProvenance))
	if err != nil {
		return nil, err
	}
	var all []candidate
	for _, raw := range attached {
		st, err := c.Verifier.Statement(raw)
		if err != nil || st.PredicateType != trust.PredicateProvenance || !st.About(digest) {
			continue // a later call of Verify reports what is wrong with the statements
		}
		var said struct {
			BuildDefinition struct {
				ExternalParameters trust.Parameters `json:"externalParameters"`
				InternalParameters map[string]any   `json:"internalParameters"`
			} `json:"buildDefinition"`
		}
		err = json.Unmarshal(st.Predicate, &said)
		k := said.BuildDefinition.ExternalParameters.Kernel
		if err == nil {
			_, err = target.ParseKernel(k.BuildID, k.Board)
		}
		if err != nil {
			continue
		}
		p := candidate{raw: raw, kernel: k, recipes: map[string]string{}, finished: trust.FinishedOn(st)}
		for name, value := range said.BuildDefinition.InternalParameters {
			if text, ok := value.(string); ok {
				p.recipes[name] = text
			}
		}
		all = append(all, p)
	}
	slices.SortStableFunc(all, func(a, b candidate) int { return b.finished.Compare(a.finished) })
	return all, nil
}

// verify verifies the artifact with one provenance. Without a provenance, it uses all that are attached.
func (c Config) verify(ctx context.Context, digest string, content bundle.Content, p candidate) (*trust.Verdict,
	error) {
	attached, err := c.Repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(c.Verifier, digest),
		trust.Wanted(p.kernel)...)
	if err != nil {
		return nil, err
	}
	if p.raw != nil {
		attached = slices.DeleteFunc(attached, func(raw []byte) bool {
			st, err := c.Verifier.Statement(raw)
			return err == nil && st.PredicateType == trust.PredicateProvenance
		})
		attached = append([][]byte{p.raw}, attached...)
	}
	return c.Verifier.Verify(attached, trust.Expect{
		Digest: digest, Kernel: target.Kernel{BuildID: p.kernel.BuildID, Board: p.kernel.Board},
		Driver: content.Identity.Driver, Identity: content.Identity,
	})
}

// checkRecipes returns an error if the published build had other recipes than this builder has (see [recipes]). Then a
// difference proves nothing.
func checkRecipes(theirs map[string]string) error {
	ours := recipes(theirs)
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		if theirs[name] != ours[name] {
			return fault.New(fault.Unsupported,
				fmt.Sprintf("the recipe %s of the artifact has version %q; this builder has %q", name, theirs[name], ours[name]),
				fmt.Sprintf("use the builder of version %s, which made the artifact", theirs["builder"]))
		}
	}
	return nil
}

// recipes returns the recipes by which this builder makes an artifact again. theirs are the recipes in the provenance
// of the artifact. If theirs has a recipe for the layers that this builder can still use, recipes returns that recipe
// for the layers.
func recipes(theirs map[string]string) map[string]string {
	ours := pipeline.Recipes()
	if slices.Contains(bundle.PackRecipes(), theirs[pipeline.FactPack]) {
		ours[pipeline.FactPack] = theirs[pipeline.FactPack]
	}
	return ours
}

// checkInputs returns an error if this build was made from other inputs than those in the provenance.
func checkInputs(want []trust.Material, made *pipeline.Made) error {
	have := map[string]bool{}
	for _, m := range made.Materials {
		have[m.Digest] = true
	}
	for _, m := range want {
		if !have[m.Digest] {
			return fault.New(fault.Mismatch,
				fmt.Sprintf("input %s had digest %s in the published build; the mirrors now have another object", m.Name, m.Digest),
				"give --kernel-mirror and --driver-mirror the URLs of mirrors that have this input; it came "+
					"from "+m.URI)
		}
	}
	if len(made.Materials) != len(want) {
		return fault.Errorf(fault.Mismatch, "the published artifact was made from %d inputs; this build has %d inputs",
			len(want), len(made.Materials))
	}
	return nil
}

func (c Config) attest(ctx context.Context, digest string, p *provenance) (string, error) {
	statement, err := sign.Reproduced(digest, p.Built,
		sign.ReproducedFacts{By: c.By, Builder: p.BuilderID, Recipes: recipes(p.recipes)})
	if err != nil {
		return "", err
	}
	return publish.Statement(ctx, c.Repo, digest, c.Attest, statement)
}
