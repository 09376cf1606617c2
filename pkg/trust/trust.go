// Package trust decides whether an artifact can be trusted. A trusted signer must have stated how the artifact was
// built, and that it fits this kernel and driver. The policy lists the trusted signers, as public keys or as
// certificate identities. In this package, a bundle is a Sigstore bundle: one signed statement with the proof of its
// signature.
//
// The package works offline and stores no secrets. It does not sign or fetch. It uses nothing from a statement before
// it has verified the statement's signature.
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

// Predicate types of the statements about an artifact, and the types under which they are stored.
const (
	// PredicateProvenance is the type of a statement about how, and from which inputs, an artifact was built.
	PredicateProvenance = "https://slsa.dev/provenance/v1"
	// PredicateKernelMatch is the type of a statement that an artifact fits one COS build.
	PredicateKernelMatch = "https://prebake.dev/kernel-match/v1"
	// PredicateSBOM is the type of a statement about the artifact's contents: an SPDX document.
	PredicateSBOM = "https://spdx.dev/Document"
	// BuildType is the build type in the provenance. It defines the meaning of the parameters.
	BuildType = "https://prebake.dev/build/v1"
	// ArtifactTypeBundle is the artifact type of attached Sigstore bundles.
	ArtifactTypeBundle = "application/vnd.dev.sigstore.bundle.v0.3+json"
)

// Errors about an artifact whose Sigstore bundles could be read. Compare with errors.Is.
var (
	ErrOtherDigest   = errors.New("the statement is about another artifact")
	ErrNoProvenance  = errors.New("no provenance attached")
	ErrNoKernelMatch = errors.New("no kernel match attached")
	ErrOtherKernel   = errors.New("the artifact is for another kernel")
	ErrOtherDriver   = errors.New("the artifact has another driver")
	ErrOtherIdentity = errors.New("the statement and the artifact disagree")
)

// Expect describes the artifact that the caller expects.
type Expect struct {
	// Digest is the digest of the manifest. The caller must have compared the manifest's bytes with it.
	Digest string
	// Kernel is the node's kernel. BuildID and Board are required. Release, Commit and Arch are compared with those of
	// the kernel match if both have a value. Version is not compared: its build counter and time may differ between the
	// headers and the image.
	Kernel target.Kernel
	// Driver is the requested driver.
	Driver target.Driver
	// Identity is what the manifest's annotations say about the artifact, such as its driver and its ABI fingerprint.
	Identity bundle.Identity
	// Now is the time at which a new artifact is accepted, for the policy's periods and ages. Zero skips these checks, for
	// an artifact that was accepted before.
	Now time.Time
}

// KernelMatch is the predicate of a statement with type [PredicateKernelMatch].
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

// Material is one input in the provenance's list of inputs.
type Material struct {
	Name   string `json:"name"`
	URI    string `json:"uri,omitempty"`
	Digest string `json:"digest"`
}

// Verdict has the facts that were verified about an artifact.
type Verdict struct {
	// KeyID is the ID of the key that signed the provenance. Identity is the name in the certificate that signed it.
	// One of KeyID and Identity is empty.
	KeyID    string `json:"keyId,omitempty"`
	Identity string `json:"identity,omitempty"`
	// BuilderID is the ID of the builder. InvocationID is the ID of the builder's run.
	BuilderID    string `json:"builderId"`
	InvocationID string `json:"invocationId,omitempty"`
	// Built has the driver, and the COS build for whose kernel the driver was compiled.
	Built Parameters `json:"built"`
	// Match is the kernel match for the node's COS build. MatchedBy is its signer, which may differ from the signer of the
	// provenance.
	Match     KernelMatch `json:"match"`
	MatchedBy string      `json:"matchedBy"`
	// Materials are the inputs of the build.
	Materials []Material `json:"materials"`
	// ModulesSigned is true if the provenance says that the modules are signed by the farm's key or by Google's key.
	ModulesSigned bool `json:"modulesSigned,omitempty"`
	// LoadTest is the load test's verdict. It is empty if no statement has one.
	LoadTest string `json:"loadTest,omitempty"`
	// BuiltOn is the end of the newest build to which as many signers as the policy demands have signed a provenance. Zero
	// means unknown.
	BuiltOn time.Time `json:"builtOn,omitzero"`
	// Signatures are all signatures that counted for a rule.
	Signatures []Signature `json:"signatures,omitempty"`
	// Ignored has a reason for each attached bundle that was not used.
	Ignored []string `json:"ignored,omitempty"`
}

// SignedBy returns the signer of the provenance, and the signer of the kernel match if it is another one.
func (v *Verdict) SignedBy() string {
	by := v.KeyID + v.Identity
	if v.MatchedBy != "" && v.MatchedBy != by {
		by += ", the kernel match by " + v.MatchedBy
	}
	return by
}

// String returns the verdict in one line.
func (v *Verdict) String() string {
	return fmt.Sprintf("driver %s for %s, signed by %s, built by %s from %d inputs",
		v.Built.Driver, v.Match.Kernel, v.SignedBy(), v.BuilderID, len(v.Materials))
}

// Verify decides whether an artifact may be used. It requires a valid provenance, and a valid kernel match for the
// node's COS build. It refuses an artifact whose load test failed. It ignores bundles that prove nothing, because
// anybody may attach them. It examines only the first [MaxBundles] bundles.
func (v *Verifier) Verify(bundles [][]byte, e Expect) (*Verdict, error) {
	verdict, err := v.verify(bundles, e)
	if err != nil {
		return nil, fmt.Errorf("verify artifact %s: %w", e.Digest, err)
	}
	return verdict, nil
}

// VerifyBefore is [Verifier.Verify] before the given kernel match is signed: the match counts as if it were signed and
// attached. A signer calls VerifyBefore to learn whether it may sign the kernel match.
func (v *Verifier) VerifyBefore(m KernelMatch, bundles [][]byte, e Expect) (*Verdict, error) {
	x, checks := v.evaluate(bundles, e)
	x.unsigned = true
	err := m.fits(e)
	if x.match.ok = true; x.verdict.MatchedBy == "" {
		x.verdict.Match = m
	}
	if err == nil {
		err = run(checks)
	}
	if err != nil {
		return nil, fmt.Errorf("verify artifact %s: %w", e.Digest, err)
	}
	return x.done(), nil
}

func (v *Verifier) verify(bundles [][]byte, e Expect) (*Verdict, error) {
	x, checks := v.evaluate(bundles, e)
	if err := run(checks); err != nil {
		return nil, err
	}
	return x.done(), nil
}

// run runs the checks until one fails.
func run(checks []check) error {
	for _, c := range checks {
		if _, err := c.run(); err != nil {
			return err
		}
	}
	return nil
}

// Explain is [Verifier.Verify] for messages to a person. It also returns the result of each rule. If the error is not
// nil, the verdict is nil.
func (v *Verifier) Explain(bundles [][]byte, e Expect) (*Verdict, []Finding, error) {
	x, checks := v.evaluate(bundles, e)
	var findings []Finding
	var first error
	for _, c := range checks {
		detail, err := c.run()
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

// evaluation collects the results of all statements about one artifact.
type evaluation struct {
	verdict                    Verdict
	provenance, match, useless tally
	tests                      loadTests
	built                      buildTimes
	unsigned                   bool // the kernel match is not signed yet, so no rule about it is checked
	// reasons has the reasons why statements did not count, by predicate type.
	reasons map[string][]error
}

// check is one rule. The callback returns a detail, or an error if the artifact does not satisfy the rule.
type check struct {
	name string
	run  func() (string, error)
}

func (x *evaluation) done() *Verdict {
	for _, err := range slices.Concat(x.provenance.errs, x.match.errs, x.useless.errs) {
		x.verdict.Ignored = append(x.verdict.Ignored, err.Error())
	}
	return &x.verdict
}

// evaluate reads all statements, and returns the rules in the order in which they are checked.
func (v *Verifier) evaluate(bundles [][]byte, e Expect) (*evaluation, []check) {
	x := &evaluation{reasons: map[string][]error{}}
	for i, data := range bundles {
		if i == MaxBundles {
			x.useless.add(fault.Errorf(fault.Unverified, "%d more attestations were not read", len(bundles)-MaxBundles))
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
	x.verdict.BuiltOn = x.built.decide(p.Rules)
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
			return cmp.Or(x.verdict.LoadTest, "no load test attached"), err
		}},
	}
	for _, rule := range p.Rules {
		checks = append(checks, check{"signatures on the " + statementName(rule.Statement),
			func() (string, error) { return x.checkRule(rule) }})
	}
	checks = append(checks, check{"age", func() (string, error) { return p.age(x.verdict, e.Now) }})
	if p.Listing != nil {
		checks = append(checks, check{"snapshot", func() (string, error) { return p.Listing.Check(e.Digest, e.Now) }})
	}
	return x, checks
}

// read evaluates one statement whose signature is valid.
func (x *evaluation) read(v *Verifier, st *Statement, e Expect) {
	// The content is checked before the signer, because a statement with wrong content must not count for any rule.
	var err error
	defer func() {
		if err != nil {
			x.reasons[st.PredicateType] = append(x.reasons[st.PredicateType], err)
		}
	}()
	switch st.PredicateType {
	case PredicateProvenance:
		if err = v.checkProvenance(st, e); err == nil {
			err = x.countSignature(st, v.policy, e.Now)
		}
		if err == nil {
			fillProvenance(st, &x.verdict)
		}
		x.provenance.judge(err)
		return
	case PredicateKernelMatch:
		var m KernelMatch
		if m, err = kernelMatch(st, e); err == nil {
			err = x.countSignature(st, v.policy, e.Now)
		}
		if err == nil && x.verdict.MatchedBy == "" {
			x.verdict.Match, x.verdict.MatchedBy = m, st.Signer()
		}
		x.match.judge(err)
		return
	case PredicateTestResult:
		// Every trusted signer may say that modules were rejected.
		var passed bool
		passed, err = x.tests.add(st, e, func() error { return x.countSignature(st, v.policy, e.Now) })
		if err == nil && !passed {
			return
		}
	case PredicateReproduced:
		if err = checkReproduction(st, e); err == nil {
			err = x.countSignature(st, v.policy, e.Now)
		}
	case PredicateSBOM, gpulist.PredicateType: // Verify does not need their content
		err = x.countSignature(st, v.policy, e.Now)
	default:
		err = fault.Errorf(fault.Unverified, "the statement has the unknown type %.80q", st.PredicateType)
	}
	if err != nil {
		x.useless.add(err)
	}
}

// check compares the manifest's identity with the requested driver and the node's kernel.
func (e Expect) check() error {
	if _, err := target.ParseKernel(e.Kernel.BuildID, e.Kernel.Board); err != nil {
		return fault.Wrap(fault.Usage, err, "")
	}
	id := e.Identity
	switch {
	case e.Driver != id.Driver:
		return fault.Errorf(fault.Mismatch, "%w: the artifact has driver %s; the wanted driver is %s", ErrOtherDriver,
			id.Driver, e.Driver)
	case e.Kernel.Arch != "" && e.Kernel.Arch != id.Arch:
		return fault.Errorf(fault.Mismatch, "%w: the artifact is for architecture %s; this node has %s", ErrOtherKernel,
			id.Arch,
			e.Kernel.Arch)
	case e.Kernel.Release != "" && e.Kernel.Release != id.Release:
		return fault.Errorf(fault.Mismatch, "%w: the artifact is for kernel release %s; this node runs %s", ErrOtherKernel,
			id.Release, e.Kernel.Release)
	}
	return nil
}

// ParseKernelMatch parses the kernel match in a statement.
func ParseKernelMatch(st *Statement) (KernelMatch, error) {
	var m KernelMatch
	if st.PredicateType != PredicateKernelMatch {
		return m, fault.Errorf(fault.Unverified, "%w: a statement of type %.80q is not a kernel match", ErrMalformed,
			st.PredicateType)
	}
	if err := json.Unmarshal(st.Predicate, &m); err != nil {
		return m, fault.Errorf(fault.Unverified, "%w: parse the kernel match: %w", ErrMalformed, shortError{err})
	}
	if _, err := target.ParseKernel(m.Kernel.BuildID, m.Kernel.Board); err != nil {
		return m, fault.Errorf(fault.Unverified, "%w: parse the kernel match: %w", ErrMalformed, err)
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
		return fault.Errorf(fault.Mismatch,
			"%w: the kernel match is for ABI fingerprint %s; the artifact has ABI fingerprint %s", ErrOtherIdentity,
			m.Fingerprint, e.Identity.Fingerprint)
	case said.BuildID != node.BuildID || said.Board != node.Board:
		return fault.Errorf(fault.Mismatch, "%w: the artifact has a kernel match for COS %s; this node runs COS %s",
			ErrOtherKernel, said, node)
	case differs(said.Release, node.Release):
		return fault.Errorf(fault.Mismatch, "%w: the kernel match for COS %s has kernel release %s; this node runs %s",
			ErrOtherKernel, said, said.Release, node.Release)
	case differs(string(said.Arch), string(node.Arch)):
		return fault.Errorf(fault.Mismatch, "%w: the kernel match for COS %s has architecture %s; this node has %s",
			ErrOtherKernel, said, said.Arch, node.Arch)
	case differs(said.Commit, node.Commit):
		return fault.Errorf(fault.Mismatch, "%w: the kernel match for COS %s has kernel commit %s; this node has %s",
			ErrOtherKernel, said, said.Commit, node.Commit)
	}
	return nil
}

// tally collects the results of all statements of one type: whether one is valid, and why others are not.
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

// explain returns nil if one of the statements is valid. If none is valid, it returns the first of these that exist:
// their errors, the errors of unusable bundles, the error none.
func (t *tally) explain(none error, useless tally) error {
	const shown = 3
	var missing error
	switch {
	case t.ok:
		return nil
	case len(t.errs) > 0:
		missing = fault.Join(t.errs[:min(shown, len(t.errs))]...)
	case len(useless.errs) > 0:
		errs := useless.errs[:min(shown, len(useless.errs))]
		missing = fmt.Errorf("%w that is valid: %w", none, fault.Join(errs...))
	default:
		return fault.Wrap(fault.Unverified, none,
			"copy the artifact together with its attestations: oras cp -r, or regctl image copy --referrers")
	}
	kind := fault.Unverified
	if len(t.errs) > 0 {
		kind = fault.Of(t.errs[0])
	}
	return fault.Wrap(kind, missing, "")
}
