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

// A verdict is recalled for nothing but what was in the machine.
func TestKeyOfVerdict(t *testing.T) {
	t.Parallel()
	key := func(change func(r *run)) string {
		r := &run{kernel: &cossrc.Inputs{Fingerprint: "f"}, boot: boot{key: "b"}, release: &nvsrc.Release{SourceDigest: "s", Digest: "d"}}
		r.res.Driver.Flavour = target.Open
		change(r)
		return r.testKey()
	}
	met := map[string]string{key(func(*run) {}): "nothing"}
	for what, change := range map[string]func(r *run){
		"fingerprint":            func(r *run) { r.kernel.Fingerprint = "x" },
		"boot image":             func(r *run) { r.boot.key = "x" },
		"module sources":         func(r *run) { r.release.SourceDigest = "x" },
		"user space or firmware": func(r *run) { r.release.Digest = "x" },
		"flavour":                func(r *run) { r.res.Driver.Flavour = target.Proprietary },
		"host tools":             func(r *run) { r.host = "x" },
		"BTF":                    func(r *run) { r.pahole = "x" },
	} {
		k := key(change)
		if other, ok := met[k]; ok {
			t.Errorf("with another %s the key is that with another %s", what, other)
		}
		met[k] = what
	}
}

// A verdict without NVML's answer holds for as long as nobody can ask.
func TestVerdictWithoutNVML(t *testing.T) {
	t.Parallel()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	probe := filepath.Join(t.TempDir(), "nvmlprobe")
	r := &run{products: cache, cfg: Config{NVMLProbe: probe}, kernel: &cossrc.Inputs{Kernel: target.Kernel{Arch: target.ARM64}}}
	for key, v := range map[string]loadtest.Verdict{"not asked": {State: "loaded", NotAsked: "this builder has no nvmlprobe-arm64"}, "asked": {State: "loaded", NVMLVersion: "1"}} {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := cache.Remember("loadtest", key, raw); err != nil {
			t.Fatal(err)
		}
		if r.recalled(key) == nil {
			t.Errorf("%s: no verdict before there is a probe", key)
		}
	}
	if err := os.WriteFile(probe+"-arm64", nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if r.recalled("asked") == nil || r.recalled("not asked") != nil {
		t.Errorf("with a probe the verdicts are %v and %v; want only the one that has asked", r.recalled("asked"), r.recalled("not asked"))
	}
}
