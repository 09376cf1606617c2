package cossrc_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
)

// TestBTF checks that with WithBTF the fingerprint covers the kernel's BTF, but no other part of vmlinux.
func TestBTF(t *testing.T) {
	t.Parallel()
	const b = "cos-tools/17800.0.9/lakitu/"
	root := t.TempDir()
	url := "file://" + root + "/cos-tools"
	fetch := func(options ...cossrc.Option) (*cossrc.Inputs, error) { return fetchFrom(t, url, "lakitu", options...) }
	put(t, root, layouts(t)[0].objects)
	if in, err := fetch(cossrc.WithBTF()); err != nil || in.Fingerprint != golden || in.BTF != "" {
		t.Errorf("Fetch = %+v, %v; want no BTF and the usual fingerprint: the kernel has no BTF for modules", in, err)
	}

	files := headerFiles()
	files[tree+".config"] += "CONFIG_DEBUG_INFO_BTF=y\nCONFIG_DEBUG_INFO_BTF_MODULES=y\n"
	put(t, root, map[string][]byte{b + "kernel-headers.tgz": release(t, files, toolchainFiles(), day,
		0)["kernel-headers.tgz"]})
	_, err := fetch(cossrc.WithBTF())
	if !fault.Is(err, fault.InputMissing) || !strings.Contains(err.Error(), url+"/17800.0.9/lakitu/vmlinux") ||
		fault.Hint(err) == "" {
		t.Errorf("Fetch without a vmlinux = %v; want input-missing that names vmlinux, with a hint", err)
	}
	types := btfsample.Kernel("int", "task_struct")
	vmlinux := func(sections ...string) { put(t, root, map[string][]byte{b + "vmlinux": btfsample.ELF(sections...)}) }
	vmlinux(".text", "first", ".BTF", string(types))
	plain, err := fetch()
	if err != nil || plain.BTF != "" {
		t.Fatalf("Fetch = %+v, %v; want no BTF without WithBTF", plain, err)
	}
	first, err := fetch(cossrc.WithBTF())
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(first.BTF); err != nil || !bytes.Equal(data, types) ||
		len(first.Materials) != len(plain.Materials)+1 || first.Fingerprint == plain.Fingerprint {
		t.Errorf("types = %q, %v, of %+v; want vmlinux's types, one more material, and another fingerprint", data, err,
			first)
	}
	vmlinux(".text", "second", ".BTF", string(types))
	if again, err := fetch(cossrc.WithBTF()); err != nil || again.Fingerprint != first.Fingerprint ||
		again.BTFDigest != first.BTFDigest {
		t.Errorf("another compilation of the same kernel = %+v, %v; want the same fingerprint as %+v", again, err, first)
	}
	vmlinux(".text", "first", ".BTF", string(btfsample.Kernel("int", "task_group")))
	if other, err := fetch(cossrc.WithBTF()); err != nil || other.Fingerprint == first.Fingerprint {
		t.Errorf("other types = %+v, %v; want another fingerprint", other, err)
	}
	for _, bad := range [][]string{{".text", "no types"}, {".BTF", "no types either"}} {
		vmlinux(bad...)
		if _, err := fetch(cossrc.WithBTF()); !fault.Is(err, fault.Unsupported) || fault.Hint(err) == "" {
			t.Errorf("vmlinux %q = %v; want unsupported, with a hint", bad, err)
		}
	}
}
