package trust

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// PredicateTestResult is the predicate type of the load test's result.
const PredicateTestResult = "https://in-toto.io/attestation/test-result/v0.1"

// Outcomes of a load test, as they are shown to users.
const (
	VerdictLoaded   = "loaded"
	VerdictNoDevice = "loaded, no device"
	VerdictRejected = "rejected"
	// VerdictStatic means that there were only static checks. The load test was off, or no virtual machine could boot the
	// kernel and load the driver's module nvidia.
	VerdictStatic = "static checks only"
)

// LoadTest is Prebake's own field in a test result.
type LoadTest struct {
	Verdict string `json:"verdict"`
	// Reason says in one line why the verdict is not VerdictLoaded.
	Reason string `json:"reason,omitempty"`
	// Kernel is the COS build that was booted or checked.
	Kernel      target.Kernel      `json:"kernel"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	// Modules has the result of each module, in the order of loading.
	Modules []ModuleResult `json:"modules,omitempty"`
	// Release is the kernel release that uname -r printed in the machine.
	Release string `json:"release,omitempty"`
	// NVMLVersion is the driver version that NVML reported.
	NVMLVersion string `json:"nvmlVersion,omitempty"`
	// KernelLog is the end of the kernel's log.
	KernelLog string `json:"kernelLog,omitempty"`
}

// ModuleResult is the load test's result for one module.
type ModuleResult struct {
	Name string `json:"name"`
	// Result is loaded, skipped or rejected.
	Result string `json:"result"`
	Note   string `json:"note,omitempty"`
}

// TestResult is the predicate of a statement with type [PredicateTestResult].
type TestResult struct {
	// Result is PASSED, WARNED or FAILED.
	Result      string   `json:"result"`
	PassedTests []string `json:"passedTests"`
	WarnedTests []string `json:"warnedTests"`
	FailedTests []string `json:"failedTests"`
	LoadTest    LoadTest `json:"prebake_loadTest"`
}

// Reasons to refuse an artifact because of its load test; compare with errors.Is.
var (
	ErrRejected  = errors.New("the artifact's modules were rejected in the load test")
	ErrNotTested = errors.New("no load test attached")
)

// LoadTestPolicy says which load test a verifier demands.
type LoadTestPolicy string

// Policies for load tests. Each of them refuses an artifact whose load test failed.
const (
	// LoadTestAny also accepts artifacts that had only static checks, or no test result.
	LoadTestAny LoadTestPolicy = ""
	// LoadTestTested accepts an artifact only if a kernel with the artifact's ABI fingerprint has loaded its modules.
	LoadTestTested LoadTestPolicy = "tested"
)

// ParseLoadTestPolicy parses "any" or "tested".
func ParseLoadTestPolicy(text string) (LoadTestPolicy, error) {
	switch text {
	case "any":
		return LoadTestAny, nil
	case string(LoadTestTested):
		return LoadTestTested, nil
	}
	return "", fault.Errorf(fault.Usage, "load test policy %.40q: want any or tested", text)
}

// ParseTestResult parses the test result in a statement.
func ParseTestResult(st *Statement) (TestResult, error) {
	var r TestResult
	if st.PredicateType != PredicateTestResult {
		return r, fault.Errorf(fault.Unverified, "%w: a statement of type %.80q is not a test result", ErrMalformed,
			st.PredicateType)
	}
	if err := json.Unmarshal(st.Predicate, &r); err != nil {
		return r, fault.Errorf(fault.Unverified, "%w: parse the test result: %w", ErrMalformed, shortError{err})
	}
	verdicts := map[string][]string{
		VerdictLoaded: {"PASSED", "WARNED"}, VerdictNoDevice: {"WARNED"}, VerdictStatic: {"WARNED"},
		VerdictRejected: {"FAILED"},
	}
	if !slices.Contains(verdicts[r.LoadTest.Verdict], r.Result) {
		return r, fault.Errorf(fault.Unverified, "%w: the test result %.40q does not fit the verdict %.40q", ErrMalformed,
			r.Result,
			r.LoadTest.Verdict)
	}
	return r, nil
}

// loadTests collects the test results about an artifact. The results for the node's own COS build decide. If there are
// none, the results for other COS builds with the same ABI fingerprint decide.
type loadTests struct {
	own, other testResults // for the node's own COS build, and for other COS builds
	static     bool
}

// testResults has, by signer, the verdict of the best passed load test, and the error of a failed load test. A passed
// test cancels only a failed test of the same signer.
type testResults struct {
	passed   map[string]string
	rejected map[string]error
}

// add adds one statement, and reports whether it is a pass that counts. An error means that the statement does not
// count. Every trusted signer may reject modules. A pass counts only if maySign returns nil.
func (l *loadTests) add(st *Statement, e Expect, maySign func() error) (passed bool, err error) {
	r, err := ParseTestResult(st)
	if err != nil {
		return false, err
	}
	t := r.LoadTest
	if t.Fingerprint != e.Identity.Fingerprint {
		return false, fault.Errorf(fault.Mismatch,
			"%w: the load test was for ABI fingerprint %s; the artifact has ABI fingerprint %s",
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
	if err := maySign(); err != nil {
		return false, err
	}
	if to.passed[st.Signer()] != VerdictLoaded {
		to.passed[st.Signer()] = t.Verdict
	}
	return true, nil
}

// verdict returns the best pass, or the first rejection without a pass by the same signer.
func (t testResults) verdict() (passed string, rejected error) {
	for _, signer := range slices.Sorted(maps.Keys(t.rejected)) {
		if t.passed[signer] == "" {
			return "", t.rejected[signer]
		}
	}
	for _, words := range t.passed {
		if passed != VerdictLoaded {
			passed = words
		}
	}
	return passed, nil
}

// decide returns the load test's verdict for an artifact, or "" if there is none. It returns an error if the modules
// were rejected, or if the policy demands a load test that is missing.
func (l *loadTests) decide(p LoadTestPolicy) (string, error) {
	for _, of := range []testResults{l.own, l.other} {
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
			err = fmt.Errorf("%w: the builder ran %s", ErrNotTested, VerdictStatic)
		}
		return "", fault.Wrap(fault.Unverified, err,
			"accept artifacts without a load test (fetcher --load-test-policy any, or loadTest: any in the policy), "+
				"or publish the artifact again with a load test: builder build --load-test require")
	}
	return verdict, nil
}
