package trust

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// PredicateReproduced says that somebody made the artifact again from the inputs that
// its provenance names, and got the same digest.
const PredicateReproduced = "https://prebake.dev/reproduced/v1"

// More that can be wrong with an artifact; for errors.Is.
var (
	ErrRevoked    = errors.New("its digest is revoked")
	ErrTooOld     = errors.New("it is too old")
	ErrThreshold  = errors.New("too few signatures")
	ErrOtherRole  = errors.New("signed by somebody who is not trusted for this")
	ErrKeyPeriod  = errors.New("signed with a key outside of its period")
	ErrOtherInput = errors.New("built from inputs of a place that is not trusted")
)

// Role is a group of signers whose signatures count for some kinds of statements, as those of
// a farm, or of somebody who builds everything again.
type Role struct {
	Name string
	Keys []RoleKey
	// Identities may be named by certificates of the policy's root.
	Identities []Identity
}

// RoleKey is a key and when it counts: for what is taken between the two by the node's
// clock. Zero is no bound. What a node has taken stays good when the key's time is over.
type RoleKey struct {
	Key                 PublicKey
	NotBefore, NotAfter time.Time
}

// Rule demands a number of different signers of one role under statements of one
// predicate type.
type Rule struct {
	Statement string
	Role      string
	Count     int
}

// publisher is the one role of a policy without roles.
const publisher = "publisher"

// Signature says who signed a statement that counted, and in which role.
type Signature struct {
	Statement string `json:"statement"`
	Signer    string `json:"signer"`
	Role      string `json:"role"`
	// Entry is which of the role's keys and identities it is by: several subjects may be of one.
	Entry int `json:"entry"`
}

// Finding is what one rule of a policy says about an artifact.
type Finding struct {
	Rule   string `json:"rule"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// settle completes a policy and checks that it can be met at all.
func (p *Policy) settle() error {
	bad := func(format string, args ...any) error {
		return fault.Errorf(fault.Usage, "verify artifacts: "+format, args...)
	}
	if len(p.Roles) == 0 {
		r := Role{Name: publisher, Identities: p.Identities}
		for _, k := range p.Keys {
			r.Keys = append(r.Keys, RoleKey{Key: k})
		}
		p.Roles = []Role{r}
		if len(p.Rules) == 0 {
			p.Rules = []Rule{{PredicateProvenance, publisher, 1}, {PredicateKernelMatch, publisher, 1}}
		}
	} else {
		if len(p.Keys)+len(p.Identities) > 0 {
			return bad("keys and identities belong to roles, or there are no roles")
		}
		for _, r := range p.Roles {
			for _, k := range r.Keys {
				if slices.ContainsFunc(p.Keys, func(have PublicKey) bool { return have.Hint() == k.Key.Hint() }) {
					return bad("key %s is there twice, the second time in role %s: a signer counts in one role only", k.Key.ID(),
						r.Name)
				}
				p.Keys = append(p.Keys, k.Key)
			}
			for _, i := range r.Identities {
				if slices.Contains(p.Identities, i) {
					return bad("identity %s is there twice, the second time in role %s", i, r.Name)
				}
				p.Identities = append(p.Identities, i)
			}
		}
	}
	for _, rule := range p.Rules {
		i := slices.IndexFunc(p.Roles, func(r Role) bool { return r.Name == rule.Role })
		switch {
		case i < 0:
			return bad("a rule names role %.60q, which is not defined", rule.Role)
		case rule.Count < 1:
			return bad("a rule about %s wants %d signatures; want 1 or more", short(rule.Statement), rule.Count)
		case rule.Count > len(p.Roles[i].Keys)+len(p.Roles[i].Identities):
			return bad("a rule about %s wants %d signatures of role %s, which has %d keys and identities", short(rule.Statement),
				rule.Count, rule.Role, len(p.Roles[i].Keys)+len(p.Roles[i].Identities))
		}
	}
	for _, needed := range []string{PredicateProvenance, PredicateKernelMatch} {
		if !slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Statement == needed }) {
			return bad("no rule says who signs the %s", short(needed))
		}
	}
	for _, digest := range p.Revoked {
		if _, err := target.ParseFingerprint(digest); err != nil { // digests have the same form
			return bad("revoked digest %.80q: want sha256: and 64 lower-case hex digits", digest)
		}
	}
	for _, version := range p.MinVersions {
		d, err := target.ParseDriver(version, string(target.Open))
		if err != nil {
			return bad("minimum version: %w", err)
		}
		if d != d.Modules() {
			return bad("minimum version %s: want a release without a suffix; it counts for its editions, too", version)
		}
	}
	return nil
}

// short is a predicate type in plain terms.
func short(predicate string) string {
	switch predicate {
	case PredicateProvenance:
		return "provenance"
	case PredicateKernelMatch:
		return "kernel match"
	case PredicateTestResult:
		return "test result"
	case PredicateReproduced:
		return "reproduction"
	case PredicateSBOM:
		return "SBOM"
	}
	return predicate
}

// Signer names the key or the identity that signed.
func (s *Statement) Signer() string { return s.KeyID + s.Identity }

// has returns the entry of a role by which a signature counts, or why it does not; now is
// zero where periods do not.
func (r Role) has(st *Statement, now time.Time) (entry int, err error) {
	for i, k := range r.Keys {
		if st.KeyID == "" || k.Key.Hint() != st.hint {
			continue
		}
		switch {
		case now.IsZero():
		case !k.NotBefore.IsZero() && now.Before(k.NotBefore):
			return 0, fault.Errorf(fault.Unverified, "%w: key %s of role %s counts from %s on, and this machine has %s",
				ErrKeyPeriod, st.KeyID, r.Name, k.NotBefore.UTC().Format(time.DateOnly), now.UTC().Format(time.DateOnly))
		case !k.NotAfter.IsZero() && !now.Before(k.NotAfter):
			return 0, fault.Errorf(fault.Unverified, "%w: key %s of role %s counted until %s", ErrKeyPeriod, st.KeyID, r.Name,
				k.NotAfter.UTC().Format(time.DateTime))
		}
		return i, nil
	}
	for i, id := range r.Identities {
		if st.Identity != "" && id.names(st.signer) {
			return len(r.Keys) + i, nil
		}
	}
	return 0, fault.Errorf(fault.Unverified, "%w: %s is not of role %s", ErrOtherRole, st.Signer(), r.Name)
}

// names reports whether a certificate that names who is of this identity.
func (i Identity) names(who Identity) bool {
	if i.Issuer != who.Issuer {
		return false
	}
	if i.Pattern == "" {
		return i.Subject == who.Subject
	}
	whole, err := regexp.Compile(`\A(?:` + i.Pattern + `)\z`)
	return err == nil && whole.MatchString(who.Subject)
}

// counts reports why no rule counts a statement; nil means that one does, and that the
// signatures are noted. Where no rule is about its type, whoever may sign the provenance
// may say it.
func (x *evaluation) counts(st *Statement, p Policy, now time.Time) error {
	about := slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Statement == st.PredicateType })
	var why error
	counted := false
	for _, rule := range p.Rules {
		if rule.Statement != st.PredicateType && (about || rule.Statement != PredicateProvenance) {
			continue
		}
		role := p.Roles[slices.IndexFunc(p.Roles, func(r Role) bool { return r.Name == rule.Role })]
		entry, err := role.has(st, now)
		if err != nil {
			why = err
			continue
		}
		counted = true
		s := Signature{Statement: st.PredicateType, Signer: st.Signer(), Role: role.Name, Entry: entry}
		if about && !slices.Contains(x.verdict.Signatures, s) {
			x.verdict.Signatures = append(x.verdict.Signatures, s)
		}
	}
	if counted {
		return nil
	}
	return why
}

// met reports whether a rule's number of signers is reached.
func (x *evaluation) met(rule Rule) (string, error) {
	var signers []string
	entries := map[int]bool{}
	for _, s := range x.verdict.Signatures {
		if s.Statement == rule.Statement && s.Role == rule.Role {
			signers, entries[s.Entry] = append(signers, s.Signer), true
		}
	}
	detail := fmt.Sprintf("%d of %d by role %s", len(entries), rule.Count, rule.Role)
	if len(signers) > 0 {
		detail += ": " + strings.Join(signers, ", ")
	}
	if len(entries) < rule.Count {
		err := fmt.Errorf("%w under its %s: %s", ErrThreshold, short(rule.Statement), detail)
		for _, other := range x.reasons[rule.Statement][:min(2, len(x.reasons[rule.Statement]))] {
			err = fmt.Errorf("%w; %w", err, other)
		}
		return "", fault.Wrap(fault.Unverified, err, "have it signed by more signers of that role, or change the policy")
	}
	return detail, nil
}

// reproduced checks what a rebuilder says.
func reproduced(st *Statement, e Expect) error {
	var p struct {
		Result      string             `json:"result"`
		Fingerprint target.Fingerprint `json:"fingerprint"`
		Driver      target.Driver      `json:"driver"`
	}
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return fault.Errorf(fault.Unverified, "%w: reproduction: %w", ErrMalformed, cut{err})
	}
	if p.Result != "identical" || p.Fingerprint != e.Identity.Fingerprint || p.Driver != e.Identity.Driver {
		return fault.Errorf(fault.Mismatch, "%w: reproduction is of %s on %s: %.20q", ErrOtherIdentity, p.Driver,
			p.Fingerprint, p.Result)
	}
	return nil
}

func (p Policy) revoked(digest string) (string, error) {
	if slices.Contains(p.Revoked, digest) {
		return "", fault.Wrap(fault.Unverified, fmt.Errorf("%w by the policy", ErrRevoked),
			"install another driver; ask whoever revoked this one for the reason")
	}
	return fmt.Sprintf("not among %d revoked digests", len(p.Revoked)), nil
}

// minimum wants a driver of a branch that is named to be as new as its version there, and
// one of another branch to be newer than all of them: who names the branches that are
// maintained means that the others are not.
func (p Policy) minimum(d target.Driver) (string, error) {
	if len(p.MinVersions) == 0 {
		return "any version will do", nil
	}
	have := d.Modules().Version
	named := false
	for _, least := range p.MinVersions {
		of := target.Driver{Version: least, Flavour: d.Flavour}
		if of.Branch() != d.Branch() {
			continue
		}
		if named = true; target.CompareVersions(have, least) < 0 {
			return "", p.tooOld(have, least)
		}
	}
	for _, least := range p.MinVersions {
		if !named && target.CompareVersions(have, least) < 0 {
			return "", p.tooOld(have, least)
		}
	}
	return "at least " + strings.Join(p.MinVersions, ", "), nil
}

func (p Policy) tooOld(have, least string) error {
	return fault.Wrap(fault.Unverified, fmt.Errorf("%w: driver %s; the policy wants %s or newer", ErrTooOld, have, least),
		"ask for a newer driver")
}

// age wants what was built not too long ago, by the time in the provenance.
func (p Policy) age(v Verdict, now time.Time) (string, error) {
	switch {
	case p.MaxAge == 0:
		return "any age will do", nil
	case now.IsZero():
		return "not asked: it was taken before", nil
	case v.BuilderID == "":
		return "", fault.New(fault.Unverified, "no provenance counts that could tell it", "")
	case v.BuiltOn.After(now.Add(24 * time.Hour)):
		return "", fault.New(fault.Unverified,
			"its provenance says "+v.BuiltOn.UTC().Format(time.DateOnly)+", which is in the future",
			"check the clock of this machine, and of the builder")
	}
	if v.BuiltOn.IsZero() {
		return "", fault.New(fault.Unverified,
			"its provenance does not say when it was built, and the policy has a maximum age", "have it built again")
	}
	if age := now.Sub(v.BuiltOn); age > p.MaxAge {
		return "", fault.Wrap(fault.Unverified,
			fmt.Errorf("%w: built on %s, %d days ago; the policy takes %d", ErrTooOld, v.BuiltOn.UTC().Format(time.DateOnly),
				int(age.Hours()/24), int(p.MaxAge.Hours()/24)), "have it built again, or signed anew")
	}
	return "built on " + v.BuiltOn.UTC().Format(time.DateOnly), nil
}

// Wanted returns the labels of the statements by which this verifier decides for a
// kernel. An artifact may have hundreds for other builds of its kernel.
func (v *Verifier) Wanted(k target.Kernel) []map[string]string {
	wanted := Wanted(k)
	for _, rule := range v.policy.Rules {
		switch rule.Statement {
		case PredicateProvenance, PredicateKernelMatch, PredicateTestResult:
		default:
			wanted = append(wanted, OfType(rule.Statement))
		}
	}
	return wanted
}
