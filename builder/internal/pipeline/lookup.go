package pipeline

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/builder/internal/gpus"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/trust"
)

// publication has the destinations of an artifact, and the keys with which the artifact is signed.
type publication struct {
	signer       *sign.Signer
	verifier     *trust.Verifier
	signing      signing
	gpus         *gpulist.List // nil if the release has no list
	destinations []destination
	buckets      []*tarball.Bucket
	// found is an artifact that every destination has and that this run can reuse, or nil.
	found *artifact
}

// destination is one OCI repository to publish to.
type destination struct {
	name string
	repo *registry.Repository
	// published is the digest to which the artifact's tag refers, or "".
	published string
}

// close closes the buckets. The publication may be nil.
func (o *publication) close() error {
	if o == nil {
		return nil
	}
	var errs []error
	for _, b := range o.buckets {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// lookUp asks every repository whether it has the artifact of this cell already. If this run cannot reuse an artifact,
// lookUp checks that it can publish to every destination. Keys and destinations are opened here, so a wrong one ends
// the build before the compile.
//
// The caller must close the publication, even after an error.
func (r *run) lookUp(ctx context.Context, in *inputs) (to *publication, note string, err error) {
	to = &publication{}
	if err := r.open(ctx, in, to); err != nil {
		return to, "", err
	}
	if err := r.checkLicence(ctx, to); err != nil {
		return to, "", err
	}
	if note, err = r.findPublished(ctx, in, to); err != nil || to.found != nil {
		return to, note, err
	}
	if err := r.checkKernelTags(ctx, in, to); err != nil {
		return to, "", err
	}
	if err := r.chooseRecipe(ctx, in, to); err != nil {
		return to, "", err
	}
	for _, p := range to.destinations {
		if err := p.repo.CheckPush(ctx); err != nil {
			return to, "", fmt.Errorf("publish to %s: %w", p.name, err)
		}
	}
	return to, note, r.checkBuckets(ctx)
}

// checkBuckets checks that this run can publish to every bucket and folder. If Google says that the account lacks a
// permission, checkBuckets only warns. Google's response is about the whole bucket, and the account may still have the
// permission for some names in it.
func (r *run) checkBuckets(ctx context.Context) error {
	for _, dest := range r.cfg.Destinations {
		if !tarball.Is(dest) {
			continue
		}
		err := tarball.CheckWrite(ctx, dest)
		if fault.Is(err, fault.PublishRefused) && !strings.HasPrefix(dest, "file:") {
			r.progress("look up")(fmt.Sprintf("publishing may fail after the compile: %v; %s", err, fault.Hint(err)))
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// open opens the keys and the destinations.
func (r *run) open(ctx context.Context, in *inputs, to *publication) (err error) {
	if to.signer, err = sign.LoadSigner(ctx, r.cfg.Key, r.cfg.KeyOptions...); err != nil {
		return err
	}
	if to.verifier, err = to.signer.Verifier(); err != nil {
		return err
	}
	if to.signing, err = r.openSigning(ctx, in); err != nil {
		return err
	}
	switch to.gpus, err = gpus.Read(in.release.Dir, in.release.Version); {
	case fault.Is(err, fault.Unverified): // the list is optional
		to.gpus = nil
		r.progress("look up")(fmt.Sprintf("the artifact gets no list of supported GPUs: %v", err))
	case err != nil:
		return err
	case to.gpus != nil && len(to.gpus.LeftOut) > 0:
		r.progress("look up")("cannot read these entries of supported-gpus.json: " + strings.Join(to.gpus.LeftOut, "; "))
	}
	for _, dest := range r.cfg.Destinations {
		if tarball.Is(dest) {
			b, err := tarball.Open(ctx, dest)
			if err != nil {
				return err
			}
			to.buckets = append(to.buckets, b)
			continue
		}
		repo, err := registry.Open(dest, r.cfg.RegistryOptions(dest))
		if err != nil {
			return err
		}
		to.destinations = append(to.destinations, destination{name: dest, repo: repo})
	}
	return nil
}

// findPublished asks every repository for the artifact. If all have the same artifact and this run can reuse it,
// findPublished sets to.found.
func (r *run) findPublished(ctx context.Context, in *inputs, to *publication) (note string, err error) {
	r.res.Tag = bundle.Tag(bundle.Identity{Fingerprint: in.kernel.Fingerprint, Driver: in.driver})
	if len(to.destinations) == 0 {
		return "no destination to check", nil
	}
	everywhere := true
	for i := range to.destinations {
		p := &to.destinations[i]
		if p.published, _, err = publish.Existing(ctx, p.repo, r.res.Tag); err != nil {
			return "", err
		}
		everywhere = everywhere && p.published != "" && p.published == to.destinations[0].published
	}
	if !everywhere {
		return "not published yet", nil
	}
	found, reason, err := r.reuse(ctx, in, to, to.destinations[0].published)
	switch {
	case fault.Is(err, fault.Unverified) || fault.Is(err, fault.Mismatch) || fault.Is(err, fault.NoArtifact):
		fmt.Fprintf(r.log, "tag %s exists, but this build cannot reuse its artifact: %v\n", r.res.Tag, err)
		return "published, but cannot be reused", nil
	case err != nil:
		return "", err
	case reason != "":
		return "published, " + reason, nil
	}
	to.found, r.res.Digest, r.res.Reused, r.res.Layers = found, found.digest, true, found.layers
	return "published already", nil
}

// reuse decides whether this run can reuse the published artifact. In every repository, the artifact must be complete,
// signed with our key, and made for this fingerprint and driver from this runfile. Only the statement that it fits this
// COS build may be missing. If reuse returns neither an artifact nor an error, the second result is the reason.
func (r *run) reuse(ctx context.Context, in *inputs, to *publication, digest string) (found *artifact, reason string,
	err error) {
	if reason, err = r.isOld(ctx, to, digest); err != nil || reason != "" {
		if err == nil {
			err = r.checkRefused(in, to, digest)
		}
		if err == nil {
			r.endFresh, err = r.startFresh()
		}
		return nil, reason, err
	}
	if r.cfg.LoadTest == LoadTestRequire {
		return nil, "load test required", nil
	}
	if r.cfg.DebugSymbols {
		if have, err := to.haveSymbols(ctx, digest); err != nil || !have {
			return nil, "debug symbols wanted", err
		}
	}
	found = &artifact{digest: digest}
	everywhere := true
	for _, p := range to.destinations {
		content, attested, err := verifyPublished(ctx, in, to, p, digest)
		if err != nil {
			return nil, "", err
		}
		// If no kernel match for this COS build is published, and the kernel can be booted, a load test has to run first.
		if !attested && r.cfg.LoadTest != LoadTestOff && (in.kernel.Boot != "" || in.kernel.HasVMLinux) {
			return nil, "not load-tested on this COS build yet", nil
		}
		everywhere = everywhere && attested
		found.identity, found.layers = content.Identity, nil
		for _, l := range content.Layers {
			found.layers = append(found.layers, bundle.Layer{Kind: l.Kind, Digest: l.Digest, DiffID: l.DiffID, Size: l.Size})
		}
	}
	if everywhere {
		return found, "", nil
	}
	// Only now, after every check, this run signs that the artifact fits the COS build.
	statement, err := sign.KernelMatch(digest, in.kernel.Kernel, in.kernel.Fingerprint, in.driver)
	if err != nil {
		return nil, "", err
	}
	match, err := sign.Bundle(ctx, to.signer, statement)
	found.bundles = [][]byte{match}
	return found, "", err
}

// isOld returns why the artifact must be built again: in a repository, the newest provenance is older than
// Config.RebuildAfter, or no provenance by our key says the age. It returns "" if the artifact is young enough.
//
// After a change of the key, no artifact has a provenance by the new key. This run ignores the times in provenances by
// the former key, like all statements by that key, because it does not know whether anybody still trusts that key.
func (r *run) isOld(ctx context.Context, to *publication, digest string) (reason string, err error) {
	if r.cfg.RebuildAfter <= 0 {
		return "", nil
	}
	for _, p := range to.destinations {
		attached, err := p.repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(to.verifier, digest),
			trust.OfType(trust.PredicateProvenance))
		if err != nil {
			return "", err
		}
		var built time.Time
		for _, st := range to.verifier.Statements(attached, digest, trust.PredicateProvenance) {
			if at := trust.FinishedOn(st); at.After(built) && !at.After(r.started.Add(24*time.Hour)) { // no future time
				built = at
			}
		}
		switch {
		case built.IsZero():
			return fmt.Sprintf("to be built again, because no provenance by %s says its age", to.signer), nil
		case r.started.Sub(built) >= r.cfg.RebuildAfter:
			return "to be built again because of its age", nil
		}
	}
	return "", nil
}

// verifyPublished verifies the artifact with this digest in one repository, as if it had a kernel match for this COS
// build. attested is true if the artifact already has this kernel match.
func verifyPublished(ctx context.Context, in *inputs, to *publication, p destination,
	digest string) (content bundle.Content, attested bool, err error) {
	content, err = publish.Content(ctx, p.repo, digest)
	if err != nil {
		return content, false, err
	}
	attached, err := p.repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(to.verifier, digest),
		trust.Wanted(in.kernel.Kernel)...)
	if err != nil {
		return content, false, err
	}
	expect := trust.Expect{Digest: digest, Kernel: in.kernel.Kernel, Driver: in.driver, Identity: content.Identity}
	match := trust.KernelMatch{Kernel: in.kernel.Kernel, Fingerprint: in.kernel.Fingerprint}
	verdict, err := to.verifier.VerifyBefore(match, attached, expect)
	if err != nil {
		return content, false, err
	}
	if !slices.ContainsFunc(verdict.Materials, func(m trust.Material) bool { return m.Digest == in.release.Digest }) {
		return content, false, fault.Errorf(fault.Mismatch, "artifact %s was not made from runfile %s", digest,
			in.release.Digest)
	}
	for _, st := range to.verifier.Statements(attached, digest, trust.PredicateProvenance) {
		have, err := moduleSignerOf(st)
		if err != nil {
			return content, false, err
		}
		if !to.signing.accepts(have, in, verdict.Materials) {
			return content, false, fault.Errorf(fault.Mismatch,
				"the modules of artifact %s are %s; this build makes modules with other signatures, or with none", digest, have)
		}
	}
	for _, l := range content.Layers {
		if err := publish.CheckLayer(ctx, p.repo, l); err != nil {
			return content, false, err
		}
	}
	_, err = to.verifier.Verify(attached, expect)
	return content, err == nil, nil
}
