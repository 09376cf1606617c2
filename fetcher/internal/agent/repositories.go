package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// judge reads the signed statements of an artifact and verifies them. It reads no layer. If the statements of one
// repository are not enough, it tries the next repository. The result repo is the repository whose statements verified.
func (a *Agent) judge(ctx context.Context, store *install.Store, answer resolve.Answer,
	facts *host.Facts) (repo Repository, p evidence, content bundle.Content, verdict *trust.Verdict, err error) {
	origin := originOf(answer)
	v, err := a.verifierFor(origin)
	if err != nil {
		return nil, p, content, nil, err
	}
	refresh := sync.OnceFunc(func() {
		if origin != install.MadeHere {
			a.refresh(ctx)
		}
	})
	// The statements of a repository that failed still count, because one of them may refuse the artifact. They come
	// first, so that nothing from the next repository pushes them out. The next repository must also have the statements
	// that an earlier one lists but does not serve.
	var known [][]byte
	var unserved []unservedStatement
	counts := trust.Useful(v, answer.Digest)
	err = a.tryEach(ctx, answer.Digest, a.repositories(answer.Repository, origin), func(ref string) (err error) {
		if repo, err = a.parts.Open(ref); err != nil {
			return err
		}
		p, err = readEvidence(ctx, repo, v, answer.Digest, facts)
		p.Bundles = union(known, p.Bundles)
		known = slices.DeleteFunc(slices.Clone(p.Bundles), func(b []byte) bool { return counts(b) == "" })
		unserved = append(unserved, unservedBy(ref, err)...)
		denied, err := acceptDenied(ref, err)
		if err != nil {
			return err
		}
		refresh()
		now := a.since(store, origin, answer, facts)
		content, verdict, err = a.verify(p, origin, answer.Digest, answer.Driver, facts, now)
		if denied != nil && fault.Is(err, fault.Unverified) { // for example for want of a statement that was denied
			err = fault.Join(denied, err)
		}
		if err != nil || len(unserved) == 0 {
			return err
		}
		more, err := readUnserved(ctx, repo, unserved)
		if err != nil {
			return err
		}
		more = slices.DeleteFunc(more, func(b []byte) bool { return counts(b) == "" })
		p.Bundles = union(more, p.Bundles)
		content, verdict, err = a.verify(p, origin, answer.Digest, answer.Driver, facts, now)
		return err
	})
	return repo, p, content, verdict, err
}

// unservedStatement is a statement that a repository lists but did not serve, and that may refuse the artifact. If the
// repository served only a part of its list, one unservedStatement with digest "" stands for the missing part.
type unservedStatement struct{ by, digest string }

// unservedBy returns the statements that a repository listed but did not serve, according to err. It trusts the labels
// of statements, and leaves out statements whose labels say that they are no refusal. This is safe: a signer that
// attaches a refusal labels it as one, and a repository that changes labels could also leave the refusal out of its
// list.
func unservedBy(ref string, err error) (unserved []unservedStatement) {
	var failed interface {
		Unread() []v1.Descriptor
		IsCut() bool
	}
	if !errors.As(err, &failed) {
		return nil
	}
	if failed.IsCut() {
		unserved = append(unserved, unservedStatement{by: ref})
	}
	for _, d := range failed.Unread() {
		predicate, ok := d.Annotations[trust.LabelPredicate]
		verdict, tested := d.Annotations[trust.LabelVerdict]
		if !ok || predicate == trust.PredicateTestResult && (!tested || verdict == trust.VerdictRejected) {
			unserved = append(unserved, unservedStatement{ref, d.Digest.String()})
		}
	}
	return unserved
}

// acceptDenied sorts the error of [readEvidence]. If the repository only denied access to statements that cannot refuse
// the artifact, the error is the result denied. Otherwise it is the second result.
func acceptDenied(ref string, err error) (denied, _ error) {
	var failed interface{ IsDenied() bool }
	if !errors.As(err, &failed) || !failed.IsDenied() {
		return nil, err
	}
	unserved := unservedBy(ref, err)
	if len(unserved) == 0 {
		return err, nil
	}
	return nil, fault.Wrap(fault.Of(err),
		fmt.Errorf("statement %s may refuse the driver, and cannot be read: %w", short(unserved[0].digest), err),
		"let this node read every statement in "+ref+", or add a registry that serves this one: --registry REF")
}

// maxUnserved is the maximum number of unserved statements that readUnserved reads from a repository.
const maxUnserved = 256

// readUnserved reads the statements that earlier repositories listed but did not serve. If this repository lacks one,
// the error is of kind Transient, because the statement may refuse the artifact.
func readUnserved(ctx context.Context, repo Repository, unserved []unservedStatement) (bundles [][]byte, err error) {
	for i, o := range unserved {
		var b []byte
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hint := "a statement may refuse the driver: check " + o.by + ", or remove this repository from --registry"
		if o.digest == "" {
			return nil, fault.New(fault.Transient, "read statements: "+o.by+" served only a part of its list of statements",
				hint)
		}
		if b, err = readAttachment(ctx, repo, o.digest); err != nil || i == maxUnserved {
			return nil, fault.Wrap(fault.Transient, fmt.Errorf("read statement %s, which %s lists but does not serve: %w",
				short(o.digest), o.by, cmp.Or(err, errors.New("too many statements are missing in that repository"))), hint)
		}
		if b != nil {
			bundles = append(bundles, b)
		}
	}
	return bundles, nil
}

// readAttachment returns the payload of an attachment, or nil if the attachment cannot be a statement.
func readAttachment(ctx context.Context, repo Repository, digest string) ([]byte, error) {
	raw, err := repo.Manifest(ctx, digest)
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if json.Unmarshal(raw, &m) != nil || m.ArtifactType != trust.ArtifactTypeBundle || len(m.Layers) != 1 {
		return nil, nil
	}
	return repo.Small(ctx, m.Layers[0])
}

// union returns the bundles of both lists, each once.
func union(bundles, more [][]byte) [][]byte {
	for _, b := range more {
		if !slices.ContainsFunc(bundles, func(have []byte) bool { return bytes.Equal(have, b) }) {
			bundles = append(bundles, b)
		}
	}
	return bounded(bundles)
}

// fetchFromAny fetches the layers from the repository repo. If that fails, it fetches what is still missing from the
// other repositories. The report then counts the layers that arrived before as cached.
func (a *Agent) fetchFromAny(
	ctx context.Context,
	r *Report,
	repo Repository,
	store *install.Store,
	set *install.Set,
	id bundle.Identity,
	facts *host.Facts,
) error {
	refs := a.repositories(repo.Name(), set.Origin)
	if named := r.Answer.Repository; set.Origin != install.MadeHere && !slices.Contains(refs, named) {
		refs = append(refs, named) // it may have the layers, although its statements did not verify
	}
	plan := len(r.Plan)
	return a.tryEach(ctx, set.Digest, refs, func(ref string) (err error) {
		from := repo
		if ref != repo.Name() {
			if from, err = a.parts.Open(ref); err != nil {
				return err
			}
			r.Plan, r.FetchedBytes, r.CachedBytes = r.Plan[:plan], 0, 0
		}
		return a.fetch(ctx, r, from, store, set, id, facts)
	})
}

// repositories returns the references of the repositories that may have an artifact: its own, and then the configured
// ones. An artifact that this node compiled is only on its disk.
func (a *Agent) repositories(own string, origin install.Origin) []string {
	if origin == install.MadeHere {
		return []string{own}
	}
	return resolve.Repositories(own, a.parts.Registries)
}

// tryEach calls [resolve.TryEach], and logs which repository failed, and why.
func (a *Agent) tryEach(ctx context.Context, digest string, refs []string, use func(ref string) error) error {
	return resolve.TryEach(ctx, refs, use, func(ref string, err error) {
		a.parts.Log.WarnContext(ctx, "repository not usable, tried the next one", "repository", ref, "digest", digest,
			"err", err)
	})
}
