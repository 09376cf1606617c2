package sign_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

func testFacts(s testkit.Sample) sign.TestFacts {
	return sign.TestFacts{
		Driver: s.Identity.Driver, Static: []string{"vermagic", "symbols"},
		LoadTest: trust.LoadTest{
			Verdict: trust.VerdictLoaded, Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint, Release: s.Kernel.Release,
			NVMLVersion: "535.261.03",
			Modules:     []trust.ModuleResult{{Name: "nvidia", Result: "loaded"}, {Name: "nvidia-uvm", Result: "loaded"}},
			KernelLog:   "[    1.0] nvidia: loading\n",
		},
		Configuration: []sign.Material{{Name: "boot.tar", URI: "gs://x/boot.tar",
			Digest: "sha256:" + strings.Repeat("9", 64)}, {Name: "vmlinux", URI: "gs://x/vmlinux",
			Digest: "sha256:" + strings.Repeat("8", 64), BuildID: "c0ffee"}},
		URL: "https://example.com/builds/42",
	}
}

// predicateOf returns the predicate of a statement.
func predicateOf(t *testing.T, st sign.Statement) map[string]any {
	t.Helper()
	var body struct{ Predicate map[string]any }
	if err := json.Unmarshal(st.JSON(), &body); err != nil {
		t.Fatal(err)
	}
	return body.Predicate
}

func TestTestResult(t *testing.T) {
	t.Parallel()
	s := sample(t)
	signer, v := keyFile(t)
	rows := []struct {
		name                   string
		change                 func(f *sign.TestFacts)
		result                 string
		passed, warned, failed []any
	}{
		{"loaded", func(*sign.TestFacts) {}, "PASSED",
			[]any{"vermagic", "symbols", "load nvidia", "load nvidia-uvm", "loaded"}, nil, nil},
		{"loaded, and skipped", func(f *sign.TestFacts) {
			f.LoadTest.Modules[1] = trust.ModuleResult{Name: "nvidia-drm", Result: "skipped", Note: "needs drm"}
		}, "WARNED", []any{"vermagic", "symbols", "load nvidia", "loaded"}, []any{"load nvidia-drm: skipped: needs drm"},
			nil},
		{"loaded, and warned", func(f *sign.TestFacts) { f.Warnings = []string{"UBSAN: shift\nmore"} },
			"WARNED", []any{"vermagic", "symbols", "load nvidia", "load nvidia-uvm", "loaded"},
			[]any{"kernel log: UBSAN: shift"}, nil},
		{"no device", func(f *sign.TestFacts) {
			f.LoadTest.Verdict, f.LoadTest.Reason, f.LoadTest.Modules = trust.VerdictNoDevice, "NVRM: No NVIDIA GPU found.", nil
		}, "WARNED", []any{"vermagic", "symbols"}, []any{"loaded, no device: NVRM: No NVIDIA GPU found."}, nil},
		{"static", func(f *sign.TestFacts) {
			f.LoadTest = trust.LoadTest{Verdict: trust.VerdictStatic, Reason: "no bootable kernel", Kernel: s.Kernel,
				Fingerprint: s.Identity.Fingerprint}
		}, "WARNED", []any{"vermagic", "symbols"}, []any{"static checks only: no bootable kernel"}, nil},
		{"rejected", func(f *sign.TestFacts) {
			f.LoadTest.Verdict, f.LoadTest.Reason = trust.VerdictRejected, "load nvidia-uvm: ENOENT"
			f.LoadTest.Modules[1] = trust.ModuleResult{Name: "nvidia-uvm", Result: "rejected", Note: "Unknown symbol x"}
		}, "FAILED", []any{"vermagic", "symbols", "load nvidia"}, nil,
			[]any{"load nvidia-uvm: Unknown symbol x", "rejected: load nvidia-uvm: ENOENT"}},
	}
	for _, row := range rows {
		f := testFacts(s)
		row.change(&f)
		st, err := sign.TestResult(s.Digest, f)
		if err != nil {
			t.Fatalf("%s: TestResult = %v", row.name, err)
		}
		p := predicateOf(t, st)
		list := func(name string) []any { l, _ := p[name].([]any); return l }
		got := []any{p["result"], list("passedTests"), list("warnedTests"), list("failedTests")}
		if diff := cmp.Diff([]any{row.result, row.passed, row.warned, row.failed}, got); diff != "" {
			t.Errorf("%s: TestResult (-want +got):\n%s", row.name, diff)
		}
		raw, err := sign.Bundle(t.Context(), signer, st)
		if err != nil {
			t.Fatal(err)
		}
		read := v.Statements([][]byte{raw}, s.Digest, trust.PredicateTestResult)
		if len(read) != 1 {
			t.Fatalf("%s: Statements = %d; want the test result", row.name, len(read))
		}
		r, err := trust.ParseTestResult(read[0])
		if diff := cmp.Diff(f.LoadTest, r.LoadTest); err != nil || diff != "" {
			t.Errorf("%s: ParseTestResult = %v (-want +got):\n%s", row.name, err, diff)
		}
	}
	st, err := sign.TestResult(s.Digest, testFacts(s))
	if err != nil {
		t.Fatal(err)
	}
	config := predicateOf(t, st)["configuration"].([]any)
	boot := config[1].(map[string]any)
	if len(config) != 3 || boot["name"] != "boot.tar" ||
		boot["digest"].(map[string]any)["sha256"] != strings.Repeat("9", 64) || boot["annotations"] != nil {
		t.Errorf("configuration = %v; want kernel and boot image by digest", config)
	}
	if linked, _ := config[2].(map[string]any)["annotations"].(map[string]any); linked["gnuBuildID"] != "c0ffee" {
		t.Errorf("vmlinux in the configuration = %v; want its build id", config[2])
	}
}

func TestTestResultIsBounded(t *testing.T) {
	t.Parallel()
	s := sample(t)
	f := testFacts(s)
	f.LoadTest.KernelLog = strings.Repeat("a line \xff of the kernel\n", 1<<16)
	f.LoadTest.Reason = strings.Repeat("r", 1<<16)
	for range 1000 {
		f.Warnings = append(f.Warnings, strings.Repeat("w", 1<<12))
	}
	st, err := sign.TestResult(s.Digest, f)
	if err != nil || len(st.JSON()) > 128<<10 {
		t.Errorf("TestResult with a long kernel log = %d bytes, %v; want at most 128 KiB", len(st.JSON()), err)
	}
}

func TestTestResultRefuses(t *testing.T) {
	t.Parallel()
	s := sample(t)
	for name, change := range map[string]func(f *sign.TestFacts){
		"no verdict":               func(f *sign.TestFacts) { f.LoadTest.Verdict = "" },
		"unknown verdict":          func(f *sign.TestFacts) { f.LoadTest.Verdict = "fine" },
		"unknown module result":    func(f *sign.TestFacts) { f.LoadTest.Modules[0].Result = "ok" },
		"loaded, but one rejected": func(f *sign.TestFacts) { f.LoadTest.Modules[0].Result = "rejected" },
		"no fingerprint":           func(f *sign.TestFacts) { f.LoadTest.Fingerprint = "" },
		"image without a digest":   func(f *sign.TestFacts) { f.Configuration[0].Digest = "" },
	} {
		f := testFacts(s)
		change(&f)
		if st, err := sign.TestResult(s.Digest, f); err == nil {
			t.Errorf("%s: TestResult = %s; want an error", name, st.JSON())
		}
	}
	for _, doc := range []string{"", "[]", `{"spdxVersion":"SPDX-3.0"}`, `{"bomFormat":"CycloneDX"}`} {
		if st, err := sign.SBOM(s.Digest, s.Identity.Driver, []byte(doc)); err == nil {
			t.Errorf("SBOM(%q) = %s; want an error", doc, st.JSON())
		}
	}
}
