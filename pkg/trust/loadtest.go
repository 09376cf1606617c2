package trust

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// PredicateTestResult says whether an artifact's modules were loaded before it
// was published, and with what outcome.
const PredicateTestResult = "https://in-toto.io/attestation/test-result/v0.1"

// The outcomes of a load test, in terms for people.
const (
	VerdictLoaded   = "loaded"
	VerdictNoDevice = "loaded, no device"
	VerdictRejected = "rejected"
	// VerdictStatic is for kernels that no virtual machine can boot.
	VerdictStatic = "static checks only"
)

// LoadTest is our part of a test result: a field of that predicate, since the
// predicate's own know names of tests only.
type LoadTest struct {
	Verdict string `json:"verdict"`
	// Reason says in a line why the verdict is not loaded.
	Reason string `json:"reason,omitempty"`
	// Kernel is the COS build that was booted, or checked against.
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	// Modules are in the order in which they were loaded.
	Modules []ModuleResult `json:"modules,omitempty"`
	// Release is what uname -r said in the machine.
	Release string `json:"release,omitempty"`
	// NVMLVersion is the driver version that NVML reported.
	NVMLVersion string `json:"nvmlVersion,omitempty"`
	// KernelLog is the end of what the kernel said.
	KernelLog string `json:"kernelLog,omitempty"`
}

// ModuleResult is what happened to one module.
type ModuleResult struct {
	Name string `json:"name"`
	// Result is loaded, skipped or rejected.
	Result string `json:"result"`
	Note   string `json:"note,omitempty"`
}

// TestResult is the predicate of that name.
type TestResult struct {
	// Result is PASSED, WARNED or FAILED.
	Result      string   `json:"result"`
	PassedTests []string `json:"passedTests"`
	WarnedTests []string `json:"warnedTests"`
	FailedTests []string `json:"failedTests"`
	LoadTest    LoadTest `json:"prebake_loadTest"`
}

// The two ways in which the load test decides over an artifact; for errors.Is.
var (
	ErrRejected  = errors.New("its modules were rejected in the load test")
	ErrNotTested = errors.New("no load test attached")
)

// LoadTestPolicy says what a verifier wants to know about the load test.
type LoadTestPolicy string

// Whatever the policy, modules that failed their load test are refused.
const (
	// LoadTestAny takes artifacts that had static checks only, too.
	LoadTestAny LoadTestPolicy = ""
	// LoadTestTested takes artifacts whose modules a kernel of their
	// fingerprint has loaded.
	LoadTestTested LoadTestPolicy = "tested"
)

// ParseLoadTestPolicy reads any or tested.
func ParseLoadTestPolicy(text string) (LoadTestPolicy, error) {
	switch text {
	case "any":
		return LoadTestAny, nil
	case string(LoadTestTested):
		return LoadTestTested, nil
	}
	return "", fault.Errorf(fault.Usage, "load test policy %.40q: want any or tested", text)
}

// ParseTestResult reads a test result out of a statement.
func ParseTestResult(st *Statement) (TestResult, error) {
	var r TestResult
	if st.PredicateType != PredicateTestResult {
		return r, fault.Errorf(fault.Unverified, "%w: statement of type %.80q is no test result", ErrMalformed,
			st.PredicateType)
	}
	if err := json.Unmarshal(st.Predicate, &r); err != nil {
		return r, fault.Errorf(fault.Unverified, "%w: test result: %w", ErrMalformed, cut{err})
	}
	verdicts := map[string][]string{
		VerdictLoaded: {"PASSED", "WARNED"}, VerdictNoDevice: {"WARNED"}, VerdictStatic: {"WARNED"},
		VerdictRejected: {"FAILED"},
	}
	if !slices.Contains(verdicts[r.LoadTest.Verdict], r.Result) {
		return r, fault.Errorf(fault.Unverified, "%w: test result %.40q with verdict %.40q", ErrMalformed, r.Result,
			r.LoadTest.Verdict)
	}
	return r, nil
}

// loadTests collects what statements say about the load test. Those of the
// node's own COS build outweigh those of others with the same fingerprint.
type loadTests struct {
	own, other tested
	static     bool
}

// tested is what is said of one build, or of others: the best pass of each signer, and
// the rejections. A pass revokes the rejection of the same signer, and of nobody else.
type tested struct {
	passed   map[string]string
	rejected map[string]error
}

// add judges one statement. An error means that it says nothing; counts is asked whether
// its signer may say that modules were loaded. That they were rejected, anybody who is
// trusted may say. passed reports that a kernel loaded them, by somebody who counts.
func (l *loadTests) add(st *Statement, e Expect, counts func() error) (passed bool, err error) {
	r, err := ParseTestResult(st)
	if err != nil {
		return false, err
	}
	t := r.LoadTest
	if t.Fingerprint != e.Identity.Fingerprint {
		return false, fault.Errorf(fault.Mismatch, "%w: load test is of fingerprint %s, the artifact says %s",
			ErrOtherIdentity, t.Fingerprint, e.Identity.Fingerprint)
	}
	to := &l.other
	if t.Kernel.BuildID == e.Kernel.BuildID && t.Kernel.Board == e.Kernel.Board {
		to = &l.own
	}
	if to.passed == nil {
		to.passed, to.rejected = map[string]string{}, map[string]error{}
	}
	switch t.Verdict {
	case VerdictRejected:
		to.rejected[st.Signer()] = fault.Errorf(fault.Mismatch, "%w, on %s: %.200q", ErrRejected, t.Kernel, t.Reason)
		return false, nil
	case VerdictStatic:
		l.static = true
		return false, nil
	}
	if err := counts(); err != nil {
		return false, err
	}
	if to.passed[st.Signer()] != VerdictLoaded {
		to.passed[st.Signer()] = t.Verdict
	}
	return true, nil
}

// verdict returns the best pass, or a rejection that its signer did not revoke.
func (t tested) verdict() (passed string, rejected error) {
	for signer, err := range t.rejected {
		if t.passed[signer] == "" {
			return "", err
		}
	}
	for _, words := range t.passed {
		if passed != VerdictLoaded {
			passed = words
		}
	}
	return passed, nil
}

// decide returns the verdict's words, "" where there is none.
func (l *loadTests) decide(p LoadTestPolicy) (string, error) {
	for _, of := range []tested{l.own, l.other} {
		if passed, rejected := of.verdict(); passed != "" || rejected != nil {
			return passed, rejected
		}
	}
	verdict := ""
	if l.static {
		verdict = VerdictStatic
	}
	if p == LoadTestTested {
		err := ErrNotTested
		if l.static {
			err = fmt.Errorf("%w: it had %s", ErrNotTested, VerdictStatic)
		}
		return "", fault.Wrap(fault.Unverified, err,
			"publish it again with builder build --load-test require, or allow artifacts without a load test")
	}
	return verdict, nil
}
