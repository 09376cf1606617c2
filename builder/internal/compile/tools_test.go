package compile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// kit returns a request with the given .config of a kernel, and a toolchain whose programs are empty files.
func kit(t *testing.T, config string, programs ...string) Request {
	t.Helper()
	dir := t.TempDir()
	r := Request{Headers: filepath.Join(dir, "headers"), Toolchain: filepath.Join(dir, "toolchain"), Arch: target.AMD64,
		Env: map[string]string{}}
	files := map[string]string{"headers/.config": strings.ReplaceAll(config, " ", "\n") + "\n"}
	for _, p := range programs {
		if !strings.Contains(p, "/") {
			p = "bin/" + p
		}
		files["toolchain/"+p] = ""
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func prefixed(prefix string, names ...string) []string {
	var all []string
	for _, n := range names {
		all = append(all, prefix+n)
	}
	return all
}

const (
	amd64Prefix = "x86_64-cros-linux-gnu-"
	arm64Prefix = "aarch64-cros-linux-gnu-"
)

func TestFindTools(t *testing.T) {
	t.Parallel()
	llvm := []string{"llvm-ar", "llvm-nm", "llvm-objcopy", "llvm-objdump", "llvm-readelf", "llvm-strip", "ld.lld"}
	gnu := []string{"ar", "as", "ld", "ld.bfd", "nm", "objcopy", "objdump", "readelf", "strip"}
	const llvmNames = " AR=llvm-ar NM=llvm-nm OBJCOPY=llvm-objcopy OBJDUMP=llvm-objdump READELF=llvm-readelf " +
		"STRIP=llvm-strip"
	gnuNames := func(p string) string {
		return " AR=" + p + "ar NM=" + p + "nm OBJCOPY=" + p + "objcopy OBJDUMP=" + p + "objdump READELF=" + p +
			"readelf STRIP=" + p + "strip"
	}
	const clangLLD = "CONFIG_CC_IS_CLANG=y CONFIG_LD_IS_LLD=y CONFIG_AS_IS_LLVM=y"
	rows := []struct {
		name, config string
		programs     []string
		env          map[string]string
		arch         target.Arch
		want         string
	}{
		{
			name: "gcc and binutils, as Debian's kernels", config: "CONFIG_CC_IS_GCC=y CONFIG_LD_IS_BFD=y CONFIG_AS_IS_GNU=y",
			programs: append(prefixed(amd64Prefix, gnu...), amd64Prefix+"gcc"),
			want:     "CC=" + amd64Prefix + "gcc LD=" + amd64Prefix + "ld.bfd" + gnuNames(amd64Prefix),
		},
		{
			name: "clang, lld and LLVM's tools, as COS's kernels now", config: clangLLD,
			programs: append(append(prefixed(amd64Prefix, gnu...), llvm...), amd64Prefix+"clang", amd64Prefix+"ld.lld",
				"x86_64-pc-linux-gnu-clang"),
			env: map[string]string{"CC": amd64Prefix + "clang", "CXX": amd64Prefix + "clang++"},
			want: "CC=" + amd64Prefix +
				"clang LLVM=1 LLVM_IAS=1 HOSTCC=x86_64-pc-linux-gnu-clang HOSTCXX=x86_64-pc-linux-gnu-clang++" +
				" LD=" + amd64Prefix + "ld.lld" + llvmNames,
		},
		{
			name: "LLVM's tools in the other folder", config: clangLLD,
			programs: append(prefixed("usr/bin/", llvm...), amd64Prefix+"clang"),
			want:     "CC=" + amd64Prefix + "clang LLVM=1 LLVM_IAS=1 LD=ld.lld" + llvmNames,
		},
		{
			name: "arm64", config: clangLLD, arch: target.ARM64,
			programs: append(llvm, arm64Prefix+"clang", arm64Prefix+"ld.lld"),
			want:     "CC=" + arm64Prefix + "clang LLVM=1 LLVM_IAS=1 LD=" + arm64Prefix + "ld.lld" + llvmNames,
		},
		{
			name: "arm64 by gcc", config: "CONFIG_CC_IS_GCC=y CONFIG_LD_IS_BFD=y", arch: target.ARM64,
			programs: append(prefixed(arm64Prefix, gnu...), arm64Prefix+"gcc"),
			want:     "CC=" + arm64Prefix + "gcc LD=" + arm64Prefix + "ld.bfd" + gnuNames(arm64Prefix),
		},
		{
			name:     "clang with binutils, as the recipe for open modules",
			config:   "CONFIG_CC_IS_CLANG=y CONFIG_LD_IS_BFD=y CONFIG_AS_IS_LLVM=y",
			programs: append(append(prefixed(amd64Prefix, gnu...), llvm...), amd64Prefix+"clang"),
			want:     "CC=" + amd64Prefix + "clang LLVM_IAS=1 LD=" + amd64Prefix + "ld.bfd" + gnuNames(amd64Prefix),
		},
		{
			name: "clang with as", config: "CONFIG_CC_IS_CLANG=y CONFIG_LD_IS_BFD=y CONFIG_AS_IS_GNU=y",
			programs: append(prefixed(amd64Prefix, gnu...), amd64Prefix+"clang"),
			want: "CC=" + amd64Prefix + "clang LLVM_IAS=0 CROSS_COMPILE=" + amd64Prefix + " LD=" + amd64Prefix + "ld.bfd" +
				gnuNames(amd64Prefix),
		},
		{
			name: "an old kernel of clang, which does not name its assembler", config: "CONFIG_CC_IS_CLANG=y CONFIG_LD_IS_LLD=y",
			programs: append(append(prefixed(amd64Prefix, gnu...), llvm...), amd64Prefix+"clang", amd64Prefix+"ld.lld"),
			want:     "CC=" + amd64Prefix + "clang LLVM=1 LD=" + amd64Prefix + "ld.lld" + llvmNames,
		},
		{
			name: "names with a version, as Debian's", config: clangLLD,
			programs: []string{"clang-16", "ld.lld-16", "llvm-ar-16", "llvm-nm-16", "llvm-objcopy-16", "llvm-objdump-16",
				"llvm-readelf-16", "llvm-strip-16"},
			env: map[string]string{"CC": "clang-16"},
			want: "CC=clang-16 LLVM=1 LLVM_IAS=1 LD=ld.lld-16 AR=llvm-ar-16 NM=llvm-nm-16 OBJCOPY=llvm-objcopy-16 " +
				"OBJDUMP=llvm-objdump-16 READELF=llvm-readelf-16 STRIP=llvm-strip-16",
		},
		{
			name: "tools that toolchain_env names, and one that is missing", config: clangLLD,
			programs: []string{amd64Prefix + "clang", "my-ld", "llvm-strip"},
			env:      map[string]string{"LD": "my-ld", "STRIP": "strip; reboot"},
			want:     "CC=" + amd64Prefix + "clang LLVM=1 LLVM_IAS=1 LD=my-ld" + llvmNames,
		},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := kit(t, row.config, row.programs...)
			if row.arch != "" {
				r.Arch = row.arch
			}
			if row.env != nil {
				r.Env = row.env
			}
			got, err := findTools(r)
			if err != nil {
				t.Fatalf("findTools = %v", err)
			}
			if diff := cmp.Diff(strings.Fields(row.want), got.variables); diff != "" {
				t.Errorf("variables differ (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFindToolsRefuses(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name, config string
		programs     []string
		cc           string
		arch         target.Arch
		want         fault.Kind
		text         string
	}{
		{"no such compiler", "CONFIG_CC_IS_CLANG=y", []string{amd64Prefix + "gcc"}, "", target.AMD64, fault.InputMissing,
			"no bin/" + amd64Prefix + "clang"},
		{"a command line", "", nil, "gcc -B/tmp", target.AMD64, fault.Usage, "want the name of a program"},
		{"gcc for a kernel of clang", "CONFIG_CC_IS_CLANG=y", []string{amd64Prefix + "gcc"}, amd64Prefix + "gcc",
			target.AMD64, fault.Usage, "CONFIG_CC_IS_CLANG=y"},
		{"clang for a kernel of gcc", "CONFIG_CC_IS_GCC=y", []string{amd64Prefix + "clang"}, amd64Prefix + "clang",
			target.AMD64, fault.Usage, "CONFIG_CC_IS_GCC=y"},
		{"clang without a target for arm64", "CONFIG_CC_IS_CLANG=y", []string{"clang-16"}, "clang-16", target.ARM64,
			fault.Usage, "arm64"},
		{"no strip", "CONFIG_CC_IS_CLANG=y", []string{amd64Prefix + "clang"}, "", target.AMD64, fault.InputMissing,
			"find strip"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := kit(t, row.config, row.programs...)
			r.Arch = row.arch
			if row.cc != "" {
				r.Env["CC"] = row.cc
			}
			_, err := findTools(r)
			if !fault.Is(err, row.want) || !strings.Contains(err.Error(), row.text) || fault.Hint(err) == "" {
				t.Errorf("findTools = %v (hint %q); want %v with %q and a hint", err, fault.Hint(err), row.want, row.text)
			}
		})
	}
}

// TestFlags checks every make variable with flags, for each compiler. Only for clang they switch -Werror off;
// clangFlags says why. With debug information, gcc gets the kernel's flags unchanged.
func TestFlags(t *testing.T) {
	t.Parallel()
	const lenient = "KCFLAGS=-Wno-error -Wno-error=strict-prototypes"
	for _, row := range []struct {
		cc, config string
		debug      bool
		btf        string
		want       []string
	}{
		{cc: "clang", want: []string{"KAFLAGS=-g0", lenient + " -g0"}},
		{cc: "clang", debug: true, want: []string{lenient}},
		{cc: "clang", config: " CONFIG_DEBUG_INFO_BTF_MODULES=y", btf: "vmlinux.btf",
			want: []string{"CONFIG_DEBUG_INFO_BTF_MODULES=", lenient}},
		{cc: "gcc", want: []string{"KAFLAGS=-g0", "KCFLAGS=-g0"}},
		{cc: "gcc", debug: true},
		{cc: "gcc", config: " CONFIG_DEBUG_INFO_BTF_MODULES=y",
			want: []string{"CONFIG_DEBUG_INFO_BTF_MODULES=", "KAFLAGS=-g0", "KCFLAGS=-g0"}},
	} {
		r := kit(t, "CONFIG_LD_IS_LLD=y"+row.config, amd64Prefix+row.cc, "llvm-strip")
		r.Env["CC"], r.Debug, r.BTF = amd64Prefix+row.cc, row.debug, row.btf
		got, err := findTools(r)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(row.want, flagVariables(r, got)); diff != "" {
			t.Errorf("flags for %s%s, debug %t, btf %q (-want +got):\n%s", row.cc, row.config, row.debug, row.btf, diff)
		}
	}
}

func TestSysroot(t *testing.T) {
	t.Parallel()
	r := kit(t, "CONFIG_CC_IS_CLANG=y CONFIG_LD_IS_LLD=y", amd64Prefix+"clang", "llvm-strip",
		"usr/x86_64-cros-linux-gnu/lib/crt1.o")
	got, err := findTools(r)
	if err != nil {
		t.Fatal(err)
	}
	if want := insideToolchain + "/usr/x86_64-cros-linux-gnu"; environment(got)["SYSROOT"] != want {
		t.Errorf("SYSROOT = %q; want %q", environment(got)["SYSROOT"], want)
	}
}
