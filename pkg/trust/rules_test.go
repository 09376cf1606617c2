package trust_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// TestRules checks rules for statements of two roles, farm and rebuilder, as a node's owner may write them into a
// policy.
func TestRules(t *testing.T) {
	t.Parallel()
	farm, farm2, rebuilder, stranger := testkit.NewKey(t), testkit.NewKey(t), testkit.NewKey(t), testkit.NewKey(t)
	s := testkit.NewSample(t, farm, testkit.SampleKernel("47"), driver, "")
	params := trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: driver}
	match := trust.KernelMatch{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint}
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	finishedBy := func(k *testkit.Key, when, uri string) []byte {
		p := testkit.ProvenancePredicate(params)
		p["runDetails"].(map[string]any)["metadata"] = map[string]any{"finishedOn": when}
		if uri != "" {
			p["buildDefinition"].(map[string]any)["resolvedDependencies"] = []any{map[string]any{"name": "headers", "uri": uri,
				"digest": map[string]string{"sha256": strings.Repeat("5", 64)}}}
		}
		return k.Statement(t, s.Digest, trust.PredicateProvenance, p)
	}
	finished := func(when, uri string) []byte { return finishedBy(farm, when, uri) }
	reproduction := func(k *testkit.Key, result string) []byte {
		return k.Statement(t, s.Digest, trust.PredicateReproduced, map[string]any{
			"result": result, "fingerprint": s.Identity.Fingerprint, "driver": driver,
		})
	}
	loaded := func(k *testkit.Key, verdict string) []byte {
		result := map[string]string{trust.VerdictLoaded: "PASSED", trust.VerdictStatic: "WARNED"}[verdict]
		return k.Statement(t, s.Digest, trust.PredicateTestResult, trust.TestResult{
			Result: result, LoadTest: trust.LoadTest{Verdict: verdict, Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint},
		})
	}
	tests := func(count int) func(p *trust.Policy) {
		return func(p *trust.Policy) {
			p.Rules = append(p.Rules, trust.Rule{Statement: trust.PredicateTestResult, Role: "farm", Count: count})
		}
	}
	tested := func(p *trust.Policy) { p.LoadTest = trust.LoadTestTested }
	rejected := func(k *testkit.Key) []byte {
		return k.Statement(t, s.Digest, trust.PredicateTestResult, trust.TestResult{
			Result: "FAILED", LoadTest: trust.LoadTest{Verdict: trust.VerdictRejected, Kernel: s.Kernel,
				Fingerprint: s.Identity.Fingerprint},
		})
	}
	prov, fits := s.Bundles[0], s.Bundles[1]
	prov2, fits2 := farm2.Provenance(t, s.Digest, params), farm2.KernelMatch(t, s.Digest, match)
	policy := func() trust.Policy {
		return trust.Policy{
			Roles: []trust.Role{
				{Name: "farm", Keys: []trust.RoleKey{{Key: farm.Public(t)}, {Key: farm2.Public(t)}}},
				{Name: "rebuilder", Keys: []trust.RoleKey{{Key: rebuilder.Public(t)}}},
			},
			Rules: []trust.Rule{{Statement: trust.PredicateProvenance, Role: "farm", Count: 1},
				{Statement: trust.PredicateKernelMatch, Role: "farm", Count: 1}},
		}
	}
	two := func(p *trust.Policy) { p.Rules[0].Count = 2 }
	again := func(p *trust.Policy) {
		p.Rules = append(p.Rules, trust.Rule{Statement: trust.PredicateReproduced, Role: "rebuilder", Count: 1})
	}
	rows := []struct {
		name    string
		change  func(*trust.Policy)
		bundles [][]byte
		now     time.Time
		is      error // expected error; nil means that Verify must accept the artifact
		text    string
		hint    string // the end of the hint
	}{
		{name: "one farm key", bundles: [][]byte{prov, fits}},
		{name: "the other farm key", bundles: [][]byte{prov2, fits2}},
		{name: "one key each", bundles: [][]byte{prov, fits2}},
		{name: "a rebuilder is no farm", bundles: [][]byte{rebuilder.Provenance(t, s.Digest, params), fits},
			is: trust.ErrOtherRole, text: "is not in role farm"},
		{name: "nor for the kernel match", bundles: [][]byte{prov, rebuilder.KernelMatch(t, s.Digest, match)},
			is: trust.ErrOtherRole},
		{name: "a stranger", bundles: [][]byte{stranger.Provenance(t, s.Digest, params), fits}, is: trust.ErrUnknownKey},
		{name: "two of two", change: two, bundles: [][]byte{prov, prov2, fits}},
		{name: "one of two", change: two, bundles: [][]byte{prov, fits}, is: trust.ErrThreshold, text: "1 of 2 by role farm"},
		{name: "one key twice is one", change: two, bundles: [][]byte{prov, finished("2026-05-01T00:00:00Z", ""), fits},
			is: trust.ErrThreshold},
		{name: "the second is a stranger's", change: two,
			bundles: [][]byte{prov, stranger.Provenance(t, s.Digest, params), fits}, is: trust.ErrThreshold},
		{name: "made again", change: again, bundles: [][]byte{prov, fits, reproduction(rebuilder, "identical")}},
		{name: "not made again", change: again, bundles: [][]byte{prov, fits}, is: trust.ErrThreshold, text: "reproduction"},
		{name: "made again by the farm", change: again, bundles: [][]byte{prov, fits, reproduction(farm, "identical")},
			is: trust.ErrThreshold},
		{name: "made again, and different", change: again,
			bundles: [][]byte{prov, fits, reproduction(rebuilder, "different")}, is: trust.ErrThreshold},
		{name: "anybody trusted may say that it failed", bundles: [][]byte{prov, fits, rejected(rebuilder)},
			is: trust.ErrRejected},
		{name: "a stranger may not", bundles: [][]byte{prov, fits, rejected(stranger)}},
		{name: "a pass by another signer revokes no rejection",
			bundles: [][]byte{prov, fits, rejected(farm), loaded(farm2, trust.VerdictLoaded)}, is: trust.ErrRejected},
		{name: "a pass by the same signer does",
			bundles: [][]byte{prov, fits, rejected(farm), loaded(farm, trust.VerdictLoaded)}},
		{name: "tested by the other farm key", change: tested,
			bundles: [][]byte{prov, fits, loaded(farm2, trust.VerdictLoaded)}},
		{name: "tested by a rebuilder", change: tested, bundles: [][]byte{prov, fits, loaded(rebuilder, trust.VerdictLoaded)},
			is: trust.ErrNotTested},
		{name: "tested by two", change: tests(2),
			bundles: [][]byte{prov, fits, loaded(farm, trust.VerdictLoaded), loaded(farm2, trust.VerdictLoaded)}},
		{name: "static checks are no load test", change: tests(2),
			bundles: [][]byte{prov, fits, loaded(farm, trust.VerdictLoaded), loaded(farm2, trust.VerdictStatic)},
			is:      trust.ErrThreshold},
		{name: "a rejection is no test passed", change: tests(2),
			bundles: [][]byte{prov, fits, loaded(farm, trust.VerdictLoaded), rejected(farm2)}, is: trust.ErrRejected},
		{name: "built in the future", change: age(30), bundles: [][]byte{finished("2099-05-20T00:00:00Z", ""), fits},
			now: now, text: "in the future"},
		{name: "the newest of two decides", change: age(30),
			bundles: [][]byte{finished("2026-01-20T00:00:00Z", ""), finished("2026-05-20T00:00:00Z", ""), fits}, now: now},
		{name: "in any order", change: age(30),
			bundles: [][]byte{finished("2026-05-20T00:00:00Z", ""), finished("2026-01-20T00:00:00Z", ""), prov, fits}, now: now},
		{name: "a wrong clock hides no other build", change: age(30),
			bundles: [][]byte{finished("2099-05-20T00:00:00Z", ""), finished("2026-05-20T00:00:00Z", ""), fits}, now: now},
		{name: "one of two signers cannot renew alone", change: func(p *trust.Policy) { two(p); age(30)(p) },
			bundles: [][]byte{finished("2026-05-20T00:00:00Z", ""), finishedBy(farm2, "2026-01-20T00:00:00Z", ""), fits},
			now:     now, is: trust.ErrTooOld},
		{name: "both can", change: func(p *trust.Policy) { two(p); age(30)(p) },
			bundles: [][]byte{finished("2026-05-20T00:00:00Z", ""), finishedBy(farm2, "2026-01-20T00:00:00Z", ""),
				finishedBy(farm2, "2026-05-21T00:00:00Z", ""), fits}, now: now},
		{name: "a rebuilder cannot renew", change: age(30),
			bundles: [][]byte{finished("2026-01-20T00:00:00Z", ""), finishedBy(rebuilder, "2026-05-20T00:00:00Z", ""), fits},
			now:     now, is: trust.ErrTooOld},
		{name: "revoked", change: func(p *trust.Policy) { p.Revoked = []string{s.Digest} }, bundles: [][]byte{prov, fits},
			is: trust.ErrRevoked},
		{name: "within its period", change: period(farm.Public(t), "2026-01-01", "2026-12-31"), bundles: [][]byte{prov, fits},
			now: now},
		{name: "expired", change: period(farm.Public(t), "", "2026-05-31"), bundles: [][]byte{prov, fits}, now: now,
			is: trust.ErrKeyPeriod, text: "was valid until 2026-05-31"},
		{name: "not yet", change: period(farm.Public(t), "2026-07-01", ""), bundles: [][]byte{prov, fits}, now: now,
			is: trust.ErrKeyPeriod},
		{name: "a clock in 1970", change: period(farm.Public(t), "2026-01-01", ""), bundles: [][]byte{prov, fits},
			now: time.Unix(0, 0), is: trust.ErrKeyPeriod, text: "the date of this machine is 1970-01-01"},
		{name: "expired, and accepted before", change: period(farm.Public(t), "", "2026-05-31"),
			bundles: [][]byte{prov, fits}},
		{name: "expired, and signed by the next key", change: period(farm.Public(t), "", "2026-05-31"),
			bundles: [][]byte{prov, fits, prov2, fits2}, now: now},
		{name: "young", change: age(30), bundles: [][]byte{finished("2026-05-20T00:00:00Z", ""), fits}, now: now},
		{name: "old", change: age(30), bundles: [][]byte{finished("2026-04-20T00:00:00Z", ""), fits}, now: now,
			is: trust.ErrTooOld, text: "42 days ago", hint: "--max-age 15"},
		{name: "too old for 14 days", change: age(14), bundles: [][]byte{finished("2026-05-12T00:00:00Z", ""), fits},
			now: now, is: trust.ErrTooOld, text: "20 days ago", hint: "--max-age 7"},
		{name: "too old for a day", change: age(1), bundles: [][]byte{finished("2026-05-30T00:00:00Z", ""), fits},
			now: now, is: trust.ErrTooOld, hint: "--max-age 1"},
		{name: "too old for a year", change: age(365), bundles: [][]byte{finished("2025-01-01T00:00:00Z", ""), fits},
			now: now, is: trust.ErrTooOld, hint: "--max-age 30"},
		{name: "without a build time", change: age(30), bundles: [][]byte{prov, fits}, now: now, text: "does not say when",
			hint: "--max-age 15"},
		{name: "old, and accepted before", change: age(30), bundles: [][]byte{finished("2026-04-20T00:00:00Z", ""), fits}},
		{name: "inputs of COS's bucket", change: sources,
			bundles: [][]byte{finished("", "gs://cos-tools/1/lakitu/kernel-headers.tgz"), fits}},
		{name: "inputs of elsewhere", change: sources,
			bundles: [][]byte{finished("", "gs://cos-tools.evil/kernel-headers.tgz"), fits}, is: trust.ErrOtherInput},
		{name: "inputs of no place", change: sources, bundles: [][]byte{finished("", " "), fits}, is: trust.ErrOtherInput},
		{name: "as new as wanted", change: least("535.261.03"), bundles: [][]byte{prov, fits}},
		{name: "older than wanted in its branch", change: least("535.261.04", "510.1"), bundles: [][]byte{prov, fits},
			is: trust.ErrTooOld},
		{name: "of a branch that is newer than those named", change: least("525.1.1"), bundles: [][]byte{prov, fits}},
		{name: "of a branch that nobody named", change: least("525.1.1", "550.1.1"), bundles: [][]byte{prov, fits},
			is: trust.ErrTooOld},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := policy()
			if row.change != nil {
				row.change(&p)
			}
			v, err := trust.NewVerifier(p)
			if err != nil {
				t.Fatal(err)
			}
			e := s.Expect()
			e.Now = row.now
			got, err := v.Verify(row.bundles, e)
			if refuse := row.is != nil || row.text != ""; refuse != (err != nil) || row.is != nil && !errors.Is(err, row.is) ||
				err != nil && !strings.Contains(err.Error(), row.text) {
				t.Fatalf("Verify = %v; want %v %q", err, row.is, row.text)
			}
			if err != nil && fault.Of(err) == fault.Internal {
				t.Errorf("Verify = %v of no kind", err)
			}
			if !strings.HasSuffix(fault.Hint(err), row.hint) {
				t.Errorf("hint %q; want %q", fault.Hint(err), row.hint)
			}
			_, findings, xerr := v.Explain(row.bundles, e)
			if (xerr == nil) != (err == nil) || err != nil && xerr.Error() != err.Error() {
				t.Errorf("Explain = %v; want what Verify says: %v", xerr, err)
			}
			if bad := slices.ContainsFunc(findings, func(f trust.Finding) bool { return !f.OK }); bad != (err != nil) ||
				len(findings) < 7 {
				t.Errorf("Explain = %+v", findings)
			}
			for _, f := range findings {
				if f.Detail == "" || f.Rule == "" {
					t.Errorf("finding without words: %+v", f)
				}
			}
			if err == nil && (len(got.Signatures) < 2 || got.Signatures[0].Role == "") {
				t.Errorf("signatures %+v; want who signed what", got.Signatures)
			}
		})
	}
}

// TestVerifyBefore checks an artifact before its kernel match is signed. VerifyBefore must treat this kernel match as
// if it existed, and still require everything else.
func TestVerifyBefore(t *testing.T) {
	t.Parallel()
	farm, stranger := testkit.NewKey(t), testkit.NewKey(t)
	s := testkit.NewSample(t, farm, testkit.SampleKernel("47"), driver, "")
	match := trust.KernelMatch{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint}
	other := match
	other.Fingerprint = "sha256:" + target.Fingerprint(strings.Repeat("0", 64))
	elsewhere := match
	elsewhere.Kernel.BuildID = "17800.1.47"
	for _, row := range []struct {
		name    string
		match   trust.KernelMatch
		bundles [][]byte
		is      error
	}{
		{"provenance alone", match, s.Bundles[:1], nil},
		{"with a match", match, s.Bundles, nil},
		{"no provenance", match, nil, trust.ErrNoProvenance},
		{"a stranger's provenance", match, [][]byte{stranger.Provenance(t, s.Digest,
			trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Driver: driver})}, trust.ErrNoProvenance},
		{"a match for another fingerprint", other, s.Bundles, trust.ErrOtherIdentity},
		{"a match for another kernel", elsewhere, s.Bundles, trust.ErrOtherKernel},
	} {
		v, err := farm.Verifier(t).VerifyBefore(row.match, row.bundles, s.Expect())
		if !errors.Is(err, row.is) || row.is == nil && (err != nil || v.Match != match) {
			t.Errorf("%s: VerifyBefore = %v, %v; want %v", row.name, v, err, row.is)
		}
	}
	if _, err := farm.Verifier(t).Verify(s.Bundles[:1], s.Expect()); !errors.Is(err, trust.ErrNoKernelMatch) {
		t.Errorf("Verify without a kernel match = %v; want it refused", err)
	}
}

func period(k trust.PublicKey, from, until string) func(*trust.Policy) {
	day := func(text string) (at time.Time) {
		at, _ = time.Parse(time.DateOnly, text) // the zero time for ""
		return at
	}
	return func(p *trust.Policy) {
		for i := range p.Roles[0].Keys {
			if p.Roles[0].Keys[i].Key.ID() != k.ID() {
				continue
			}
			p.Roles[0].Keys[i].NotBefore, p.Roles[0].Keys[i].NotAfter = day(from), day(until)
		}
	}
}

func age(days int) func(*trust.Policy) {
	return func(p *trust.Policy) { p.MaxAge = time.Duration(days) * 24 * time.Hour }
}

func sources(p *trust.Policy) { p.Sources = []string{"gs://cos-tools/"} }

func least(versions ...string) func(*trust.Policy) {
	return func(p *trust.Policy) { p.MinVersions = versions }
}

// TestPolicyThatCannotBe checks that NewVerifier refuses a policy without a rule for the provenance or for the kernel
// match, a malformed policy, and a policy that no artifact can satisfy.
func TestPolicyThatCannotBe(t *testing.T) {
	t.Parallel()
	k := testkit.NewKey(t).Public(t)
	farm := []trust.Role{{Name: "farm", Keys: []trust.RoleKey{{Key: k}}}}
	prov, fits := trust.Rule{Statement: trust.PredicateProvenance, Role: "farm",
		Count: 1}, trust.Rule{Statement: trust.PredicateKernelMatch, Role: "farm", Count: 1}
	for name, p := range map[string]trust.Policy{
		"no rule for the kernel match": {Roles: farm, Rules: []trust.Rule{prov}},
		"no rule for the provenance":   {Roles: farm, Rules: []trust.Rule{fits}},
		"no rule at all":               {Roles: farm},
		"more than there are": {Roles: farm,
			Rules: []trust.Rule{{Statement: trust.PredicateProvenance, Role: "farm", Count: 2}, fits}},
		"none": {Roles: farm,
			Rules: []trust.Rule{{Statement: trust.PredicateProvenance, Role: "farm"}, fits}},
		"a role that is not there": {Roles: farm,
			Rules: []trust.Rule{prov, fits, {Statement: trust.PredicateReproduced, Role: "x", Count: 1}}},
		"keys beside roles":      {Roles: farm, Rules: []trust.Rule{prov, fits}, Keys: []trust.PublicKey{k}},
		"a digest that is none":  {Roles: farm, Rules: []trust.Rule{prov, fits}, Revoked: []string{"sha256:1"}},
		"a version that is none": {Roles: farm, Rules: []trust.Rule{prov, fits}, MinVersions: []string{"new"}},
		"a key in two roles": {Roles: []trust.Role{farm[0], {Name: "other", Keys: farm[0].Keys}},
			Rules: []trust.Rule{prov, fits}},
		"a key twice in one": {Roles: []trust.Role{{Name: "farm", Keys: []trust.RoleKey{{Key: k}, {Key: k}}}},
			Rules: []trust.Rule{prov, fits}},
		"an edition for a minimum": {Roles: farm, Rules: []trust.Rule{prov, fits}, MinVersions: []string{"535.1.1-grid"}},
		"roles without keys":       {Roles: []trust.Role{{Name: "farm"}}, Rules: []trust.Rule{prov, fits}},
	} {
		if _, err := trust.NewVerifier(p); !fault.Is(err, fault.Usage) {
			t.Errorf("%s: NewVerifier = %v; want kind usage", name, err)
		}
	}
}
