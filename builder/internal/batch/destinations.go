package batch

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Destinations has the repositories and buckets where artifacts are published, and the trusted keys.
type Destinations struct {
	Repositories []*registry.Repository
	// Buckets have the published tarballs of the artifacts in Repositories.
	Buckets  []*tarball.Bucket
	Verifier *trust.Verifier
	// Signer signs the driver lists that Label changes in the buckets.
	Signer *sign.Signer

	mu   sync.Mutex
	seen map[string]time.Time // when each layer was found in its repository, by REPOSITORY@DIGEST
}

// Published returns the digest of a cell's artifact if every destination has the artifact, otherwise "". This means:
//   - Each repository has the tag of the cell's COS build and the complete artifact.
//   - A trusted key signed the provenance and the kernel match.
//   - Each bucket has the artifact's tarball.
//
// Published does not compare the artifact's inputs with the input buckets, because the inputs of a BUILD_ID and of a
// driver version never change.
func (p *Destinations) Published(ctx context.Context, c plan.Cell) (digest string, err error) {
	if len(p.Repositories) == 0 {
		return "", nil
	}
	for _, repo := range p.Repositories {
		have, ok, err := publish.Existing(ctx, repo, bundle.KernelTag(c.Kernel, c.Driver))
		if err != nil {
			return "", err
		}
		if !ok || digest != "" && have != digest {
			return "", nil
		}
		digest = have
	}
	for _, repo := range p.Repositories {
		switch err := p.has(ctx, repo, digest, c); {
		case fault.Is(err, fault.Unverified), fault.Is(err, fault.Mismatch), fault.Is(err, fault.NoArtifact):
			return "", nil // the build reports what is wrong
		case err != nil:
			return "", err
		}
	}
	for _, b := range p.Buckets {
		if has, err := tarball.Has(ctx, b, c.Kernel, c.Driver, digest); err != nil || !has {
			return "", err
		}
	}
	return digest, nil
}

// Close closes the buckets.
func (p *Destinations) Close() error {
	var errs []error
	for _, b := range p.Buckets {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

func (p *Destinations) has(ctx context.Context, repo *registry.Repository, digest string, c plan.Cell) error {
	content, err := publish.Content(ctx, repo, digest)
	if err != nil {
		return err
	}
	kernel := target.Kernel{BuildID: c.Kernel.BuildID, Board: c.Kernel.Board, Arch: c.Kernel.Arch}
	attached, err := repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(p.Verifier, digest),
		trust.Wanted(kernel)...)
	if err != nil {
		return err
	}
	expect := trust.Expect{Digest: digest, Kernel: kernel, Driver: c.Driver, Identity: content.Identity, Now: time.Now()}
	if _, err := p.Verifier.Verify(attached, expect); err != nil {
		return err
	}
	for _, l := range content.Layers {
		if err := p.checkLayer(ctx, repo, l); err != nil {
			return err
		}
	}
	return nil
}

// seenFor is how long a layer that was found counts as present. After this time checkLayer looks for the layer again,
// because a registry may lose it.
const seenFor = 24 * time.Hour

// checkLayer returns an error if a repository does not have a layer. Many artifacts share a layer, so checkLayer asks
// the repository only once a day for each digest.
func (p *Destinations) checkLayer(ctx context.Context, repo *registry.Repository, l bundle.ContentLayer) error {
	name := repo.Name() + "@" + l.Digest
	p.mu.Lock()
	at, seen := p.seen[name]
	p.mu.Unlock()
	if seen && time.Since(at) < seenFor {
		return nil
	}
	if err := publish.CheckLayer(ctx, repo, l); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen == nil {
		p.seen = map[string]time.Time{}
	}
	p.seen[name] = time.Now()
	return nil
}
