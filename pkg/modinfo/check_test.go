package modinfo_test

import (
	"debug/elf"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	const release, vermagic = "6.1.0-50-cloud-amd64", "6.1.0-50-cloud-amd64 SMP preempt mod_unload modversions "
	rows := []struct {
		name string
		edit func(a, b *sample, r *modinfo.Rules)
		want string // "" means no error
	}{
		{"fits", func(a, b *sample, r *modinfo.Rules) {}, ""},
		{"another release", func(a, b *sample, r *modinfo.Rules) { r.Release = "6.1.0-47-cloud-amd64" },
			"nvidia: made for kernel release 6.1.0-50-cloud-amd64; this kernel has release 6.1.0-47-cloud-amd64"},
		{"same release, other options", func(a, b *sample, r *modinfo.Rules) { r.Vermagic = release + " SMP mod_unload" },
			"this kernel wants \"6.1.0-50-cloud-amd64 SMP mod_unload\""},
		{"checksum differs", func(a, b *sample, r *modinfo.Rules) { a.versions["vmalloc"] = 0x99 },
			"nvidia: symbol vmalloc: checksum 0x00000099 differs from this kernel's 0x00000002"},
		{"checksum differs, not compared",
			func(a, b *sample, r *modinfo.Rules) { a.versions["vmalloc"], r.ModVersions = 0x99, false }, ""},
		{"module_layout differs", func(a, b *sample, r *modinfo.Rules) { a.versions["module_layout"] = 0x99 },
			"nvidia: symbol module_layout: checksum"},
		{"checksum missing", func(a, b *sample, r *modinfo.Rules) { delete(a.versions, "vmalloc") },
			"nvidia: symbol vmalloc: has no checksum"},
		{"symbol missing", func(a, b *sample, r *modinfo.Rules) { a.imports = append(a.imports, "gone") },
			"nvidia: symbol gone: is exported neither by this kernel nor by one of these modules"},
		{"weak symbol missing", func(a, b *sample, r *modinfo.Rules) { a.weak = append(a.weak, "gone") }, ""},
		{"name of the assembler",
			func(a, b *sample, r *modinfo.Rules) { a.imports = append(a.imports, "_GLOBAL_OFFSET_TABLE_") }, ""},
		{"sibling's checksum differs", func(a, b *sample, r *modinfo.Rules) { a.exports["nvidia_get_rm_ops"] = 0xdef },
			"nvidia_uvm: symbol nvidia_get_rm_ops: checksum 0x00000abc differs from nvidia's 0x00000def"},
		{"sibling not depended on", func(a, b *sample, r *modinfo.Rules) { b.info[1] = "depends=" },
			"nvidia_uvm: symbol nvidia_get_rm_ops: is exported by module nvidia, on which this module does not depend"},
		{"dependency missing", func(a, b *sample, r *modinfo.Rules) { b.info[1] = "depends=nvidia,video" },
			"nvidia_uvm: needs module video"},
		{"dependency of the kernel", func(a, b *sample, r *modinfo.Rules) { b.info[1] = "depends=nvidia,drm" }, ""},
		{"kernel's module not depended on", func(a, b *sample, r *modinfo.Rules) {
			b.imports, b.versions["drm_open"] = append(b.imports, "drm_open"), 5
		}, "nvidia_uvm: symbol drm_open: is exported by the kernel's module drm, on which"},
		{"GPL symbol", func(a, b *sample, r *modinfo.Rules) {
			a.imports, a.versions["mmu_gpl"] = append(a.imports, "mmu_gpl"), 4
		}, "nvidia: symbol mmu_gpl: is for GPL modules only; the licence of this module is \"NVIDIA\""},
		{"namespace not imported", func(a, b *sample, r *modinfo.Rules) {
			b.imports, b.versions["dma_buf_get"] = append(b.imports, "dma_buf_get"), 6
		}, "is in namespace DMA_BUF"},
		{"namespace imported", func(a, b *sample, r *modinfo.Rules) {
			b.imports, b.versions["dma_buf_get"] = append(b.imports, "dma_buf_get"), 6
			b.info = append(b.info, "import_ns=DMA_BUF")
		}, ""},
		{"same name twice", func(a, b *sample, r *modinfo.Rules) { b.info[2] = "name=nvidia" },
			"nvidia: is given twice"},
		{"circle", func(a, b *sample, r *modinfo.Rules) { a.info[2] = "depends=nvidia_uvm" },
			"nvidia: depends on itself through nvidia, nvidia_uvm"},
		{"exported twice", func(a, b *sample, r *modinfo.Rules) { b.exports = maps.Clone(a.exports) },
			"symbol nvidia_get_rm_ops: is also exported by module nvidia_uvm"},
		{"another processor", func(a, b *sample, r *modinfo.Rules) { r.Machine = elf.EM_AARCH64 },
			"nvidia: made for processor EM_X86_64; this kernel is for processor EM_AARCH64"},
		{"another salt", func(a, b *sample, r *modinfo.Rules) { salt := "6.1.0-50"; r.Salt = &salt },
			"made for a kernel with build salt \"\"; this kernel has build salt \"6.1.0-50\""},
		{"another struct module", func(a, b *sample, r *modinfo.Rules) { a.this, r.StructSize = "nvidia", 0x340 },
			"nvidia: struct module has 896 bytes in this module, and 832 bytes in this kernel"},
		{"not stamped", func(a, b *sample, r *modinfo.Rules) { r.MadeFor = "sha256:ab" },
			"nvidia: has no ABI fingerprint in section .note.prebake; this kernel has ABI fingerprint sha256:ab"},
		{"stamped with a sibling", func(a, b *sample, r *modinfo.Rules) {
			r.MadeFor, a.stamp = "sha256:ab", string(modinfo.AppendNote(nil, modinfo.StampOwner, modinfo.StampType,
				[]byte("sha256:cd")))
		}, "nvidia: made for ABI fingerprint sha256:cd; this kernel has ABI fingerprint sha256:ab"},
		{"many problems", func(a, b *sample, r *modinfo.Rules) {
			for c := 'a'; c <= 'z'; c++ {
				a.imports = append(a.imports, "gone_"+string(c))
			}
		}, "nvidia: 18 more problems"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			symvers, err := modinfo.ReadSymvers(strings.NewReader(symversText))
			if err != nil {
				t.Fatal(err)
			}
			a, b := goodModule(), sibling()
			rules := modinfo.Rules{Release: release, Vermagic: vermagic, Symvers: symvers, ModVersions: symvers.HasCRCs()}
			row.edit(&a, &b, &rules)
			err = modinfo.Check([]*modinfo.Module{read(t, b.bytes()), read(t, a.bytes())}, rules)
			if row.want == "" {
				if err != nil {
					t.Errorf("Check = %v; want nil", err)
				}
				return
			}
			if !fault.Is(err, fault.CheckFailed) || !strings.Contains(err.Error(), row.want) || fault.Hint(err) == "" {
				t.Errorf("Check = %v (%v, hint %q); want %q", err, fault.Of(err), fault.Hint(err), row.want)
			}
			if p := (*modinfo.Problem)(nil); !errors.As(err, &p) || p.Module == "" {
				t.Errorf("Check = %v; want a Problem inside", err)
			}
		})
	}
	if err := modinfo.Check(nil, modinfo.Rules{}); !fault.Is(err, fault.CheckFailed) {
		t.Errorf("Check of nothing = %v; want check-failed", err)
	}
}

func TestOrder(t *testing.T) {
	t.Parallel()
	mods := []*modinfo.Module{
		{Name: "nvidia_uvm", Depends: []string{"nvidia"}},
		{Name: "nvidia_drm", Depends: []string{"nvidia-modeset", "drm"}},
		{Name: "nvidia_modeset", Depends: []string{"nvidia"}},
		{Name: "nvidia"},
	}
	ordered, err := modinfo.Order(mods)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range ordered {
		got = append(got, m.Name)
	}
	if diff := cmp.Diff([]string{"nvidia", "nvidia_modeset", "nvidia_drm", "nvidia_uvm"}, got); diff != "" {
		t.Errorf("Order differs (-want +got):\n%s", diff)
	}
}

// TestRealModules checks real modules against a real kernel. These environment variables configure the test:
//
//	PREBAKE_MODULES          folder with *.ko and the kernel's Module.symvers
//	PREBAKE_MODULES_RELEASE  the kernel's release; optional
//	PREBAKE_MODULES_WANT     part of the expected error; optional
func TestRealModules(t *testing.T) {
	dir := os.Getenv("PREBAKE_MODULES")
	if dir == "" {
		t.Skip("PREBAKE_MODULES is not set to a folder with *.ko and Module.symvers")
	}
	f, err := os.Open(filepath.Join(dir, "Module.symvers"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symvers, err := modinfo.ReadSymvers(f)
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	var mods []*modinfo.Module
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		m := read(t, data)
		t.Logf("%s %s: %d imports, %d exports, %d checksums, signed %t, depends %v, licence %s, %q",
			m.Name, m.Version, len(m.Imports), len(m.Exports), len(m.CRCs), m.Signed, m.Depends, m.License, m.Vermagic)
		mods = append(mods, m)
	}
	err = modinfo.Check(mods,
		modinfo.Rules{Release: os.Getenv("PREBAKE_MODULES_RELEASE"), Symvers: symvers, ModVersions: symvers.HasCRCs()})
	t.Logf("Check = %v\nhint: %s", err, fault.Hint(err))
	if want := os.Getenv("PREBAKE_MODULES_WANT"); (err == nil) != (want == "") || err != nil &&
		!strings.Contains(err.Error(), want) {
		t.Errorf("Check = %v; want %q", err, want)
	}
}
