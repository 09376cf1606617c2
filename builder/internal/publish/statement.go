package publish

import (
	"context"
	"fmt"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/trust"
)

// Statement signs a statement about an artifact, attaches it, and returns the digest of the attached manifest. If this
// signer's statement of the same type exists, Statement attaches nothing and returns "".
func Statement(ctx context.Context, repo *registry.Repository, digest string, signer *sign.Signer,
	s sign.Statement) (string, error) {
	attached, err := func() (string, error) {
		verifier, err := signer.Verifier()
		if err != nil {
			return "", err
		}
		there, err := repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(verifier, digest),
			trust.OfType(s.PredicateType))
		if err != nil {
			return "", err
		}
		for _, raw := range there {
			if st, err := verifier.Statement(raw); err == nil && st.About(digest) && st.PredicateType == s.PredicateType {
				return "", nil
			}
		}
		raw, err := sign.Bundle(ctx, signer, s)
		if err != nil {
			return "", err
		}
		subject, err := repo.Resolve(ctx, digest)
		if err != nil {
			return "", err
		}
		d, err := repo.Attach(ctx, subject, trust.ArtifactTypeBundle, raw, labels(raw))
		return d.Digest.String(), err
	}()
	if err != nil {
		return "", fmt.Errorf("attach a statement of type %s: %w", s.PredicateType, err)
	}
	return attached, nil
}
