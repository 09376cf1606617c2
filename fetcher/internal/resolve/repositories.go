package resolve

import (
	"context"
	"fmt"
	"slices"

	"github.com/prebake/prebake/pkg/fault"
)

// Repositories returns the references of the repositories that may have one artifact, each once, in the order in which
// they are tried. An artifact is named by its digest and has signatures, so it does not matter which repository serves
// the artifact.
func Repositories(first string, others []string) []string {
	refs := []string{first}
	for _, ref := range others {
		if !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	return refs
}

// TryEach calls the function use with one reference after the other, until one call succeeds. It goes on only after an
// error that comes from the repository, and calls failed before it does. The error has the kind of the first error, and
// the texts of all.
func TryEach(ctx context.Context, refs []string, use func(ref string) error, failed func(ref string, err error)) error {
	var all error
	for i, ref := range refs {
		err := use(ref)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; error of repository %s: %w", all, ref, err)
		}
		if !ofRepository(err) {
			return all
		}
		if i < len(refs)-1 {
			failed(ref, err)
		}
	}
	return all
}

// ofRepository reports whether another repository may serve what this one did not. The kind Usage is that of a
// repository that denies access, or whose certificate is not trusted.
func ofRepository(err error) bool {
	switch fault.Of(err) {
	case fault.Transient, fault.TooMany, fault.WebPage, fault.Unverified, fault.NoArtifact, fault.Usage:
		return true
	}
	return false
}
