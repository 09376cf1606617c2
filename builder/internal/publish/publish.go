// Package publish puts an artifact into a repository so that nobody ever sees
// half of it: blobs, manifest, signed statements, and only then the names by
// which it is found. It may be interrupted anywhere and run again. It refuses
// to replace what is published.
package publish

import (
	"context"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// ArtifactTypeLog is the type under which a build log is attached: see [PackLog].
const ArtifactTypeLog = "application/vnd.prebake.build-log.v1+zstd"

// Artifact is everything that is published at once.
type Artifact struct {
	Image    v1.Image
	Identity bundle.Identity
	// Kernel is the COS build for which it is published this time.
	Kernel target.Kernel
	// Bundles are the signed statements: provenance, the kernel match for
	// Kernel, test result, contents.
	Bundles [][]byte
	// Verifier reads statements that are attached already, so that equal ones
	// are not attached again: signatures differ each time. Nil attaches always.
	Verifier *trust.Verifier
	// Log is the build log as [PackLog] returns it; nil attaches none. It is
	// attached with the provenance that names it, and left out where another
	// run's provenance is there already.
	Log []byte
}

// Existing returns the digest that a tag names in a repository, if it names
// one. The caller verifies its statements before it relies on them.
func Existing(ctx context.Context, repo *registry.Repository, tag string) (digest string, ok bool, err error) {
	d, err := repo.Resolve(ctx, tag)
	// A registry that makes repositories on push, as Quay does, lets nobody read
	// one that it has not made yet. To who may push there, it has nothing.
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

// Content reads what the artifact with this digest holds: its manifest, whose
// bytes are compared with the digest, and its config.
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

// Publish stores an artifact and returns its digest; existed says that its tag
// was there before, with this digest. Then only what is missing is added, such
// as the statement for another COS build with this fingerprint. A tag that
// names another digest is [fault.PublishRefused], and nothing was changed.
func Publish(ctx context.Context, repo *registry.Repository, a Artifact) (digest string, existed bool, err error) {
	digest, existed, err = publish(ctx, repo, a)
	if err != nil {
		return "", false, fmt.Errorf("publish driver %s for %s: %w", a.Identity.Driver, a.Kernel, err)
	}
	return digest, existed, nil
}

func publish(ctx context.Context, repo *registry.Repository, a Artifact) (string, bool, error) {
	hash, err := a.Image.Digest()
	if err != nil {
		return "", false, err
	}
	digest := hash.String()
	existed, err := checkNames(ctx, repo, digest, a)
	if err != nil {
		return "", false, err
	}
	subject, err := repo.Push(ctx, a.Image)
	if err != nil {
		return "", false, err
	}
	return digest, existed, finish(ctx, repo, subject, a)
}

// Attest does what [Publish] does for an artifact that is in the repository:
// it attaches the statements that are missing, and the names by which the
// kernel's build finds it. Image is not needed.
func Attest(ctx context.Context, repo *registry.Repository, digest string, a Artifact) error {
	err := func() error {
		if _, err := checkNames(ctx, repo, digest, a); err != nil {
			return err
		}
		subject, err := repo.Resolve(ctx, digest)
		if err != nil {
			return err
		}
		return finish(ctx, repo, subject, a)
	}()
	if err != nil {
		return fmt.Errorf("attest driver %s for %s: %w", a.Identity.Driver, a.Kernel, err)
	}
	return nil
}

func (a Artifact) tags() []string {
	return []string{bundle.Tag(a.Identity), bundle.KernelTag(a.Kernel, a.Identity.Driver)}
}

// checkNames examines both names before the first byte is sent; existed says that
// the artifact's own is there.
func checkNames(ctx context.Context, repo *registry.Repository, digest string, a Artifact) (existed bool, err error) {
	for i, tag := range a.tags() {
		have, ok, err := Existing(ctx, repo, tag)
		if err != nil {
			return false, err
		}
		if ok && have != digest {
			return false, fault.New(fault.PublishRefused,
				fmt.Sprintf("tag %s names %s already; this build made %s", tag, have, digest),
				"equal inputs give equal digests, so find out what differs; remove the tag by hand if the published artifact "+
					"is wrong")
		}
		if i == 0 {
			existed = ok
		}
	}
	return existed, nil
}

// finish makes a stored image an artifact that can be found.
func finish(ctx context.Context, repo *registry.Repository, subject v1.Descriptor, a Artifact) error {
	if err := attach(ctx, repo, subject, a); err != nil {
		return err
	}
	for _, tag := range a.tags() {
		if err := repo.Tag(ctx, subject, tag); err != nil {
			return err
		}
	}
	return nil
}

// attach adds the statements that are missing. A log goes before them, so that
// what a provenance names is there.
func attach(ctx context.Context, repo *registry.Repository, subject v1.Descriptor, a Artifact) error {
	digest := subject.Digest.String()
	present := map[string]bool{}
	if a.Verifier != nil {
		var wanted []map[string]string
		for _, raw := range a.Bundles {
			wanted = append(wanted, labels(raw))
		}
		attached, err := repo.Attached(ctx, digest, trust.ArtifactTypeBundle, wanted...)
		if err != nil {
			return err
		}
		for _, raw := range attached {
			// What cannot be verified is somebody else's, and says nothing.
			if st, err := a.Verifier.Statement(raw); err == nil && st.About(digest) {
				present[proves(st)] = true
			}
		}
	}
	if a.Log != nil && !present[trust.PredicateProvenance] {
		if _, err := repo.Attach(ctx, subject, ArtifactTypeLog, a.Log, nil); err != nil {
			return err
		}
	}
	for _, raw := range a.Bundles {
		if a.Verifier != nil {
			st, err := a.Verifier.Statement(raw)
			if err != nil {
				return fmt.Errorf("check own statement: %w", err)
			}
			if !st.About(digest) {
				return fault.Errorf(fault.Internal, "check own statement of type %s: it is not about %s", st.PredicateType, digest)
			}
			if present[proves(st)] {
				continue
			}
		}
		if _, err := repo.Attach(ctx, subject, trust.ArtifactTypeBundle, raw, labels(raw)); err != nil {
			return err
		}
	}
	return nil
}

// proves sums up what a statement proves: two that say the same are one too many.
func proves(st *trust.Statement) string {
	if m, err := trust.ParseKernelMatch(st); err == nil {
		return st.PredicateType + " " + m.Kernel.String() + " " + string(m.Fingerprint)
	}
	if r, err := trust.ParseTestResult(st); err == nil {
		return st.PredicateType + " " + r.LoadTest.Kernel.String() + " " + r.LoadTest.Verdict
	}
	return st.PredicateType
}
