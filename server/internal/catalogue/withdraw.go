package catalogue

import (
	"context"
	"fmt"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// Yank marks an artifact, so that no node gets it any more. It also stores the replacement, if there is one.
func (c *Catalogue) Yank(ctx context.Context, digest string, y api.YankRequest) (api.Artifact, error) {
	reason := strings.TrimSpace(y.Reason)
	if reason == "" || len(reason) > 1000 {
		return api.Artifact{}, fault.New(
			fault.Usage,
			"yank the artifact "+digest+": want a reason of 1 to 1000 bytes",
			"give the reason that nodes will show: --reason WHY",
		)
	}
	if err := checkLine("reason", reason); err != nil {
		return api.Artifact{}, fault.Wrap(fault.Usage, fmt.Errorf("yank the artifact %s: %w", digest, err), "")
	}
	if y.Replacement != "" && !digestPattern.MatchString(y.Replacement) {
		return api.Artifact{}, badDigest(y.Replacement)
	}
	return c.setState(ctx, digest, api.Yanked, reason, func(tx *store.Tx, a api.Artifact) error {
		if y.Replacement == "" {
			return nil
		}
		if err := checkReplacement(ctx, tx, a, y.Replacement); err != nil {
			return fmt.Errorf("yank the artifact %s: %w", digest, err)
		}
		return tx.SetReplacement(ctx, digest, y.Replacement)
	})
}

// checkReplacement returns an error unless the artifact with the given digest can replace the old one.
func checkReplacement(ctx context.Context, tx *store.Tx, old api.Artifact, digest string) error {
	a, err := tx.Artifact(ctx, digest)
	if err != nil {
		return err
	}
	newer := target.CompareVersions(a.Driver.Version, old.Driver.Version)
	var why string
	switch {
	case a.Digest == old.Digest:
		why = "it is the yanked artifact itself"
	case a.State != api.Published:
		why = "it is " + string(a.State)
	case a.Fingerprint != old.Fingerprint:
		why = "it is for kernels of fingerprint " + a.Fingerprint.Short() + ", not " + old.Fingerprint.Short()
	case newer < 0:
		why = fmt.Sprintf("its driver %s is older than %s", a.Driver.Version, old.Driver.Version)
	case newer == 0 && a.Driver.Flavour != old.Driver.Flavour:
		why = fmt.Sprintf("its flavour is %s, not %s", a.Driver.Flavour, old.Driver.Flavour)
	default:
		return nil
	}
	return fault.New(
		fault.Mismatch,
		fmt.Sprintf("replacement %s does not fit: %s", digest, why),
		"give a published artifact for the same kernels, with the same or a newer version of the driver",
	)
}

// Unyank makes a yanked artifact usable again.
func (c *Catalogue) Unyank(ctx context.Context, digest string) (api.Artifact, error) {
	return c.setState(ctx, digest, api.Published, "", func(tx *store.Tx, old api.Artifact) error {
		if old.State == api.Quarantined {
			return fault.New(
				fault.Mismatch,
				"artifact "+digest+" is not yanked, it is in quarantine",
				"to end the quarantine, run: server lift "+digest,
			)
		}
		return tx.IgnoreFailuresBefore(ctx, digest, c.Now())
	})
}

// Lift makes a quarantined artifact usable again. Earlier failures do not count any more.
func (c *Catalogue) Lift(ctx context.Context, digest string) (api.Artifact, error) {
	return c.setState(ctx, digest, api.Published, "", func(tx *store.Tx, old api.Artifact) error {
		if old.State != api.Quarantined {
			return fault.New(fault.Mismatch, fmt.Sprintf("artifact %s is not in quarantine, but %s", digest, old.State),
				"take the digest from the list of quarantined artifacts: server quarantine")
		}
		return tx.IgnoreFailuresBefore(ctx, digest, c.Now())
	})
}

// ForgetAbsent removes a published artifact that a repository of this server lacks. Its cells can then be built again.
// A yanked or quarantined artifact stays in the catalogue: otherwise, after a new push, nodes would get the same
// content again.
func (c *Catalogue) ForgetAbsent(ctx context.Context, digest string) error {
	if !digestPattern.MatchString(digest) {
		return badDigest(digest)
	}
	err := c.Store.Write(ctx, func(tx *store.Tx) error {
		a, err := tx.Artifact(ctx, digest)
		if err != nil {
			return err
		}
		name, local := strings.CutPrefix(a.Repository, "/")
		held := false
		if local && c.HasManifest != nil {
			if held, err = c.HasManifest(ctx, name, digest); err != nil {
				return err
			}
		}
		var why string
		switch {
		case !local:
			why = "it is in the repository " + a.Repository + ", which this server does not keep"
		case a.State.Withdrawn():
			why = "it is " + string(a.State)
		case held || c.HasManifest == nil:
			why = "the repository " + a.Repository + " has its manifest"
		default:
			_, err = tx.DropArtifact(ctx, a.Repository, digest)
			return err
		}
		return fault.New(fault.Mismatch, why, "so that no node gets the artifact, run: server yank "+digest+" --reason WHY")
	})
	if err != nil {
		return fmt.Errorf("forget the artifact %s: %w", digest, err)
	}
	c.Log.InfoContext(ctx, "absent artifact removed from the catalogue", "digest", digest)
	return nil
}

// FreeTags allows other content for the tags of an artifact that was deleted from this server's registry. Without this
// call, these tags are create-only for ever.
func (c *Catalogue) FreeTags(ctx context.Context, digest string) (api.FreedTags, error) {
	if !digestPattern.MatchString(digest) {
		return api.FreedTags{}, badDigest(digest)
	}
	var freed []string
	if c.FreeDeletedTags != nil {
		var err error
		if freed, err = c.FreeDeletedTags(ctx, digest); err != nil {
			return api.FreedTags{}, fmt.Errorf("free the tags of %s: %w", digest, err)
		}
	}
	if len(freed) == 0 {
		return api.FreedTags{}, fault.New(
			fault.NotFound,
			"free the tags of "+digest+": this server's registry has no tag of a deleted manifest with this digest",
			"delete the manifest first; if that is done, take the digest from the message of the refused push",
		)
	}
	c.Log.InfoContext(ctx, "tags freed", "digest", digest, "tags", freed)
	return api.FreedTags{Tags: freed}, nil
}

// setState sets the state of an artifact. In the same transaction it calls more, which may be nil, with the former
// artifact. An artifact that becomes usable again leaves the catalogue if its manifest was deleted meanwhile: the
// returned artifact then has state Unknown, and its cells can be built again.
func (c *Catalogue) setState(
	ctx context.Context, digest string, state api.State, reason string, more func(*store.Tx, api.Artifact) error,
) (a api.Artifact, err error) {
	if !digestPattern.MatchString(digest) {
		return a, badDigest(digest)
	}
	err = c.Store.Write(ctx, func(tx *store.Tx) error {
		old, err := tx.Artifact(ctx, digest)
		if err != nil {
			return err
		}
		if err := tx.SetArtifactState(ctx, digest, state, reason, c.Now()); err != nil {
			return err
		}
		if more != nil {
			if err := more(tx, old); err != nil {
				return err
			}
		}
		if state == api.Published {
			switch held, err := c.holdsManifest(ctx, old); {
			case err != nil:
				return err
			case !held:
				a = old
				a.State, a.Replacement, a.WithdrawnAt = api.Unknown, "", nil
				a.Reason = "its manifest was deleted from the registry"
				_, err := tx.DropArtifact(ctx, old.Repository, digest)
				return err
			}
		}
		a, err = tx.Artifact(ctx, digest)
		return err
	})
	if err == nil {
		c.Log.InfoContext(ctx, "artifact marked", "digest", digest, "state", a.State, "reason", a.Reason,
			"replacement", a.Replacement)
	}
	return a, err
}

// setWithdrawn sets the state, reason and hint of a withdrawn artifact.
func setWithdrawn(r *api.Resolution, a *store.Candidate) {
	r.State, r.Reason, r.Hint = a.State, a.Reason, "choose another driver version"
	if a.State == api.Quarantined {
		r.Hint += "; if this artifact is good after all, run: server lift " + a.Digest
	}
	if r.Replacement = a.Replacement; a.Replacement != "" {
		r.Reason += "; artifact " + a.Replacement + " replaces it"
		r.Hint = "use the replacement: --driver " + a.Replacement
	}
}
