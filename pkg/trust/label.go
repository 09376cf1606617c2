package trust

import "github.com/prebake/prebake/pkg/target"

// Labels stand as annotations on attached statements, so that readers need not
// fetch all of them. They prove nothing. The first two are in the terms of the
// Sigstore bundle specification; cosign reads them.
const (
	LabelContent   = "dev.sigstore.bundle.content"
	LabelPredicate = "dev.sigstore.bundle.predicateType"
	// LabelKernel is the COS build, as BUILD_ID/BOARD, of a kernel match or a test
	// result.
	LabelKernel = "dev.prebake.kernel.build"
	// LabelVerdict is the load test's verdict in a test result.
	LabelVerdict = "dev.prebake.load-test"
)

// Labels returns the labels of a statement.
func Labels(st *Statement) map[string]string {
	l := map[string]string{LabelContent: "dsse-envelope", LabelPredicate: st.PredicateType}
	if m, err := ParseKernelMatch(st); err == nil {
		l[LabelKernel] = m.Kernel.String()
	}
	if r, err := ParseTestResult(st); err == nil {
		l[LabelKernel], l[LabelVerdict] = r.LoadTest.Kernel.String(), r.LoadTest.Verdict
	}
	return l
}

// OfType is the label of statements of a type.
func OfType(predicateType string) map[string]string {
	return map[string]string{LabelPredicate: predicateType}
}

// Wanted returns the labels of the statements by which [Verifier.Verify] decides
// for a kernel. An artifact may have hundreds for other builds of its kernel.
func Wanted(k target.Kernel) []map[string]string {
	return []map[string]string{
		OfType(PredicateProvenance),
		{LabelPredicate: PredicateKernelMatch, LabelKernel: k.String()},
		{LabelPredicate: PredicateTestResult, LabelKernel: k.String()},
		{LabelPredicate: PredicateTestResult, LabelVerdict: VerdictLoaded},
		{LabelPredicate: PredicateTestResult, LabelVerdict: VerdictRejected},
		OfType(PredicateTestResult),
	}
}
