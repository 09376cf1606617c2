package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// reader reads the artifacts of an untrusted registry. It accepts only statements with a trusted signature.
type reader struct {
	repo     *registry.Repository
	verifier *trust.Verifier
	now      time.Time
}

// artifact is one artifact of a registry.
type artifact struct {
	digest   string
	identity bundle.Identity
	// kernels are the kernels for which the artifact is verified. If there are none, err says why.
	kernels []target.Kernel
	err     error
}

// readAtOnce is the maximum number of simultaneous requests to the registry. maxAttestations is the maximum number of
// kernels of one artifact.
const (
	readAtOnce      = 8
	maxAttestations = 5000
)

// listTag matches the tags under which clients without the referrers API keep the list of an image's referrers, or, as
// cosign does, its signatures. Clients move these tags.
var listTag = regexp.MustCompile(`^sha(256|512)-([0-9a-f]{64}|[0-9a-f]{128})(\.(sig|att|sbom))?$`)

// readAll returns each tagged artifact once, sorted by digest.
func (r *reader) readAll(ctx context.Context) ([]artifact, error) {
	tags, err := r.repo.Tags(ctx)
	if fault.Is(err, fault.NoArtifact) {
		return nil, nil // nothing was ever published
	}
	if err != nil {
		return nil, err
	}
	tags = slices.DeleteFunc(tags, listTag.MatchString)
	digests := make([]string, len(tags))
	if err := r.forEach(ctx, len(tags), func(ctx context.Context, i int) error {
		d, err := r.repo.Resolve(ctx, tags[i])
		switch {
		case fault.Is(err, fault.NoArtifact), fault.Is(err, fault.Usage): // the tag was removed since, or is not valid
			return nil
		case err != nil:
			return err
		}
		digests[i] = d.Digest.String()
		return nil
	}); err != nil {
		return nil, err
	}
	slices.Sort(digests)
	digests = slices.DeleteFunc(slices.Compact(digests), func(d string) bool { return d == "" })
	held := make([]artifact, len(digests))
	err = r.forEach(ctx, len(digests), func(ctx context.Context, i int) (err error) {
		held[i], err = r.readOne(ctx, digests[i])
		return err
	})
	return held, err
}

func (r *reader) forEach(ctx context.Context, n int, do func(context.Context, int) error) error {
	group, running := errgroup.WithContext(ctx)
	group.SetLimit(readAtOnce)
	for i := range n {
		if running.Err() != nil {
			break
		}
		group.Go(func() error { return do(running, i) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// isArtifactError reports whether an error is about the artifact itself. Other errors are failures to read it.
func isArtifactError(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	switch fault.Of(err) {
	case fault.Unverified, fault.Mismatch, fault.NoArtifact, fault.LoadTestFailed, fault.Rejected:
		return true
	}
	return false
}

// readOne reads an artifact. It returns an error only if the registry failed. An error about the artifact is in the
// result's field err.
func (r *reader) readOne(ctx context.Context, digest string) (artifact, error) {
	a := artifact{digest: digest}
	err := r.read(ctx, &a)
	if err != nil && !isArtifactError(ctx, err) {
		return a, err
	}
	a.err = err
	return a, nil
}

func (r *reader) read(ctx context.Context, a *artifact) error {
	manifest, err := r.repo.Manifest(ctx, a.digest)
	if err != nil {
		return err
	}
	config, err := bundle.ConfigDescriptor(manifest)
	if err != nil {
		return err
	}
	raw, err := r.repo.Small(ctx, config)
	if err != nil {
		return err
	}
	content, err := bundle.ParseManifest(manifest, raw)
	if err != nil {
		return err
	}
	a.identity = content.Identity
	candidates, err := r.candidates(ctx, a.digest)
	if err != nil {
		return err
	}
	var refusal error
	for _, k := range candidates {
		m, err := r.verify(ctx, a, k)
		switch {
		case err == nil:
			a.kernels = append(a.kernels, m.Kernel)
		case !isArtifactError(ctx, err):
			return err
		case refusal == nil:
			refusal = err
		}
	}
	if len(a.kernels) > 0 {
		return nil // a candidate that was refused does not matter: anybody can write a label
	}
	if refusal == nil {
		refusal = fault.Wrap(fault.Unverified, trust.ErrNoKernelMatch, "")
	}
	return refusal
}

// candidates returns the kernels that an artifact's statements are about. It takes them from the labels, or from the
// statement itself if it has no label. The caller has to verify each kernel, because anybody can write a label.
func (r *reader) candidates(ctx context.Context, digest string) ([]target.Kernel, error) {
	attached, err := r.repo.Referrers(ctx, digest, "")
	if err != nil {
		return nil, err
	}
	found := map[string]target.Kernel{}
	for _, d := range attached {
		if d.Annotations[trust.LabelPredicate] != trust.PredicateKernelMatch {
			continue
		}
		buildID, board, _ := strings.Cut(d.Annotations[trust.LabelKernel], "/")
		if k, err := target.ParseKernel(buildID, board); err == nil {
			found[k.String()] = k
		}
	}
	bundles, err := r.repo.AttachedIf(
		ctx,
		digest,
		trust.ArtifactTypeBundle,
		trust.Useful(r.verifier, digest),
		trust.OfType(trust.PredicateKernelMatch),
	)
	if err != nil {
		return nil, err
	}
	for _, st := range r.verifier.Statements(bundles, digest, trust.PredicateKernelMatch) {
		if m, err := trust.ParseKernelMatch(st); err == nil {
			k, err := target.ParseKernel(m.Kernel.BuildID, m.Kernel.Board)
			if err == nil {
				found[k.String()] = k
			}
		}
	}
	if len(found) > maxAttestations {
		return nil, fault.Errorf(
			fault.Unverified,
			"the artifact has statements for %d kernels; want at most %d kernels",
			len(found),
			maxAttestations,
		)
	}
	all := make([]target.Kernel, 0, len(found))
	for _, k := range found {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b target.Kernel) int { return strings.Compare(a.String(), b.String()) })
	return all, nil
}

// verify makes the checks that a node with kernel k makes. It returns the signed kernel match, with further facts about
// the kernel.
func (r *reader) verify(ctx context.Context, a *artifact, k target.Kernel) (trust.KernelMatch, error) {
	bundles, err := r.repo.AttachedIf(
		ctx,
		a.digest,
		trust.ArtifactTypeBundle,
		trust.Useful(r.verifier, a.digest),
		r.verifier.Wanted(k)...,
	)
	if err != nil {
		return trust.KernelMatch{}, err
	}
	verdict, err := r.verifier.Verify(
		bundles,
		trust.Expect{Digest: a.digest, Kernel: k, Driver: a.identity.Driver, Identity: a.identity, Now: r.now},
	)
	if err != nil {
		return trust.KernelMatch{}, err
	}
	if err := verdict.Match.Kernel.Check(); err != nil {
		return trust.KernelMatch{}, fault.Wrap(fault.Unverified, fmt.Errorf("check the kernel match: %w", err), "")
	}
	return verdict.Match, nil
}
