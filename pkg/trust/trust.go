// Package trust decides whether an artifact is what somebody who is trusted, by
// a key or by an identity, said it is, and whether that was said for this very
// kernel and driver. It works offline, and holds nothing secret. It refuses to sign, to fetch, and
// to take anything out of a statement before its signature holds.
package trust

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
)

// The kinds of statements that an artifact needs or may have, and how they are
// stored.
const (
	// PredicateProvenance says how an artifact was built, and of what.
	PredicateProvenance = "https://slsa.dev/provenance/v1"
	// PredicateKernelMatch says that an artifact fits one COS build: there is
	// one such statement for each build of a fingerprint.
	PredicateKernelMatch = "https://prebake.dev/kernel-match/v1"
	// PredicateSBOM is an SPDX document: what is in the artifact. It decides
	// nothing here.
	PredicateSBOM = "https://spdx.dev/Document"
	// BuildType names the rules by which the provenance's parameters are read.
	BuildType = "https://prebake.dev/build/v1"
	// ArtifactTypeBundle is the type under which bundles are attached.
	ArtifactTypeBundle = "application/vnd.dev.sigstore.bundle.v0.3+json"
)

// What can be wrong with an artifact whose bundles are read. Each comes with
// its own text; these are for errors.Is.
var (
	ErrOtherDigest   = errors.New("statement is about another artifact")
	ErrNoProvenance  = errors.New("no provenance attached")
	ErrNoKernelMatch = errors.New("no kernel match attached")
	ErrOtherKernel   = errors.New("made for another kernel")
	ErrOtherDriver   = errors.New("holds another driver")
	ErrOtherIdentity = errors.New("statement and artifact disagree")
)

// Expect is what the caller wants the artifact to be.
type Expect struct {
	// Digest is that of the manifest, whose bytes the caller has compared.
	Digest string
	// Kernel is the node's: BuildID and Board are needed; Release, Commit and
	// Arch are compared where they are known on both sides. Version is not: a
	// header tree's build counter and time may come from another run of make
	// than the image's, and BUILD_ID is what COS itself matches by.
	Kernel target.Kernel
	// Driver is the one that was asked for.
	Driver target.Driver
	// Identity is what the manifest's annotations say.
	Identity bundle.Identity
	// Now is when something new is taken, for the policy's periods and ages. Zero leaves
	// these out: for what was taken before, which no clock makes worse.
	Now time.Time
}

// KernelMatch is the predicate of that name.
type KernelMatch struct {
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
}

// Parameters are the provenance's external parameters.
type Parameters struct {
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	Driver      target.Driver      `json:"driver"`
}

// Material is one input that the provenance names.
type Material struct {
	Name   string `json:"name"`
	URI    string `json:"uri,omitempty"`
	Digest string `json:"digest"`
}

// Verdict is what was proved.
type Verdict struct {
	// KeyID is the key that signed the provenance, and Identity whom the
	// certificate names that did. One of the two is empty.
	KeyID    string `json:"keyId,omitempty"`
	Identity string `json:"identity,omitempty"`
	// BuilderID and InvocationID say who built it, and in which run.
	BuilderID    string `json:"builderId"`
	InvocationID string `json:"invocationId,omitempty"`
	// Built is what was built, and for which build's kernel it was compiled.
	Built Parameters `json:"built"`
	// Match is the statement for this node's build, and MatchedBy the key or the identity
	// that signed that: it may be another than signed the provenance.
	Match     KernelMatch `json:"match"`
	MatchedBy string      `json:"matchedBy"`
	// Materials are the inputs.
	Materials []Material `json:"materials"`
	// ModulesSigned says that the kernel modules carry signatures for the kernel, as the
	// provenance has it: the farm's own, or Google's.
	ModulesSigned bool `json:"modulesSigned,omitempty"`
	// LoadTest is the load test's verdict; empty where nothing says any.
	LoadTest string `json:"loadTest,omitempty"`
	// BuiltOn is when the build ended, as its provenance has it; zero is not known.
	BuiltOn time.Time `json:"builtOn,omitzero"`
	// Signatures are all that counted.
	Signatures []Signature `json:"signatures,omitempty"`
	// Ignored says why bundles that are attached too were not used.
	Ignored []string `json:"ignored,omitempty"`
}

// SignedBy names the key or the identity that signed the provenance, and who signed
// the kernel match where that is somebody else.
func (v *Verdict) SignedBy() string {
	by := v.KeyID + v.Identity
	if v.MatchedBy != "" && v.MatchedBy != by {
		by += ", the kernel match by " + v.MatchedBy
	}
	return by
}

// String sums the verdict up in one line.
func (v *Verdict) String() string {
	return fmt.Sprintf("driver %s for %s, signed by %s, built by %s from %d inputs",
		v.Built.Driver, v.Match.Kernel, v.SignedBy(), v.BuilderID, len(v.Materials))
}

// Verify decides about an artifact. It needs one valid provenance and one
// valid kernel match for Expect's build, both about Expect's digest, a load
// test where the policy wants one, and no failed one in any case. Bundles
// that prove nothing are ignored as long as others do: anybody may attach
// something to an artifact. Only the first [MaxBundles] are examined.
func (v *Verifier) Verify(bundles [][]byte, e Expect) (*Verdict, error) {
	verdict, err := v.verify(bundles, e)
	if err != nil {
		return nil, fmt.Errorf("verify artifact %s: %w", e.Digest, err)
	}
	return verdict, nil
}

func (v *Verifier) verify(bundles [][]byte, e Expect) (*Verdict, error) {
	x, checks := v.evaluate(bundles, e)
	for _, c := range checks {
		if _, err := c.do(); err != nil {
			return nil, err
		}
	}
	return x.done(), nil
}

// Explain is [Verifier.Verify] for people: it returns what each rule says, also where
// another one refuses the artifact. The verdict is nil where the error is not.
func (v *Verifier) Explain(bundles [][]byte, e Expect) (*Verdict, []Finding, error) {
	x, checks := v.evaluate(bundles, e)
	var findings []Finding
	var first error
	for _, c := range checks {
		detail, err := c.do()
		if err != nil {
			detail = err.Error()
			if first == nil {
				first = fmt.Errorf("verify artifact %s: %w", e.Digest, err)
			}
		}
		findings = append(findings, Finding{Rule: c.name, OK: err == nil, Detail: detail})
	}
	if first != nil {
		return nil, findings, first
	}
	return x.done(), findings, nil
}

// evaluation is the result of the statements about one artifact.
type evaluation struct {
	verdict                    Verdict
	provenance, match, useless tally
	tests                      loadTests
	// reasons are why statements did not count, by their types.
	reasons map[string][]error
}

// check is one rule, which says why it holds or why not.
type check struct {
	name string
	do   func() (string, error)
}

func (x *evaluation) done() *Verdict {
	for _, err := range slices.Concat(x.provenance.errs, x.match.errs, x.useless.errs) {
		x.verdict.Ignored = append(x.verdict.Ignored, err.Error())
	}
	return &x.verdict
}

// evaluate reads all statements, and returns the rules in the order in which they decide.
func (v *Verifier) evaluate(bundles [][]byte, e Expect) (*evaluation, []check) {
	x := &evaluation{reasons: map[string][]error{}}
	for i, data := range bundles {
		if i == MaxBundles {
			x.useless.add(fault.Errorf(fault.Unverified, "%d more bundles were not read", len(bundles)-MaxBundles))
			break
		}
		st, err := v.Statement(data)
		if err != nil {
			x.useless.add(err)
			continue
		}
		if !st.About(e.Digest) {
			x.useless.add(fault.Errorf(fault.Unverified, "%w: %s", ErrOtherDigest,
				strings.Join(st.Subjects[:min(3, len(st.Subjects))], ", ")))
			continue
		}
		x.read(v, st, e)
	}
	p := v.policy
	checks := []check{
		{"artifact", func() (string, error) { return e.Identity.Driver.String() + " for " + e.Identity.Release, e.check() }},
		{"revoked digests", func() (string, error) { return p.revoked(e.Digest) }},
		{"minimum version", func() (string, error) { return p.minimum(e.Identity.Driver) }},
		{"provenance", func() (string, error) {
			return fmt.Sprintf("built by %s from %d inputs", x.verdict.BuilderID,
				len(x.verdict.Materials)), x.provenance.explain(ErrNoProvenance, x.useless)
		}},
		{"kernel match", func() (string, error) {
			return "fits " + x.verdict.Match.Kernel.String(), x.match.explain(ErrNoKernelMatch, x.useless)
		}},
		{"load test", func() (detail string, err error) {
			x.verdict.LoadTest, err = x.tests.decide(p.LoadTest)
			return cmp.Or(x.verdict.LoadTest, "nothing says any"), err
		}},
	}
	for _, rule := range p.Rules {
		checks = append(checks, check{"signatures under the " + short(rule.Statement),
			func() (string, error) { return x.met(rule) }})
	}
	checks = append(checks, check{"age", func() (string, error) { return p.age(x.verdict, e.Now) }})
	if p.Listing != nil {
		checks = append(checks, check{"snapshot", func() (string, error) { return p.Listing.Check(e.Digest, e.Now) }})
	}
	return x, checks
}

// read takes in one statement whose signature holds.
func (x *evaluation) read(v *Verifier, st *Statement, e Expect) {
	// What it says comes first: a wrong statement counts for no rule.
	var err error
	defer func() {
		if err != nil {
			x.reasons[st.PredicateType] = append(x.reasons[st.PredicateType], err)
		}
	}()
	switch st.PredicateType {
	case PredicateProvenance:
		if err = v.provenance(st, e); err == nil {
			err = x.counts(st, v.policy, e.Now)
		}
		if err == nil {
			fillProvenance(st, &x.verdict)
		}
		x.provenance.judge(err)
		return
	case PredicateKernelMatch:
		var m KernelMatch
		if m, err = kernelMatch(st, e); err == nil {
			err = x.counts(st, v.policy, e.Now)
		}
		if err == nil && x.verdict.MatchedBy == "" {
			x.verdict.Match, x.verdict.MatchedBy = m, st.Signer()
		}
		x.match.judge(err)
		return
	case PredicateTestResult:
		// Every trusted signer may say that modules failed.
		var passed bool
		if passed, err = x.tests.add(st, e, func() error { return x.counts(st, v.policy, e.Now) }); err == nil && !passed {
			return
		}
	case PredicateReproduced:
		if err = reproduced(st, e); err == nil {
			err = x.counts(st, v.policy, e.Now)
		}
	case PredicateSBOM, gpulist.PredicateType: // for others to read
		err = x.counts(st, v.policy, e.Now)
	default:
		err = fault.Errorf(fault.Unverified, "statement of unknown type %.80q", st.PredicateType)
	}
	if err != nil {
		x.useless.add(err)
	}
}

// check compares what was asked for with what the manifest says, before any
// statement is read.
func (e Expect) check() error {
	if _, err := target.ParseKernel(e.Kernel.BuildID, e.Kernel.Board); err != nil {
		return fault.Wrap(fault.Usage, err, "")
	}
	id := e.Identity
	switch {
	case e.Driver != id.Driver:
		return fault.Errorf(fault.Mismatch, "%w: %s; wanted is %s", ErrOtherDriver, id.Driver, e.Driver)
	case e.Kernel.Arch != "" && e.Kernel.Arch != id.Arch:
		return fault.Errorf(fault.Mismatch, "%w: it is for %s, this node is %s", ErrOtherKernel, id.Arch, e.Kernel.Arch)
	case e.Kernel.Release != "" && e.Kernel.Release != id.Release:
		return fault.Errorf(fault.Mismatch, "%w: it is for release %s, this node runs %s", ErrOtherKernel, id.Release,
			e.Kernel.Release)
	}
	return nil
}

// provenance is the part of SLSA's predicate that decides.

// ParseKernelMatch reads a kernel match out of a statement.
func ParseKernelMatch(st *Statement) (KernelMatch, error) {
	var m KernelMatch
	if st.PredicateType != PredicateKernelMatch {
		return m, fault.Errorf(fault.Unverified, "%w: statement of type %.80q is no kernel match", ErrMalformed,
			st.PredicateType)
	}
	if err := json.Unmarshal(st.Predicate, &m); err != nil {
		return m, fault.Errorf(fault.Unverified, "%w: kernel match: %w", ErrMalformed, cut{err})
	}
	if _, err := target.ParseKernel(m.Kernel.BuildID, m.Kernel.Board); err != nil {
		return m, fault.Errorf(fault.Unverified, "%w: kernel match: %w", ErrMalformed, err)
	}
	return m, nil
}

func kernelMatch(st *Statement, e Expect) (KernelMatch, error) {
	m, err := ParseKernelMatch(st)
	if err == nil {
		err = m.fits(e)
	}
	return m, err
}

func (m KernelMatch) fits(e Expect) error {
	differs := func(said, is string) bool { return said != "" && is != "" && said != is }
	switch said, node := m.Kernel, e.Kernel; {
	case m.Fingerprint != e.Identity.Fingerprint:
		return fault.Errorf(fault.Mismatch, "%w: kernel match is for fingerprint %s, the artifact says %s", ErrOtherIdentity,
			m.Fingerprint, e.Identity.Fingerprint)
	case said.BuildID != node.BuildID || said.Board != node.Board:
		return fault.Errorf(fault.Mismatch, "%w: this artifact is attested for %s, this node is %s", ErrOtherKernel, said,
			node)
	case differs(said.Release, node.Release):
		return fault.Errorf(fault.Mismatch, "%w: %s is attested with release %s, this node runs %s", ErrOtherKernel, said,
			said.Release, node.Release)
	case differs(string(said.Arch), string(node.Arch)):
		return fault.Errorf(fault.Mismatch, "%w: %s is attested for %s, this node is %s", ErrOtherKernel, said, said.Arch,
			node.Arch)
	case differs(said.Commit, node.Commit):
		return fault.Errorf(fault.Mismatch, "%w: %s is attested with kernel commit %s, this node has %s", ErrOtherKernel,
			said, said.Commit, node.Commit)
	}
	return nil
}

// tally collects what was found for one of the needed statements.
type tally struct {
	ok   bool
	errs []error
}

func (t *tally) add(err error) { t.errs = append(t.errs, err) }

func (t *tally) judge(err error) {
	if err == nil {
		t.ok = true
		return
	}
	t.add(err)
}

// explain returns nil when the statement was found, else the reason that says
// most: what was wrong with statements of that type, or what was wrong with
// the bundles that might have been it, or that there was nothing.
func (t *tally) explain(none error, useless tally) error {
	const shown = 3
	var missing error
	switch {
	case t.ok:
		return nil
	case len(t.errs) > 0:
		missing = join(t.errs[:min(shown, len(t.errs))])
	case len(useless.errs) > 0:
		errs := useless.errs[:min(shown, len(useless.errs))]
		missing = fmt.Errorf("%w that holds: %w", none, join(errs))
	default:
		return fault.Wrap(fault.Unverified, none,
			"copy the artifact together with the statements attached to it: oras cp -r, or regctl image copy --referrers")
	}
	kind := fault.Unverified
	if len(t.errs) > 0 {
		kind = fault.Of(t.errs[0])
	}
	return fault.Wrap(kind, missing, "")
}

// join is errors.Join on one line.
func join(errs []error) error {
	all := errs[0]
	for _, err := range errs[1:] {
		all = fmt.Errorf("%w; %w", all, err)
	}
	return all
}
