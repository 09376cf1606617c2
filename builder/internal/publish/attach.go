package publish

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/trust"
)

// A publisher checks the attachments again until quietLooks checks in a row find them all, but at most maxLooks times.
const (
	quietLooks = 2
	maxLooks   = 10
)

// settle looks again at the attachments, and attaches what is missing. This is necessary for registries without the
// referrers API. There, each builder reads the list of attachments, adds its entries and writes the list back. If two
// builders do so at once, the second overwrites the entries of the first. The first may have seen its own entries
// before that, so one look is not enough.
func settle(ctx context.Context, repo *registry.Repository, subject v1.Descriptor, a Artifact) error {
	if a.Pause == nil || a.Verifier == nil || len(a.Bundles) == 0 {
		return nil
	}
	shared, err := repo.SharesList(ctx, subject.Digest.String())
	if err != nil || !shared {
		return err
	}
	quiet := 0
	for range maxLooks {
		if err := a.Pause(ctx); err != nil {
			return err
		}
		added, err := attach(ctx, repo, subject, a)
		if err != nil {
			return err
		}
		if quiet++; added > 0 {
			quiet = 0
		}
		if quiet == quietLooks {
			return nil
		}
	}
	return fault.New(fault.Transient, "other builders overwrite the list of attachments again and again",
		"run the command again, with fewer builders at a time; or use a registry with the OCI referrers API")
}

// attach adds the statements that the artifact lacks, and the build log if the provenance is missing or is from this
// run. attach returns the number of additions. The log comes before the provenance, which must never refer to a missing
// log.
func attach(ctx context.Context, repo *registry.Repository, subject v1.Descriptor, a Artifact) (added int, err error) {
	if len(a.Bundles) == 0 && a.Log == nil {
		return 0, nil
	}
	digest := subject.Digest.String()
	present := map[string]bool{}
	mine := false       // the provenance of this run is present
	var built time.Time // the newest time in a present provenance, without times of wrong clocks
	finished := a.finished()
	if a.Verifier != nil {
		var wanted []map[string]string
		for _, raw := range a.Bundles {
			wanted = append(wanted, labels(raw))
		}
		name := trust.Useful(a.Verifier, digest)
		useful := func(raw []byte) string { // this function sees all copies of a statement; attached has one of them
			mine = mine || slices.ContainsFunc(a.Bundles, func(b []byte) bool { return bytes.Equal(raw, b) }) &&
				labels(raw)[trust.LabelPredicate] == trust.PredicateProvenance
			return name(raw)
		}
		attached, err := repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, useful, wanted...)
		if err != nil {
			return added, err
		}
		for _, raw := range attached {
			// A statement that a.Verifier cannot verify was signed by somebody else, and is ignored.
			if st, err := a.Verifier.Statement(raw); err == nil && st.About(digest) {
				present[proofKey(st)] = true
				if at := trust.FinishedOn(st); at.After(built) && !at.After(finished.Add(24*time.Hour)) {
					built = at
				}
			}
		}
	}
	if a.RenewAfter > 0 && finished.Sub(built) >= a.RenewAfter {
		present[trust.PredicateProvenance] = false
	}
	if a.Log != nil && (mine || !present[trust.PredicateProvenance]) {
		listed, err := repo.Referrers(ctx, digest, "")
		if err != nil {
			return added, err
		}
		log, err := repo.Attach(ctx, subject, ArtifactTypeLog, a.Log, nil)
		if err != nil {
			return added, err
		}
		if !slices.ContainsFunc(listed, func(d v1.Descriptor) bool { return d.Digest == log.Digest }) {
			added++
		}
	}
	for _, raw := range a.Bundles {
		if a.Verifier != nil {
			st, err := a.Verifier.Statement(raw)
			if err != nil {
				return added, fmt.Errorf("verify the new statement: %w", err)
			}
			if !st.About(digest) {
				return added, fault.Errorf(fault.Internal, "verify the new statement of type %s: the statement is not about %s",
					st.PredicateType, digest)
			}
			if present[proofKey(st)] {
				continue
			}
		}
		if _, err := repo.Attach(ctx, subject, trust.ArtifactTypeBundle, raw, labels(raw)); err != nil {
			return added, err
		}
		added++
	}
	return added, nil
}
