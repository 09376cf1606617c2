// Package reproduce makes a published artifact again from what its provenance
// says, and tells file by file whether the same came out. A second party may
// sign that. It refuses to start from an artifact whose provenance does not
// verify, from other inputs than the provenance names, and to use anything
// that an earlier build left in a cache.
package reproduce

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Config says what to make again, and how.
type Config struct {
	Repo *registry.Repository
	// Ref is a tag or a digest in Repo.
	Ref string
	// Verifier holds the keys whose provenance is trusted.
	Verifier *trust.Verifier
	// Make makes the cell. It is pipeline.Make with this machine's mirrors and
	// tools, and a cache for products that was empty when the program began.
	Make func(ctx context.Context, req pipeline.Request) (*pipeline.Made, error)
	// TempDir gives an empty folder and what removes it. The folder takes the
	// artifact twice, unpacked.
	TempDir func(prefix string) (dir string, cleanup func() error, err error)
	// Attest signs the outcome if it is "identical"; nil signs nothing.
	Attest *sign.Signer
	// By names who makes it again, a URI; it goes into that statement.
	By string
}

// Report is the outcome.
type Report struct {
	Repository  string             `json:"repository"`
	Digest      string             `json:"digest"`
	Kernel      target.Kernel      `json:"kernel"`
	Driver      target.Driver      `json:"driver"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	BuilderID   string             `json:"builderId"`
	// Identical says that the digest came out again; with ModuleKey, that all
	// came out again but the signatures inside the modules.
	Identical bool `json:"identical"`
	// ModuleKey names the certificate that the published modules are signed
	// under. Nobody else can make those signatures again, so they are left out of
	// the comparison.
	ModuleKey string `json:"moduleKey,omitempty"`
	// Made is the digest that came out.
	Made string `json:"made"`
	// Files is how many were compared; Differences are those that differ, in
	// order of their names. Both are about the layers whose digests differ.
	Files       int          `json:"files"`
	Differences []Difference `json:"differences,omitempty"`
	// Attested is the digest of the statement that was attached, if any.
	Attested string `json:"attested,omitempty"`
}

// provenance is what the rebuild needs to know.
type provenance struct {
	trust.Verdict
	recipes map[string]string
}

// Run makes the artifact again and compares. An artifact that differs is not
// an error: the report says so.
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
	if err := sameRecipes(p.recipes); err != nil {
		return nil, err
	}
	dir, cleanup, err := c.TempDir("reproduce-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = cleanup() }() // a scratch folder; the next start removes it as well
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
	})
	if err != nil {
		return nil, fmt.Errorf("build it again: %w", err)
	}
	if err := sameInputs(p.Materials, made); err != nil {
		return nil, err
	}
	hash, err := made.Image.Digest()
	if err != nil {
		return nil, err
	}
	report := &Report{
		Repository: c.Repo.Name(), Digest: digest, Made: hash.String(), Identical: hash == desc.Digest,
		Kernel: p.Built.Kernel, Driver: p.Built.Driver, Fingerprint: p.Built.Fingerprint, BuilderID: p.BuilderID,
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

// provenance finds the statement that says how the artifact was made, and
// verifies it as a node of the kernel that it was made for would.
func (c Config) provenance(ctx context.Context, digest string, content bundle.Content) (*provenance, error) {
	attached, err := c.Repo.Attached(ctx, digest, trust.ArtifactTypeBundle, trust.OfType(trust.PredicateProvenance))
	if err != nil {
		return nil, err
	}
	var said struct {
		BuildDefinition struct {
			ExternalParameters trust.Parameters  `json:"externalParameters"`
			InternalParameters map[string]string `json:"internalParameters"`
		} `json:"buildDefinition"`
	}
	for _, raw := range attached {
		st, err := c.Verifier.Statement(raw)
		if err != nil || st.PredicateType != trust.PredicateProvenance || !st.About(digest) {
			continue // Verify says below what is wrong with them all
		}
		if err := json.Unmarshal(st.Predicate, &said); err == nil {
			break
		}
	}
	built := said.BuildDefinition.ExternalParameters
	if built.Kernel.BuildID == "" {
		// Nothing names a kernel. Verify wants one before it explains itself.
		built.Kernel = target.Kernel{BuildID: "0.0.0", Board: "none"}
	}
	if attached, err = c.Repo.Attached(ctx, digest, trust.ArtifactTypeBundle, trust.Wanted(built.Kernel)...); err != nil {
		return nil, err
	}
	verdict, err := c.Verifier.Verify(attached, trust.Expect{
		Digest: digest, Kernel: target.Kernel{BuildID: built.Kernel.BuildID, Board: built.Kernel.Board},
		Driver: content.Identity.Driver, Identity: content.Identity,
	})
	if err != nil {
		return nil, err
	}
	return &provenance{*verdict, said.BuildDefinition.InternalParameters}, nil
}

// sameRecipes compares the ways in which things are made: with another way,
// other bytes prove nothing.
func sameRecipes(theirs map[string]string) error {
	ours := pipeline.Recipes()
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		if theirs[name] != ours[name] {
			return fault.New(fault.Unsupported,
				fmt.Sprintf("it was built with recipe %s in version %q; this builder has %q", name, theirs[name], ours[name]),
				fmt.Sprintf("use version %s of the builder, which the provenance names", theirs["builder"]))
		}
	}
	return nil
}

// sameInputs compares what was fetched now with what the provenance names.
func sameInputs(want []trust.Material, made *pipeline.Made) error {
	have := map[string]bool{}
	for _, m := range made.Materials {
		have[m.Digest] = true
	}
	for _, m := range want {
		if !have[m.Digest] {
			return fault.New(fault.Mismatch,
				fmt.Sprintf("input %s was %s when it was built; the mirrors now have another object", m.Name, m.Digest),
				"name mirrors that hold that very object with --kernel-mirror and --driver-mirror; it came from "+m.URI)
		}
	}
	if len(made.Materials) != len(want) {
		return fault.Errorf(fault.Mismatch, "it was made from %d inputs, now there are %d", len(want), len(made.Materials))
	}
	return nil
}

func (c Config) attest(ctx context.Context, digest string, p *provenance) (string, error) {
	statement, err := sign.Reproduced(digest, p.Built,
		sign.ReproducedFacts{By: c.By, Builder: p.BuilderID, Recipes: pipeline.Recipes()})
	if err != nil {
		return "", err
	}
	return publish.Statement(ctx, c.Repo, digest, c.Attest, statement)
}
