package pipeline

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"slices"

	"github.com/prebake/prebake/builder/internal/gate"
	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/trust"
)

// staticChecks names what was proved before the load test, for the signed test
// result.
func (r *run) staticChecks() []string {
	origin := "stamp of the kernel's fingerprint"
	if r.carries().byGoogle() {
		origin = "Google's signature of every module, for this COS build and over these bytes"
	}
	all := []string{
		"module names, driver version and processor", "size of struct module, where the kernel shows its own", "vermagic", origin, "build salt",
		"order of dependencies", "every imported symbol is exported by the kernel or a module of the set", "symbol checksums, where the kernel has them",
	}
	if r.kernel.BTF != "" {
		all = append(all, "BTF of every module goes on where the kernel's ends")
	}
	return all
}

// intact tells whether the modules still are what the compiler left, and these
// folders of the cache what was put into them.
func (r *run) intact(ctx context.Context, folders ...string) error {
	for _, name := range slices.Sorted(maps.Keys(r.modules)) {
		sum, err := hostfile.Sum(r.modules[name])
		if err != nil {
			return err
		}
		if sum != r.sums[name] {
			return changed(name, r.products.Dir())
		}
	}
	for _, dir := range folders {
		if err := r.products.Recheck(ctx, dir); err != nil {
			return err
		}
	}
	return nil
}

// check holds every module against the kernel that it was made for.
func (r *run) check(ctx context.Context) (string, error) {
	if err := r.intact(ctx); err != nil {
		return "", err
	}
	kernel := gate.Kernel{
		Headers: r.kernel.Headers, Boot: r.kernel.Boot, Release: r.kernel.Kernel.Release, Arch: r.kernel.Kernel.Arch,
		Fingerprint: r.kernel.Fingerprint, Version: r.res.Driver.Modules().Version, BTF: r.kernel.BTF,
	}
	if r.carries().byGoogle() {
		kernel.Fingerprint = "" // Google's signature is over the module without our stamp
	}
	vermagic, err := gate.Check(r.modules, kernel)
	if err != nil {
		return "", err
	}
	r.id = bundle.Identity{
		Fingerprint: r.kernel.Fingerprint, Arch: r.kernel.Kernel.Arch, Release: r.kernel.Kernel.Release,
		Vermagic: vermagic, Driver: r.res.Driver,
	}
	return vermagic, nil
}

// testKey names the verdict about these modules on this boot image, with the
// user space and firmware of this very runfile.
func (r *run) testKey() string {
	return r.moduleKey(loadtest.Recipe, r.boot.key, nvsrc.StageRecipe, r.release.Digest)
}

// loadTest boots the kernel and loads the modules in it.
func (r *run) loadTest(ctx context.Context) (string, error) {
	if r.cfg.LoadTest == LoadTestOff {
		return "off: static checks only", nil
	}
	why, err := r.findBoot(ctx)
	switch {
	case err != nil:
		return "", err
	case why != "" && r.cfg.LoadTest == LoadTestRequire:
		return "", fault.New(fault.LoadTestFailed, "no bootable kernel at hand: "+why, "put the build's vmlinux into the bucket, or publish without it: --load-test auto")
	case why != "":
		r.untested = why
		return "static checks only: " + why, nil
	}
	user, err := r.staged(ctx, bundle.LayerUserspace)
	if err != nil {
		return "", err
	}
	firmware, err := r.staged(ctx, bundle.LayerFirmware)
	if err != nil {
		return "", err
	}
	key := r.testKey()
	if verdict := r.recalled(key); verdict != nil {
		r.res.LoadTest = verdict
		return verdict.State + ", cached verdict", nil
	}
	// A kernel that was damaged since it was unpacked may hang until the time is up.
	if err := r.intact(ctx, r.boot.dir); err != nil {
		return "", err
	}
	verdict, err := loadtest.Run(ctx, loadtest.Config{
		Boot: r.boot.dir, Modules: r.modules, Userspace: user, Firmware: firmware,
		Version: r.res.Driver.Modules().Version, Init: r.cfg.GuestInit, Probe: r.cfg.NVMLProbe,
	}, r.log)
	// What changed under the machine explains every refusal, and makes every
	// success worthless.
	if err := r.intact(ctx, r.boot.dir, user, firmware); err != nil {
		return "", err
	}
	if errors.Is(err, loadtest.ErrLacking) && r.cfg.LoadTest != LoadTestRequire {
		r.untested = err.Error()
		return "static checks only: " + r.untested, nil
	}
	r.res.LoadTest = verdict
	if err != nil {
		return "", err
	}
	raw, err := json.Marshal(verdict)
	if err != nil {
		return "", err
	}
	return verdict.State, r.products.Remember("loadtest", key, raw)
}

// recalled returns the kept verdict about these modules; nil where there is none,
// and where a test made now would ask more than that one did.
func (r *run) recalled(key string) *loadtest.Verdict {
	raw, ok := r.products.Recall("loadtest", key)
	verdict := &loadtest.Verdict{}
	if !ok || json.Unmarshal(raw, verdict) != nil {
		return nil
	}
	if verdict.NotAsked != "" {
		if _, err := os.Stat(loadtest.Helper(r.cfg.NVMLProbe, r.kernel.Kernel.Arch)); err == nil {
			return nil
		}
	}
	return verdict
}

// testFacts is the proof in the words of the signed test result.
func (r *run) testFacts() sign.TestFacts {
	f := sign.TestFacts{Driver: r.res.Driver, Static: r.staticChecks(), LoadTest: trust.LoadTest{
		Verdict: trust.VerdictStatic, Kernel: r.kernel.Kernel, Fingerprint: r.kernel.Fingerprint,
	}}
	v := r.res.LoadTest
	if v == nil {
		f.LoadTest.Reason = r.untested
		return f
	}
	f.Warnings = v.Warnings
	f.Configuration = r.boot.from
	t := &f.LoadTest
	t.Verdict, t.Reason, t.Release, t.NVMLVersion, t.KernelLog = v.State, v.Reason, v.Release, v.NVMLVersion, v.KernelLog
	for _, m := range v.Modules {
		result := map[string]string{loadtest.OK: "loaded", loadtest.Refused: "rejected"}[m.Load]
		if result == "" {
			result = "skipped"
		}
		t.Modules = append(t.Modules, trust.ModuleResult{Name: m.Name, Result: result, Note: m.Note})
	}
	return f
}
