package pipeline

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/target"
)

// TestKeyOfVerdict checks that the key of a stored verdict changes if any input of the load test changes.
func TestKeyOfVerdict(t *testing.T) {
	t.Parallel()
	key := func(change func(in *inputs, m *modules, b *boot)) string {
		in := &inputs{kernel: &cossrc.Inputs{Fingerprint: "f"}, release: &nvsrc.Release{SourceDigest: "s", Digest: "d"}}
		in.driver.Flavour = target.Open
		m, b := &modules{}, boot{key: "b"}
		change(in, m, &b)
		return testKey(in, m, b)
	}
	met := map[string]string{key(func(*inputs, *modules, *boot) {}): "nothing"}
	for what, change := range map[string]func(in *inputs, m *modules, b *boot){
		"fingerprint":            func(in *inputs, _ *modules, _ *boot) { in.kernel.Fingerprint = "x" },
		"boot image":             func(_ *inputs, _ *modules, b *boot) { b.key = "x" },
		"module sources":         func(in *inputs, _ *modules, _ *boot) { in.release.SourceDigest = "x" },
		"user space or firmware": func(in *inputs, _ *modules, _ *boot) { in.release.Digest = "x" },
		"flavour":                func(in *inputs, _ *modules, _ *boot) { in.driver.Flavour = target.Proprietary },
		"host tools":             func(in *inputs, _ *modules, _ *boot) { in.host = "x" },
		"BTF":                    func(in *inputs, _ *modules, _ *boot) { in.pahole = "x" },
		"modules":                func(_ *inputs, m *modules, _ *boot) { m.sums = map[string]string{"nvidia": "x"} },
		"signatures":             func(_ *inputs, m *modules, _ *boot) { m.signedBy = []string{"x"} },
	} {
		k := key(change)
		if other, ok := met[k]; ok {
			t.Errorf("a change of %s gives the same key as a change of %s", what, other)
		}
		met[k] = what
	}
}

// TestVerdictWithoutNVML stores a verdict of a load test that could not ask NVML, because the builder had no probe
// program. The verdict must be reused only as long as the builder has no probe program.
func TestVerdictWithoutNVML(t *testing.T) {
	t.Parallel()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	probe := filepath.Join(t.TempDir(), "nvmlprobe")
	r := &run{cfg: Config{NVMLProbe: probe, Cache: cache}}
	in := &inputs{kernel: &cossrc.Inputs{Kernel: target.Kernel{Arch: target.ARM64}}}
	for key, v := range map[string]loadtest.Verdict{"not asked": {State: "loaded",
		NotAsked: "this builder has no nvmlprobe-arm64"}, "asked": {State: "loaded", NVMLVersion: "1"}} {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := cache.PutFact("loadtest", key, raw); err != nil {
			t.Fatal(err)
		}
		if r.cachedVerdict(in, key) == nil {
			t.Errorf("%s: no verdict before there is a probe", key)
		}
	}
	if err := os.WriteFile(probe+"-arm64", nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if r.cachedVerdict(in, "asked") == nil || r.cachedVerdict(in, "not asked") != nil {
		t.Errorf("with a probe the verdicts are %v and %v; want only the first, whose test asked NVML",
			r.cachedVerdict(in, "asked"), r.cachedVerdict(in, "not asked"))
	}
}
