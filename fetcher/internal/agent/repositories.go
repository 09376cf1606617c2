package agent

import (
	"bytes"
	"context"
	"slices"
	"sync"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/trust"
)

// judge reads the signed statements of an artifact and verifies them. It reads no layer. If the statements of one
// repository do not do, it tries the next repository. The result repo is the repository whose statements verified.
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
	// first, so that nothing from the next repository pushes them out.
	var known [][]byte
	counts := useful(v, answer.Digest)
	err = a.tryEach(ctx, answer.Digest, a.repositories(answer.Repository, origin), func(ref string) (err error) {
		if repo, err = a.parts.Open(ref); err != nil {
			return err
		}
		if p, err = readEvidence(ctx, repo, v, answer.Digest, facts); err != nil {
			return err
		}
		p.Bundles = union(known, p.Bundles)
		known = slices.DeleteFunc(slices.Clone(p.Bundles), func(b []byte) bool { return counts(b) == "" })
		refresh()
		now := a.since(store, origin, answer, facts)
		content, verdict, err = a.verify(p, origin, answer.Digest, answer.Driver, facts, now)
		return err
	})
	return repo, p, content, verdict, err
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
// ones. What this node compiled is only on its disk.
func (a *Agent) repositories(own string, origin install.Origin) []string {
	if origin == install.MadeHere {
		return []string{own}
	}
	return resolve.Repositories(own, a.parts.Registries)
}

// tryEach is [resolve.TryEach] that logs which repository failed, and why.
func (a *Agent) tryEach(ctx context.Context, digest string, refs []string, use func(ref string) error) error {
	return resolve.TryEach(ctx, refs, use, func(ref string, err error) {
		a.parts.Log.WarnContext(ctx, "repository not usable, tried the next one", "repository", ref, "digest", digest,
			"err", err)
	})
}
