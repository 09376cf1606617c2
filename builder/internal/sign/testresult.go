package sign

import (
	"encoding/json"
	"fmt"
	"strings"

	testresult "github.com/in-toto/attestation/go/predicates/test_result/v0"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// TestFacts is the content of a test result.
type TestFacts struct {
	Driver target.Driver
	// LoadTest is the verdict of the load test with its observations. Only the last [MaxTestLog] bytes of the kernel's log
	// are kept.
	LoadTest trust.LoadTest
	// Static has the names of the passed static checks. An artifact that fails one gets no load test.
	Static []string
	// Warnings are lines of the kernel's log that a person should read even if the test passed.
	Warnings []string
	// Configuration lists the files that the test used, such as the boot image, with their digests. TestResult adds the
	// kernel.
	Configuration []Material
	// URL is the address of a page about the test, for people. It may be empty.
	URL string
}

// Limits in bytes and lines. They keep a statement small, because nodes fetch it.
const (
	MaxTestLog   = 32 << 10
	maxTestLines = 64
	maxTestLine  = 400
)

// fieldLoadTest is Prebake's own field of the predicate, named by in-toto's rule: vendor, underscore, name.
const fieldLoadTest = "prebake_loadTest"

// annotationBuildID is the annotation of a file in the configuration that has its GNU build id.
const annotationBuildID = "gnuBuildID"

// TestResult makes the statement about the tests of the artifact with this manifest digest: in-toto's test-result v0.1.
func TestResult(digest string, f TestFacts) (Statement, error) {
	s, err := newTestResult(digest, f)
	if err != nil {
		return Statement{}, fmt.Errorf("make the statement of the test result: %w", err)
	}
	return s, nil
}

func newTestResult(digest string, f TestFacts) (Statement, error) {
	t := f.LoadTest
	t.KernelLog, t.Reason = lastLines(t.KernelLog, MaxTestLog), oneLine(t.Reason)
	p := &testresult.TestResult{Url: f.URL, PassedTests: shortLines(f.Static)}
	for _, m := range t.Modules {
		name := "load " + oneLine(m.Name)
		switch m.Result {
		case "loaded":
			p.PassedTests = append(p.PassedTests, name)
		case "skipped":
			p.WarnedTests = append(p.WarnedTests, name+": skipped: "+oneLine(m.Note))
		case "rejected":
			p.FailedTests = append(p.FailedTests, name+": "+oneLine(m.Note))
		default:
			return Statement{}, fmt.Errorf("module %s has the result %q; want loaded, skipped or rejected", m.Name, m.Result)
		}
	}
	for _, w := range shortLines(f.Warnings) {
		p.WarnedTests = append(p.WarnedTests, "kernel log: "+w)
	}
	summary := t.Verdict
	if t.Reason != "" {
		summary += ": " + t.Reason
	}
	switch t.Verdict {
	case trust.VerdictLoaded:
		p.PassedTests = append(p.PassedTests, summary)
		p.Result = "PASSED"
		if len(p.WarnedTests) > 0 {
			p.Result = "WARNED"
		}
	case trust.VerdictNoDevice, trust.VerdictStatic:
		p.Result, p.WarnedTests = "WARNED", append(p.WarnedTests, summary)
	case trust.VerdictRejected:
		p.Result, p.FailedTests = "FAILED", append(p.FailedTests, summary)
	default:
		return Statement{}, fmt.Errorf("verdict %q: a load test has no such verdict", t.Verdict)
	}
	if t.Verdict != trust.VerdictRejected && len(p.FailedTests) > 0 {
		return Statement{}, fmt.Errorf("the verdict is %q, although a test failed: %s", t.Verdict, p.FailedTests[0])
	}
	// An entry needs a digest. A COS build has none, so the entry has the kernel's fingerprint.
	k, err := resource("kernel", "", string(t.Fingerprint))
	if err != nil {
		return Statement{}, fmt.Errorf("add the kernel's ABI fingerprint to the statement: %w", err)
	}
	k.Name = "kernel " + t.Kernel.String()
	p.Configuration = append(p.Configuration, k)
	for _, m := range f.Configuration {
		rd, err := resource(m.Name, m.URI, m.Digest)
		if err != nil {
			return Statement{}, fmt.Errorf("add the configuration %s to the statement: %w", m.Name, err)
		}
		if m.BuildID != "" {
			rd.Annotations = &structpb.Struct{Fields: map[string]*structpb.Value{
				annotationBuildID: structpb.NewStringValue(m.BuildID)}}
		}
		p.Configuration = append(p.Configuration, rd)
	}
	raw, err := protojson.Marshal(p)
	if err != nil {
		return Statement{}, err
	}
	body := &structpb.Struct{}
	if err := protojson.Unmarshal(raw, body); err != nil {
		return Statement{}, err
	}
	own, err := toStruct(t)
	if err != nil {
		return Statement{}, err
	}
	body.Fields[fieldLoadTest] = structpb.NewStructValue(own)
	return newStatement(digest, f.Driver, trust.PredicateTestResult, body)
}

// SBOM makes a statement about the contents of the artifact with this manifest digest. doc is an SPDX document in JSON.
func SBOM(digest string, d target.Driver, doc []byte) (Statement, error) {
	s, err := func() (Statement, error) {
		var head struct {
			Version string `json:"spdxVersion"`
		}
		if err := json.Unmarshal(doc, &head); err != nil {
			return Statement{}, err
		}
		if !strings.HasPrefix(head.Version, "SPDX-2.") {
			return Statement{}, fmt.Errorf("spdxVersion %.40q: want SPDX-2.x", head.Version)
		}
		body := &structpb.Struct{}
		if err := body.UnmarshalJSON(doc); err != nil {
			return Statement{}, err
		}
		return newStatement(digest, d, trust.PredicateSBOM, body)
	}()
	if err != nil {
		return Statement{}, fmt.Errorf("make the statement of the contents: %w", err)
	}
	return s, nil
}

// shortLines returns at most maxTestLines of the texts, each shortened by oneLine. One more line says how many are left
// out.
func shortLines(texts []string) []string {
	var all []string
	for i, text := range texts {
		if i == maxTestLines {
			return append(all, fmt.Sprintf("%d more", len(texts)-i))
		}
		all = append(all, oneLine(text))
	}
	return all
}

// oneLine returns the first line of a text, as valid UTF-8 of limited length. Statements must be valid UTF-8.
func oneLine(text string) string {
	text, _, _ = strings.Cut(strings.TrimSpace(text), "\n")
	return strings.ToValidUTF8(text[:min(len(text), maxTestLine)], "?")
}

// lastLines returns the last whole lines of a text that fit into the limit in bytes.
func lastLines(text string, limit int) string {
	if len(text) > limit {
		_, text, _ = strings.Cut(text[len(text)-limit:], "\n")
	}
	return strings.ToValidUTF8(text, "?")
}
