package trust_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

func TestLoadTestDecides(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	k47 := testkit.SampleKernel("47")
	s := testkit.NewSample(t, key, k47, driver, "")
	twin := k47 // another COS build with the same kernel
	twin.BuildID = "17800.1.47"
	results := map[string]string{
		trust.VerdictLoaded: "PASSED", trust.VerdictNoDevice: "WARNED", trust.VerdictStatic: "WARNED",
		trust.VerdictRejected: "FAILED",
	}
	test := func(by *testkit.Key, verdict string, change func(*trust.LoadTest)) []byte {
		l := trust.LoadTest{Verdict: verdict, Kernel: k47, Fingerprint: s.Identity.Fingerprint, Reason: "for a reason"}
		if change != nil {
			change(&l)
		}
		return by.Statement(t, s.Digest, trust.PredicateTestResult, trust.TestResult{Result: results[verdict], LoadTest: l})
	}
	own := func(verdict string) []byte { return test(key, verdict, nil) }
	ofTwin := func(verdict string) []byte {
		return test(key, verdict, func(l *trust.LoadTest) { l.Kernel = twin })
	}
	otherFingerprint := test(key, trust.VerdictLoaded,
		func(l *trust.LoadTest) { l.Fingerprint = "sha256:" + l.Fingerprint[7:9] })
	disagrees := key.Statement(t, s.Digest, trust.PredicateTestResult,
		trust.TestResult{Result: "PASSED", LoadTest: trust.LoadTest{Verdict: trust.VerdictRejected}})
	rows := []struct {
		name   string
		tests  [][]byte
		policy trust.LoadTestPolicy
		want   string
		is     error
	}{
		{"nothing, any", nil, trust.LoadTestAny, "", nil},
		{"nothing, tested", nil, trust.LoadTestTested, "", trust.ErrNotTested},
		{"static, any", [][]byte{own(trust.VerdictStatic)}, trust.LoadTestAny, trust.VerdictStatic, nil},
		{"static, tested", [][]byte{own(trust.VerdictStatic)}, trust.LoadTestTested, "", trust.ErrNotTested},
		{"loaded", [][]byte{own(trust.VerdictLoaded)}, trust.LoadTestTested, trust.VerdictLoaded, nil},
		{"no device", [][]byte{own(trust.VerdictNoDevice)}, trust.LoadTestTested, trust.VerdictNoDevice, nil},
		{"both", [][]byte{own(trust.VerdictLoaded), own(trust.VerdictNoDevice)}, trust.LoadTestTested, trust.VerdictLoaded,
			nil},
		{"loaded on another COS build", [][]byte{ofTwin(trust.VerdictLoaded)}, trust.LoadTestTested, trust.VerdictLoaded,
			nil},
		{"rejected, any", [][]byte{own(trust.VerdictRejected)}, trust.LoadTestAny, "", trust.ErrRejected},
		{"rejected on another COS build", [][]byte{ofTwin(trust.VerdictRejected)}, trust.LoadTestAny, "", trust.ErrRejected},
		{"rejected, then loaded", [][]byte{own(trust.VerdictRejected), own(trust.VerdictLoaded)}, trust.LoadTestAny,
			trust.VerdictLoaded, nil},
		{"rejected here, loaded on another COS build", [][]byte{own(trust.VerdictRejected), ofTwin(trust.VerdictLoaded)},
			trust.LoadTestAny, "", trust.ErrRejected},
		{"loaded here, rejected on another COS build", [][]byte{own(trust.VerdictLoaded), ofTwin(trust.VerdictRejected)},
			trust.LoadTestAny, trust.VerdictLoaded, nil},
		{"a stranger's", [][]byte{test(stranger, trust.VerdictLoaded, nil)}, trust.LoadTestTested, "", trust.ErrNotTested},
		{"a stranger's rejection", [][]byte{test(stranger, trust.VerdictRejected, nil)}, trust.LoadTestAny, "", nil},
		{"of another fingerprint", [][]byte{otherFingerprint}, trust.LoadTestTested, "", trust.ErrNotTested},
		{"result and verdict disagree", [][]byte{disagrees}, trust.LoadTestTested, "", trust.ErrNotTested},
	}
	for _, row := range rows {
		v, err := trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{key.Public(t)}, LoadTest: row.policy})
		if err != nil {
			t.Fatal(err)
		}
		got, err := v.Verify(append(row.tests, s.Bundles...), s.Expect())
		switch {
		case row.is == nil && (err != nil || got.LoadTest != row.want):
			t.Errorf("%s: Verify = %+v, %v; want load test %q", row.name, got, err, row.want)
		case row.is != nil && (!errors.Is(err, row.is) || fault.Of(err) == fault.Internal):
			t.Errorf("%s: Verify = %+v, %v; want %v", row.name, got, err, row.is)
		case errors.Is(row.is, trust.ErrRejected) && !strings.Contains(err.Error(), "for a reason"):
			t.Errorf("%s: Verify = %v; want the reason", row.name, err)
		}
	}
}

// TestLoadTestRejections checks an artifact with several rejections. Verify must always report the same one of them, in
// whatever order the statements come.
func TestLoadTestRejections(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	keys, bundles := []trust.PublicKey{key.Public(t)}, s.Bundles
	for i := range 8 {
		key := testkit.NewKey(t)
		keys = append(keys, key.Public(t))
		bundles = append(bundles, key.Statement(t, s.Digest, trust.PredicateTestResult, trust.TestResult{Result: "FAILED",
			LoadTest: trust.LoadTest{Verdict: trust.VerdictRejected, Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint,
				Reason: fmt.Sprintf("reason %d", i)}}))
	}
	v, err := trust.NewVerifier(trust.Policy{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	first := ""
	for range 16 {
		_, err := v.Verify(bundles, s.Expect())
		if !errors.Is(err, trust.ErrRejected) {
			t.Fatalf("Verify = %v; want %v", err, trust.ErrRejected)
		}
		if first == "" {
			first = err.Error()
		}
		if err.Error() != first {
			t.Fatalf("Verify = %v; before it was %s", err, first)
		}
		slices.Reverse(bundles)
	}
}

func TestParseLoadTestPolicy(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]trust.LoadTestPolicy{"any": trust.LoadTestAny, "tested": trust.LoadTestTested} {
		if got, err := trust.ParseLoadTestPolicy(text); err != nil || got != want {
			t.Errorf("ParseLoadTestPolicy(%q) = %q, %v; want %q", text, got, err, want)
		}
	}
	if got, err := trust.ParseLoadTestPolicy("none"); !fault.Is(err, fault.Usage) {
		t.Errorf("ParseLoadTestPolicy(none) = %q, %v; want kind usage", got, err)
	}
}

func TestStatements(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	sbom := func(by *testkit.Key, digest string) []byte {
		return by.Statement(t, digest, trust.PredicateSBOM, map[string]string{"spdxVersion": "SPDX-2.3"})
	}
	all := append([][]byte{sbom(stranger, s.Digest), sbom(key, "sha256:"+strings.Repeat("0", 64)), []byte("junk"),
		sbom(key, s.Digest)}, s.Bundles...)
	got := key.Verifier(t).Statements(all, s.Digest, trust.PredicateSBOM)
	if len(got) != 1 || string(got[0].Predicate) != `{"spdxVersion":"SPDX-2.3"}` {
		t.Errorf("Statements = %v; want the one contents statement by our key about this digest", got)
	}
}
