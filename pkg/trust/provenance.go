package trust

import (
	"encoding/json"
	"maps"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// Names of the internal parameters that say who signed the modules. If there are none, the modules are not signed.
//
//   - FactModuleKey is the certificate of the farm's own key.
//   - FactGoogleSignatures is the archive with Google's signatures.
//   - FactGoogleModules is the archive with Google's own modules.
const (
	FactModuleKey        = "moduleKey"
	FactGoogleSignatures = "googleSignatures"
	FactGoogleModules    = "googleModules"
)

// provenance has the fields of SLSA's predicate that Verify needs.
type provenance struct {
	BuildDefinition struct {
		BuildType          string     `json:"buildType"`
		ExternalParameters Parameters `json:"externalParameters"`
		// InternalParameters may have any form. Only the presence of the parameters named Fact… is checked.
		InternalParameters   map[string]json.RawMessage `json:"internalParameters"`
		ResolvedDependencies []struct {
			Name   string            `json:"name"`
			URI    string            `json:"uri"`
			Digest map[string]string `json:"digest"`
		} `json:"resolvedDependencies"`
	} `json:"buildDefinition"`
	RunDetails struct {
		Builder struct {
			ID string `json:"id"`
		} `json:"builder"`
		Metadata struct {
			InvocationID string `json:"invocationId"`
			FinishedOn   string `json:"finishedOn"`
		} `json:"metadata"`
	} `json:"runDetails"`
}

func (v *Verifier) checkProvenance(st *Statement, e Expect) error {
	var p provenance
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return fault.Errorf(fault.Unverified, "%w: parse the provenance: %w", ErrMalformed, shortError{err})
	}
	built, id := p.BuildDefinition.ExternalParameters, e.Identity
	disagree := func(what, said, is any) error {
		return fault.Errorf(fault.Mismatch, "%w: the provenance is for %s %v, but the artifact is for %v", ErrOtherIdentity,
			what, said, is)
	}
	switch {
	case p.BuildDefinition.BuildType != BuildType:
		return fault.Errorf(fault.Unverified, "the provenance has build type %.80q; want %s", p.BuildDefinition.BuildType,
			BuildType)
	case p.RunDetails.Builder.ID == "":
		return fault.New(fault.Unverified, "the provenance has no builder ID", "")
	case len(v.policy.Builders) > 0 && !slices.Contains(v.policy.Builders, p.RunDetails.Builder.ID):
		return fault.Errorf(fault.Unverified, "the artifact was built by builder %.120q; trusted builders are %s",
			p.RunDetails.Builder.ID,
			strings.Join(v.policy.Builders, ", "))
	case built.Driver != id.Driver:
		return disagree("driver", built.Driver, id.Driver)
	case built.Fingerprint != id.Fingerprint:
		return disagree("ABI fingerprint", built.Fingerprint, id.Fingerprint)
	case built.Kernel.Arch != id.Arch:
		return disagree("architecture", built.Kernel.Arch, id.Arch)
	case built.Kernel.Release != id.Release:
		return disagree("kernel release", built.Kernel.Release, id.Release)
	}
	if len(v.policy.Sources) == 0 {
		return nil
	}
	placed := 0
	for _, d := range p.BuildDefinition.ResolvedDependencies {
		if d.URI == "" { // an input without a location is identified by its digest alone
			continue
		}
		if placed++; !slices.ContainsFunc(v.policy.Sources,
			func(prefix string) bool { return strings.HasPrefix(d.URI, prefix) }) {
			return fault.Errorf(fault.Unverified, "%w: input %.60s is from %.120q; trusted sources are %s", ErrOtherInput,
				d.Name,
				d.URI, strings.Join(v.policy.Sources, ", "))
		}
	}
	if placed == 0 {
		return fault.Errorf(fault.Unverified, "%w: the provenance names no source of any input", ErrOtherInput)
	}
	return nil
}

// fillProvenance copies facts into the verdict from the first provenance that counts.
func fillProvenance(st *Statement, verdict *Verdict) {
	var p provenance
	if json.Unmarshal(st.Predicate, &p) != nil {
		return // cannot happen: checkProvenance has parsed the same bytes
	}
	if verdict.BuilderID != "" {
		return // the facts are those of the first
	}
	run := p.RunDetails
	verdict.KeyID, verdict.Identity, verdict.Built = st.KeyID, st.Identity, p.BuildDefinition.ExternalParameters
	verdict.BuilderID, verdict.InvocationID = run.Builder.ID, run.Metadata.InvocationID
	for _, fact := range []string{FactModuleKey, FactGoogleSignatures, FactGoogleModules} {
		_, signed := p.BuildDefinition.InternalParameters[fact]
		verdict.ModulesSigned = verdict.ModulesSigned || signed
	}
	for _, d := range p.BuildDefinition.ResolvedDependencies {
		verdict.Materials = append(verdict.Materials,
			Material{Name: d.Name, URI: d.URI, Digest: "sha256:" + d.Digest["sha256"]})
	}
}

// FinishedOn returns the end of the build according to a provenance. It returns the zero time for a provenance without
// that time, and for every other statement.
func FinishedOn(st *Statement) time.Time {
	var p provenance
	if st.PredicateType != PredicateProvenance || json.Unmarshal(st.Predicate, &p) != nil {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, p.RunDetails.Metadata.FinishedOn)
	if err != nil {
		return time.Time{}
	}
	return at
}

// buildTimes has the times at which the builds ended, from the provenances that count.
type buildTimes struct {
	newest map[string]map[int]time.Time // by role and by entry of the role, without times in the future
	future time.Time                    // one of the times in the future
}

// add adds the time of a provenance that counts for a role. If now is zero, no time counts as in the future.
func (b *buildTimes) add(role string, entry int, at, now time.Time) {
	if at.IsZero() {
		return
	}
	if !now.IsZero() && at.After(now.Add(clockSkew)) {
		b.future = at
		return
	}
	if b.newest == nil {
		b.newest = map[string]map[int]time.Time{}
	}
	if b.newest[role] == nil {
		b.newest[role] = map[int]time.Time{}
	}
	if at.After(b.newest[role][entry]) {
		b.newest[role][entry] = at
	}
}

// decide returns the last time by which the provenances satisfy the rules: as many signers as a rule demands say that
// the artifact was built then or later. If there is no such time, it returns a time in the future, or zero.
func (b *buildTimes) decide(rules []Rule) (at time.Time) {
	for _, rule := range rules {
		if rule.Statement != PredicateProvenance {
			continue
		}
		times := slices.Collect(maps.Values(b.newest[rule.Role]))
		// Not slices.SortFunc, which adds 13 KB to each program.
		sort.Slice(times, func(i, j int) bool { return times[i].After(times[j]) })
		if len(times) < rule.Count {
			return b.future
		}
		if last := times[rule.Count-1]; at.IsZero() || last.Before(at) {
			at = last
		}
	}
	return at
}
