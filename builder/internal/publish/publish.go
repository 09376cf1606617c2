// Package publish uploads an artifact in an order that never shows an incomplete one: blobs, manifest, signed
// statements, and only then the tags. A run may be interrupted anywhere and repeated. The package never replaces a
// published artifact.
package publish

import (
	"context"
	"fmt"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// ArtifactTypeLog is the artifact type of an attached build log (see [PackLog]).
const ArtifactTypeLog = "application/vnd.prebake.build-log.v1+zstd"

// Artifact has everything that is published together.
type Artifact struct {
	Image    v1.Image
	Identity bundle.Identity
	// Kernel is the COS build for which the artifact is published this time.
	Kernel target.Kernel
	// Bundles are the signed statements as Sigstore bundles: provenance, kernel match, test result and contents.
	Bundles [][]byte
	// Verifier verifies statements that the repository already has. A new statement that proves the same is not attached.
	// If Verifier is nil, every statement is attached.
	Verifier *trust.Verifier
	// Log is the output of [PackLog], or nil. It is attached together with the provenance, which contains the log's
	// digest. If the repository has another run's provenance, neither is attached, except after RenewAfter.
	Log []byte
	// RenewAfter is for a run that built the artifact again. If the repository's newest provenance is this much older
	// than the new provenance, the new one is attached too. Policies judge an artifact's age by its newest provenance.
	// RenewAfter is 0 if the run built nothing.
	RenewAfter time.Duration
	// Pause waits between two looks at the attachments. The second look is for a registry in which other builders may
	// overwrite the list of attachments (see [registry.Repository.SharesList]). The length of the pause should be
	// random. Without Pause, or without Verifier, there is no second look.
	Pause func(ctx context.Context) error
}

// Existing returns the digest to which a tag refers in a repository, and whether the tag exists. The caller must verify
// the statements about the digest before it relies on the artifact.
func Existing(ctx context.Context, repo *registry.Repository, tag string) (digest string, ok bool, err error) {
	d, err := repo.Resolve(ctx, tag)
	// A registry such as Quay creates a repository on the first push, and denies reading until then. If this client may
	// push but cannot read, the repository does not exist yet.
	if registry.Denied(err) && repo.CheckPush(ctx) == nil {
		if d, err = repo.Resolve(ctx, tag); registry.Denied(err) {
			return "", false, nil
		}
	}
	switch {
	case fault.Is(err, fault.NoArtifact):
		return "", false, nil
	case err != nil:
		return "", false, err
	}
	return d.Digest.String(), true, nil
}

// Content reads the manifest and the config of the artifact with this digest, and checks the manifest's digest.
func Content(ctx context.Context, repo *registry.Repository, digest string) (bundle.Content, error) {
	manifest, err := repo.Manifest(ctx, digest)
	if err != nil {
		return bundle.Content{}, err
	}
	desc, err := bundle.ConfigDescriptor(manifest)
	if err != nil {
		return bundle.Content{}, err
	}
	config, err := repo.Small(ctx, desc)
	if err != nil {
		return bundle.Content{}, err
	}
	return bundle.ParseManifest(manifest, config)
}

// CheckLayer returns a [fault.NoArtifact] error if a repository has lost a layer although it has the manifest. It
// transfers no layer.
func CheckLayer(ctx context.Context, repo *registry.Repository, l bundle.ContentLayer) error {
	hash, err := v1.NewHash(l.Digest)
	if err != nil {
		return fault.Errorf(fault.Unverified, "look for a layer in the repository: %w", err)
	}
	has, err := repo.HasBlob(ctx, v1.Descriptor{Digest: hash, Size: l.Size})
	if err == nil && !has {
		err = fault.Errorf(fault.NoArtifact, "%s has lost the layer %s of an artifact", repo.Name(), l.Digest)
	}
	return err
}

// Publish stores an artifact. It returns the digest, and whether the artifact's tag referred to this digest before. In
// that case, only missing parts are added. If a tag refers to another digest, the error is [fault.PublishRefused] and
// nothing is changed.
func Publish(ctx context.Context, repo *registry.Repository, a Artifact) (digest string, existed bool, err error) {
	digest, existed, err = publish(ctx, repo, a)
	if err != nil {
		return "", false, fmt.Errorf("publish driver %s for kernel %s: %w", a.Identity.Driver, a.Kernel, err)
	}
	return digest, existed, nil
}

func publish(ctx context.Context, repo *registry.Repository, a Artifact) (string, bool, error) {
	hash, err := a.Image.Digest()
	if err != nil {
		return "", false, err
	}
	digest := hash.String()
	existed, err := checkTags(ctx, repo, digest, a)
	if err != nil {
		return "", false, err
	}
	subject, err := repo.Push(ctx, a.Image)
	if err != nil {
		return "", false, err
	}
	return digest, existed, finish(ctx, repo, subject, a)
}

// Attest is like [Publish], for an artifact that is in the repository already. It attaches missing statements and adds
// the tags for this COS build. It does not use a.Image.
func Attest(ctx context.Context, repo *registry.Repository, digest string, a Artifact) error {
	err := func() error {
		if _, err := checkTags(ctx, repo, digest, a); err != nil {
			return err
		}
		subject, err := repo.Resolve(ctx, digest)
		if err != nil {
			return err
		}
		return finish(ctx, repo, subject, a)
	}()
	if err != nil {
		return fmt.Errorf("attach the attestations of driver %s for kernel %s: %w", a.Identity.Driver, a.Kernel, err)
	}
	return nil
}

func (a Artifact) tags() []string {
	return []string{bundle.Tag(a.Identity), bundle.KernelTag(a.Kernel, a.Identity.Driver)}
}

// CheckTags returns a [fault.PublishRefused] error if [Publish] or [Attest] would refuse the artifact with this digest,
// because a tag refers to another one.
func CheckTags(ctx context.Context, repo *registry.Repository, digest string, a Artifact) error {
	if _, err := checkTags(ctx, repo, digest, a); err != nil {
		return fmt.Errorf("publish driver %s for %s: %w", a.Identity.Driver, a.Kernel, err)
	}
	return nil
}

// checkTags checks both tags before anything is sent, and returns whether the artifact's own tag exists.
func checkTags(ctx context.Context, repo *registry.Repository, digest string, a Artifact) (existed bool, err error) {
	for i, tag := range a.tags() {
		have, ok, err := Existing(ctx, repo, tag)
		if err != nil {
			return false, err
		}
		if ok && have != digest {
			return false, fault.New(fault.PublishRefused,
				fmt.Sprintf("tag %s refers to artifact %s already; this build made %s", tag, have, digest),
				"equal inputs give equal digests; to see what differs, run \"builder reproduce\" on the published artifact; "+
					"if the published artifact is wrong, remove the tag by hand")
		}
		if i == 0 {
			existed = ok
		}
	}
	return existed, nil
}

// finish attaches the statements to a stored image and adds the tags.
func finish(ctx context.Context, repo *registry.Repository, subject v1.Descriptor, a Artifact) error {
	_, err := attach(ctx, repo, subject, a)
	if err == nil {
		err = settle(ctx, repo, subject, a)
	}
	if err != nil {
		return err
	}
	for _, tag := range a.tags() {
		if err := repo.Tag(ctx, subject, tag); err != nil {
			return err
		}
	}
	return nil
}

// finished returns the time in the new provenance, or zero.
func (a Artifact) finished() (at time.Time) {
	for _, raw := range a.Bundles {
		if a.Verifier == nil {
			break
		}
		if st, err := a.Verifier.Statement(raw); err == nil && at.IsZero() {
			at = trust.FinishedOn(st)
		}
	}
	return at
}

// proofKey returns a key for what a statement proves. One statement for each key is enough.
func proofKey(st *trust.Statement) string {
	if m, err := trust.ParseKernelMatch(st); err == nil {
		return st.PredicateType + " " + m.Kernel.String() + " " + string(m.Fingerprint)
	}
	if r, err := trust.ParseTestResult(st); err == nil {
		return st.PredicateType + " " + r.LoadTest.Kernel.String() + " " + r.LoadTest.Verdict
	}
	return st.PredicateType
}
