package trust

import (
	"time"

	"github.com/prebake/prebake/pkg/target"
)

// Names of labels. A label is an annotation on an attached statement, by which readers select statements. Labels are
// not signed, so they prove nothing. The first two are from the Sigstore bundle specification, and cosign reads them.
const (
	LabelContent   = "dev.sigstore.bundle.content"
	LabelPredicate = "dev.sigstore.bundle.predicateType"
	// LabelKernel has the COS build of a kernel match or a test result, as BUILD_ID/BOARD.
	LabelKernel = "dev.prebake.kernel.build"
	// LabelVerdict has the load test's verdict in a test result.
	LabelVerdict = "dev.prebake.load-test"
	// LabelCreated has the end of the build in a provenance (OCI image-spec, annotations.md). Package registry reads the
	// newest attachments first.
	LabelCreated = "org.opencontainers.image.created"
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
	if at := FinishedOn(st); !at.IsZero() {
		l[LabelCreated] = at.UTC().Format(time.RFC3339)
	}
	return l
}

// OfType returns the label that all statements of a predicate type have.
func OfType(predicateType string) map[string]string {
	return map[string]string{LabelPredicate: predicateType}
}

// Wanted returns the labels of the statements that [Verifier.Verify] needs for a kernel.
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
