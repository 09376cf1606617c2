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

// PredicateReproduced is the predicate type of a reproduction. Its signer has built the artifact again from the same
// inputs, with the same digest.
const PredicateReproduced = "https://prebake.dev/reproduced/v1"

// Reasons by which a policy refuses an artifact; compare with errors.Is.
var (
	ErrRevoked    = errors.New("the artifact's digest is revoked")
	ErrTooOld     = errors.New("the artifact is too old")
	ErrThreshold  = errors.New("too few signatures")
	ErrOtherRole  = errors.New("the statement is signed by a signer that is not trusted for this statement")
	ErrKeyPeriod  = errors.New("the statement is signed outside of the key's validity period")
	ErrOtherInput = errors.New("the artifact was built from inputs of an untrusted source")
)

// Role is a group of signers, such as the builders of a farm. Rules name roles.
type Role struct {
	Name string
	Keys []RoleKey
	// Identities are names in certificates. The policy's Root verifies the certificates.
	Identities []Identity
}

// RoleKey is a key with its validity period. A signature by the key counts only if the node accepts the artifact in
// that period, by the node's clock. A zero time means no bound.
type RoleKey struct {
	Key                 PublicKey
	NotBefore, NotAfter time.Time
}

// Rule demands that at least Count different signers of a role have signed a statement of one predicate type.
type Rule struct {
	Statement string
	Role      string
	Count     int
}

// publisher is the only role of a policy that defines no roles.
const publisher = "publisher"

// Signature is a signature that counted for a rule.
type Signature struct {
	Statement string `json:"statement"`
	Signer    string `json:"signer"`
	Role      string `json:"role"`
	// Entry is the index of the key or certificate identity in the role. All subjects that match one pattern count as one
	// signer.
	Entry int `json:"entry"`
}

// Finding is the result of one rule of a policy for an artifact. Detail gives the reason.
type Finding struct {
	Rule   string `json:"rule"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// settle fills in the default role and rules, and adds the signers of the roles to Keys and Identities. It returns an
// error for a policy that is malformed, or that no artifact could satisfy.
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
			return bad("some keys or identities are in no role; want all of them in roles, or no roles")
		}
		for _, r := range p.Roles {
			for _, k := range r.Keys {
				if slices.ContainsFunc(p.Keys, func(have PublicKey) bool { return have.Hint() == k.Key.Hint() }) {
					return bad("key %s is listed twice, the second time in role %s: a signer counts in one role only", k.Key.ID(),
						r.Name)
				}
				p.Keys = append(p.Keys, k.Key)
			}
			for _, i := range r.Identities {
				if slices.Contains(p.Identities, i) {
					return bad("certificate identity %s is listed twice, the second time in role %s", i, r.Name)
				}
				p.Identities = append(p.Identities, i)
			}
		}
	}
	for _, rule := range p.Rules {
		i := slices.IndexFunc(p.Roles, func(r Role) bool { return r.Name == rule.Role })
		switch {
		case i < 0:
			return bad("a rule demands signatures of role %.60q, which is not defined", rule.Role)
		case rule.Count < 1:
			return bad("a rule about %s wants %d signatures; want 1 or more", statementName(rule.Statement), rule.Count)
		case rule.Count > len(p.Roles[i].Keys)+len(p.Roles[i].Identities):
			return bad("a rule about %s wants %d signatures of role %s, which has %d keys and identities",
				statementName(rule.Statement), rule.Count, rule.Role, len(p.Roles[i].Keys)+len(p.Roles[i].Identities))
		}
	}
	for _, needed := range []string{PredicateProvenance, PredicateKernelMatch} {
		if !slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Statement == needed }) {
			return bad("no rule says who signs the %s", statementName(needed))
		}
	}
	for _, digest := range p.Revoked {
		if _, err := target.ParseFingerprint(digest); err != nil { // an artifact's digest has the same form as a fingerprint
			return bad("revoked digest %.80q: want sha256: and 64 lower-case hex digits", digest)
		}
	}
	for _, version := range p.MinVersions {
		d, err := target.ParseDriver(version, string(target.Open))
		if err != nil {
			return bad("parse a minimum version: %w", err)
		}
		if d != d.Modules() {
			return bad("minimum version %s: want a version without a suffix, which applies to all editions of the release",
				version)
		}
	}
	return nil
}

func statementName(predicate string) string {
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

// Signer returns the ID of the key, or the certificate identity, that signed the statement.
func (s *Statement) Signer() string { return s.KeyID + s.Identity }

// signerIndex returns the index of the role's key or certificate identity that signed a statement. The error says why
// the signature does not count. If now is zero, validity periods are not checked.
func (r Role) signerIndex(st *Statement, now time.Time) (entry int, err error) {
	for i, k := range r.Keys {
		if st.KeyID == "" || k.Key.Hint() != st.hint {
			continue
		}
		switch {
		case now.IsZero():
		case !k.NotBefore.IsZero() && now.Before(k.NotBefore):
			return 0, fault.Errorf(fault.Unverified,
				"%w: key %s of role %s is valid from %s on, and the date of this machine is %s",
				ErrKeyPeriod, st.KeyID, r.Name, k.NotBefore.UTC().Format(time.DateOnly), now.UTC().Format(time.DateOnly))
		case !k.NotAfter.IsZero() && !now.Before(k.NotAfter):
			return 0, fault.Errorf(fault.Unverified, "%w: key %s of role %s was valid until %s", ErrKeyPeriod, st.KeyID, r.Name,
				k.NotAfter.UTC().Format(time.DateTime))
		}
		return i, nil
	}
	for i, id := range r.Identities {
		if st.Identity != "" && id.matches(st.signer) {
			return len(r.Keys) + i, nil
		}
	}
	return 0, fault.Errorf(fault.Unverified, "%w: signer %s is not in role %s", ErrOtherRole, st.Signer(), r.Name)
}

// matches reports whether the name in a certificate is one that this identity allows.
func (i Identity) matches(who Identity) bool {
	if i.Issuer != who.Issuer {
		return false
	}
	if i.Pattern == "" {
		return i.Subject == who.Subject
	}
	whole, err := regexp.Compile(`\A(?:` + i.Pattern + `)\z`)
	return err == nil && whole.MatchString(who.Subject)
}

// countSignature adds a statement's signature to the verdict, once for each rule that the signer may sign for. If there
// is no such rule, the error says why. If no rule is about the statement's type, the signer must be allowed to sign the
// provenance, and nothing is added.
func (x *evaluation) countSignature(st *Statement, p Policy, now time.Time) error {
	about := slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Statement == st.PredicateType })
	var why error
	counted := false
	for _, rule := range p.Rules {
		if rule.Statement != st.PredicateType && (about || rule.Statement != PredicateProvenance) {
			continue
		}
		role := p.Roles[slices.IndexFunc(p.Roles, func(r Role) bool { return r.Name == rule.Role })]
		entry, err := role.signerIndex(st, now)
		if err != nil {
			why = err
			continue
		}
		counted = true
		if about && st.PredicateType == PredicateProvenance {
			x.built.add(role.Name, entry, FinishedOn(st), now)
		}
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

// checkRule returns a text with the number of signers that have signed, and their names. It returns an error if fewer
// signers have signed than the rule demands.
func (x *evaluation) checkRule(rule Rule) (string, error) {
	if x.unsigned && rule.Statement == PredicateKernelMatch {
		return "not signed yet", nil
	}
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
		err := fmt.Errorf("%w on the artifact's %s: %s", ErrThreshold, statementName(rule.Statement), detail)
		for _, other := range x.reasons[rule.Statement][:min(2, len(x.reasons[rule.Statement]))] {
			err = fault.Join(err, other)
		}
		return "", fault.Wrap(fault.Unverified, err,
			"ask more signers of that role to sign the artifact, or change the policy")
	}
	return detail, nil
}

func checkReproduction(st *Statement, e Expect) error {
	var p struct {
		Result      string             `json:"result"`
		Fingerprint target.Fingerprint `json:"fingerprint"`
		Driver      target.Driver      `json:"driver"`
	}
	if err := json.Unmarshal(st.Predicate, &p); err != nil {
		return fault.Errorf(fault.Unverified, "%w: parse the reproduction: %w", ErrMalformed, shortError{err})
	}
	if p.Result != "identical" || p.Fingerprint != e.Identity.Fingerprint || p.Driver != e.Identity.Driver {
		return fault.Errorf(fault.Mismatch,
			"%w: the reproduction is of driver %s for ABI fingerprint %s, with the result %.20q",
			ErrOtherIdentity, p.Driver, p.Fingerprint, p.Result)
	}
	return nil
}

func (p Policy) revoked(digest string) (string, error) {
	if slices.Contains(p.Revoked, digest) {
		return "", fault.Wrap(fault.Unverified, fmt.Errorf("%w by the policy", ErrRevoked),
			"install another driver, or ask the author of the policy why this artifact is revoked")
	}
	return fmt.Sprintf("not among %d revoked digests", len(p.Revoked)), nil
}

// minimum checks the driver's version. If MinVersions has a version of the driver's branch, the driver must not be
// older. If MinVersions has no version of that branch, the driver must not be older than any version in the list: an
// older branch is not maintained.
func (p Policy) minimum(d target.Driver) (string, error) {
	if len(p.MinVersions) == 0 {
		return "the policy allows any version", nil
	}
	have := d.Modules().Version
	inList := false
	for _, least := range p.MinVersions {
		of := target.Driver{Version: least, Flavour: d.Flavour}
		if of.Branch() != d.Branch() {
			continue
		}
		if inList = true; target.CompareVersions(have, least) < 0 {
			return "", p.tooOld(have, least)
		}
	}
	for _, least := range p.MinVersions {
		if !inList && target.CompareVersions(have, least) < 0 {
			return "", p.tooOld(have, least)
		}
	}
	return "at least " + strings.Join(p.MinVersions, ", "), nil
}

func (p Policy) tooOld(have, least string) error {
	return fault.Wrap(fault.Unverified, fmt.Errorf("%w: driver %s; the policy wants %s or newer", ErrTooOld, have, least),
		"ask for a newer driver version")
}

// clockSkew is how far the clock of a builder may be ahead of the node's clock.
const clockSkew = 24 * time.Hour

// renewHint returns a hint about how to get a new provenance for an artifact. The --max-age in the hint is half of the
// policy's maximum age, but 1 to 30 days. So the builder builds the artifact again before nodes refuse it, and later
// too.
func (p Policy) renewHint() string {
	days := int(p.MaxAge / (24 * time.Hour))
	return fmt.Sprintf("build the driver again, which signs a new provenance: builder build --max-age %d",
		min(max(1, days/2), 30))
}

// age checks that the artifact's build, whose time is in the provenance, is not older than MaxAge.
func (p Policy) age(v Verdict, now time.Time) (string, error) {
	switch {
	case p.MaxAge == 0:
		return "the policy allows any age", nil
	case now.IsZero():
		return "not checked: this node accepted the artifact before", nil
	case v.BuilderID == "":
		return "", fault.New(fault.Unverified, "no trusted provenance says when the artifact was built", "")
	case v.BuiltOn.After(now.Add(clockSkew)):
		return "", fault.New(fault.Unverified,
			"the provenance says that the artifact was built on "+v.BuiltOn.UTC().Format(time.DateOnly)+
				", which is in the future",
			"check the clock of this machine, and of the builder")
	}
	if v.BuiltOn.IsZero() {
		return "", fault.New(fault.Unverified,
			"the provenance does not say when the artifact was built, and the policy has a maximum age",
			p.renewHint())
	}
	if age := now.Sub(v.BuiltOn); age > p.MaxAge {
		return "", fault.Wrap(fault.Unverified,
			fmt.Errorf("%w: built on %s, %d days ago; the policy allows %d days", ErrTooOld,
				v.BuiltOn.UTC().Format(time.DateOnly), int(age.Hours()/24), int(p.MaxAge.Hours()/24)),
			p.renewHint())
	}
	return "built on " + v.BuiltOn.UTC().Format(time.DateOnly), nil
}

// Wanted returns the labels of the statements that this verifier needs for a kernel.
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
