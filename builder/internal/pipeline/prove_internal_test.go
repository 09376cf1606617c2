package pipeline

import (
	"testing"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/pkg/target"
)

// A verdict is recalled for nothing but what was in the machine.
func TestKeyOfVerdict(t *testing.T) {
	t.Parallel()
	key := func(change func(r *run)) string {
		r := &run{kernel: &cossrc.Inputs{Fingerprint: "f", BootDigest: "b"}, release: &nvsrc.Release{SourceDigest: "s", Digest: "d"}}
		r.res.Driver.Flavour = target.Open
		change(r)
		return r.testKey()
	}
	met := map[string]string{key(func(*run) {}): "nothing"}
	for what, change := range map[string]func(r *run){
		"fingerprint":            func(r *run) { r.kernel.Fingerprint = "x" },
		"boot image":             func(r *run) { r.kernel.BootDigest = "x" },
		"module sources":         func(r *run) { r.release.SourceDigest = "x" },
		"user space or firmware": func(r *run) { r.release.Digest = "x" },
		"flavour":                func(r *run) { r.res.Driver.Flavour = target.Proprietary },
		"BTF":                    func(r *run) { r.pahole = "x" },
	} {
		k := key(change)
		if other, ok := met[k]; ok {
			t.Errorf("with another %s the key is that with another %s", what, other)
		}
		met[k] = what
	}
}
