package pipeline

import (
	"context"
	"encoding/json"
	"errors"
	"os"

	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// testOutcome is the outcome of the load test phase.
type testOutcome struct {
	verdict *loadtest.Verdict // nil if no load test ran
	reason  string            // why no load test ran; "" if a load test ran, or if its mode is LoadTestOff
	boot    boot
}

// testKey returns the cache key of a load test's verdict. It covers the modules, the boot folder and the runfile.
func testKey(in *inputs, m *modules, b boot) string {
	return m.key(in, loadtest.Recipe, b.key, nvsrc.StageRecipe, in.release.Digest)
}

// loadTest boots the kernel and loads the modules in it.
func (r *run) loadTest(ctx context.Context, in *inputs, m *modules) (t testOutcome, note string, err error) {
	if r.cfg.LoadTest == LoadTestOff {
		return t, "off: static checks only", nil
	}
	b, why, err := r.findBoot(ctx, in)
	switch {
	case err != nil:
		return t, "", err
	case why != "" && r.cfg.LoadTest == LoadTestRequire:
		return t, "", fault.New(fault.LoadTestFailed, "no bootable kernel: "+why,
			"put the vmlinux of the COS build into the bucket, or publish without a load test: --load-test auto")
	case why != "":
		return testOutcome{reason: why}, "static checks only: " + why, nil
	}
	t.boot = b
	user, err := r.stagedFolder(ctx, in, bundle.LayerUserspace)
	if err != nil {
		return t, "", err
	}
	firmware, err := r.stagedFolder(ctx, in, bundle.LayerFirmware)
	if err != nil {
		return t, "", err
	}
	key := testKey(in, m, b)
	if verdict := r.cachedVerdict(in, key); verdict != nil {
		t.verdict, r.res.LoadTest = verdict, verdict
		return t, verdict.State + ", cached verdict", nil
	}
	// If the kernel image was damaged in the cache, the virtual machine may hang until the time limit. So check first.
	if err := r.checkIntact(ctx, m, b.dir); err != nil {
		return t, "", err
	}
	verdict, err := loadtest.Run(ctx, loadtest.Config{
		Boot: b.dir, Modules: m.files, Userspace: user, Firmware: firmware,
		Version: in.driver.Modules().Version, Init: r.cfg.GuestInit, Probe: r.cfg.NVMLProbe,
	}, r.log)
	// Check the inputs before the error: a change during the load test explains any failure, and makes a success
	// worthless.
	if err := r.checkIntact(ctx, m, b.dir, user, firmware); err != nil {
		return t, "", err
	}
	if errors.Is(err, loadtest.ErrLacking) && r.cfg.LoadTest != LoadTestRequire {
		return testOutcome{reason: err.Error()}, "static checks only: " + err.Error(), nil
	}
	t.verdict, r.res.LoadTest = verdict, verdict
	if err != nil {
		return t, "", err
	}
	raw, err := json.Marshal(verdict)
	if err != nil {
		return t, "", err
	}
	return t, verdict.State, r.cfg.Cache.PutFact("loadtest", key, raw)
}

// cachedVerdict returns the stored verdict about these modules, or nil. It also returns nil if the stored test did not
// ask NVML, and this machine now has the program nvmlprobe.
func (r *run) cachedVerdict(in *inputs, key string) *loadtest.Verdict {
	raw, ok := r.cfg.Cache.Fact("loadtest", key)
	verdict := &loadtest.Verdict{}
	if !ok || json.Unmarshal(raw, verdict) != nil {
		return nil
	}
	if verdict.NotAsked != "" {
		if _, err := os.Stat(loadtest.Helper(r.cfg.NVMLProbe, in.kernel.Kernel.Arch)); err == nil {
			return nil
		}
	}
	return verdict
}

// testFacts returns the results of the checks and of the load test for the signed test result.
func testFacts(in *inputs, m *modules, t testOutcome) sign.TestFacts {
	f := sign.TestFacts{Driver: in.driver, Static: staticChecks(in, m), LoadTest: trust.LoadTest{
		Verdict: trust.VerdictStatic, Kernel: in.kernel.Kernel, Fingerprint: in.kernel.Fingerprint,
	}}
	v := t.verdict
	if v == nil {
		f.LoadTest.Reason = t.reason
		return f
	}
	f.Warnings = v.Warnings
	f.Configuration = t.boot.materials
	l := &f.LoadTest
	l.Verdict, l.Reason, l.Release, l.NVMLVersion, l.KernelLog = v.State, v.Reason, v.Release, v.NVMLVersion, v.KernelLog
	for _, m := range v.Modules {
		result := map[string]string{loadtest.OK: "loaded", loadtest.Refused: "rejected"}[m.Load]
		if result == "" {
			result = "skipped"
		}
		l.Modules = append(l.Modules, trust.ModuleResult{Name: m.Name, Result: result, Note: m.Note})
	}
	return f
}
