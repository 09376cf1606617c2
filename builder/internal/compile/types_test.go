package compile_test

import (
	"bytes"
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/btf"
	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// kernelTypes are the types in the BTF of the toy kernel. A module that uses int must refer to the kernel's int and not
// define its own.
var kernelTypes = []string{"int", "task_struct"}

// typedToy returns toy's request with the kernel's BTF in Request.BTF, and with the given lines in the kernel's
// .config.
func typedToy(t *testing.T, config string) compile.Request {
	t.Helper()
	r := toy(t)
	for _, tool := range []string{"pahole", "objcopy"} {
		path := installed.Program(t, tool)
		if tool == "objcopy" {
			if err := os.Symlink(path, filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-objcopy")); err != nil {
				t.Fatal(err)
			}
		}
	}
	dir := t.TempDir()
	write(t, dir, map[string]string{"vmlinux.btf": string(btfsample.Kernel(kernelTypes...))})
	write(t, r.Headers, map[string]string{
		".config":                 "CONFIG_MODVERSIONS=y\n" + config,
		"scripts/pahole-flags.sh": "echo --btf_gen_floats -j --lang_exclude=rust\n",
	})
	write(t, r.Source, map[string]string{"nvidia/nv.c": "struct nv_state { int minor; float load; }; int nv(struct " +
		"nv_state *s) { return s->minor; }\n"})
	r.BTF = filepath.Join(dir, "vmlinux.btf")
	return r
}

const (
	takesBTF = "CONFIG_DEBUG_INFO_BTF_MODULES=y\n"
	// noCPP is the flag that leaves C++ sources out.
	noCPP = "--lang_exclude=c++,c++03,c++11,c++14"
)

// TestTypes checks that the BTF of a module refers to the kernel's types and has only the module's own types. A second
// build, with debug information, must give the same bytes. If Request.BTF is "", a module gets no BTF.
func TestTypes(t *testing.T) {
	t.Parallel()
	var first []byte
	for _, debug := range []bool{false, true} {
		r := typedToy(t, takesBTF+"CONFIG_PAHOLE_VERSION=116\n")
		r.Debug = debug
		var log bytes.Buffer
		r.Log = &log
		result, err := compile.Modules(t.Context(), r)
		if err != nil {
			t.Fatalf("Modules = %v\n%s", err, &log)
		}
		if got := strings.Join(names(result.Phases), " "); got != "conftest compile link types strip" {
			t.Errorf("phases are %s", got)
		}
		if !strings.Contains(log.String(), "nvidia.ko --btf_gen_floats "+noCPP+",rust\n") {
			t.Errorf("log = %s; want the kernel's flags, less those for parallel work", &log)
		}
		data, err := os.ReadFile(result.Modules["nvidia"])
		if err != nil {
			t.Fatal(err)
		}
		types, err := btf.Read(bytes.NewReader(data))
		if err != nil || !bytes.Contains(types, []byte("nv_state\x00")) || bytes.Contains(types, []byte("\x00int\x00")) {
			t.Errorf("types = %q, %v; want the module's own, without the kernel's", types, err)
		}
		kernel, err := btf.Parse(btfsample.Kernel(kernelTypes...))
		if err != nil {
			t.Fatal(err)
		}
		if err := kernel.Check(types); err != nil {
			t.Errorf("Check = %v", err)
		}
		if first == nil {
			first = data
		} else if !bytes.Equal(first, data) {
			t.Error("two compiles of the same differ")
		}
	}
	r := typedToy(t, takesBTF)
	for bad, want := range map[string]string{r.BTF + ".old": "no such file", r.Headers: "not a regular file"} {
		wrong := r
		wrong.BTF = bad
		if _, err := compile.Modules(t.Context(), wrong); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Modules with types %s = %v; want %q", bad, err, want)
		}
	}
	r.BTF = ""
	result, err := compile.Modules(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(result.Modules["nvidia"])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Section(btf.Section) != nil || f.Section(".debug_info") != nil {
		t.Error("a module that was made without the kernel's BTF has BTF or debug sections")
	}
}

func TestTypesRefused(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, config string
		files        map[string]string // files that the row adds to the header tree
		source       string
		noObjcopy    bool
		want         fault.Kind
		text         string
	}{
		{"kernel without", "", nil, "", false, fault.Usage, "configured without CONFIG_DEBUG_INFO_BTF_MODULES"},
		{"newer pahole", takesBTF + "CONFIG_PAHOLE_VERSION=9901\n", nil, "", false, fault.Usage, "pahole v99.01 made"},
		{"no objcopy", takesBTF, nil, "", true, fault.InputMissing, "no objcopy"},
		{"flags that name a file", takesBTF, map[string]string{"scripts/pahole-flags.sh": "echo --btf_base=/etc/x\n"}, "",
			false, fault.Unsupported, "--btf_base=/etc/x"},
		{"flags that pahole does not know", takesBTF, map[string]string{"scripts/pahole-flags.sh": "echo --of_the_future\n"},
			"", false, fault.Internal, "--of_the_future"},
		{"script that fails", takesBTF, map[string]string{"scripts/pahole-flags.sh": "exit 3\n"}, "", false,
			fault.Unsupported, "pahole-flags.sh failed"},
		{"makefile that fails", takesBTF,
			map[string]string{"scripts/Kbuild.include": "", "scripts/Makefile.btf": "$(error no such kernel)\n"}, "", false,
			fault.Unsupported, "no such kernel"},
		{"functions for BPF programs", takesBTF, nil, "__attribute__((section(\".BTF_ids\"))) int ids[2] = {1, 2};\n", false,
			fault.Unsupported, ".BTF_ids"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := typedToy(t, row.config)
			write(t, r.Headers, row.files)
			if row.source != "" {
				write(t, r.Source, map[string]string{"nvidia/nv.c": row.source})
			}
			if row.noObjcopy {
				if err := os.Remove(filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-objcopy")); err != nil {
					t.Fatal(err)
				}
			}
			result, err := compile.Modules(t.Context(), r)
			if !fault.Is(err, row.want) || !strings.Contains(err.Error(), row.text) || fault.Hint(err) == "" ||
				len(result.Modules) > 0 {
				t.Errorf("Modules = %v, %v (hint %q); want %v with %q and a hint", result.Modules, err, fault.Hint(err), row.want,
					row.text)
			}
		})
	}
}

// TestTypesOutOfMemory checks that the error has the kind fault.OutOfMemory if a program of the BTF step is killed.
func TestTypesOutOfMemory(t *testing.T) {
	t.Parallel()
	r := typedToy(t, takesBTF)
	write(t, r.Headers, map[string]string{"scripts/Kbuild.include": "",
		"scripts/Makefile.btf": "PAHOLE_FLAGS := $(shell kill -9 $$PPID)\n"})
	if _, err := compile.Modules(t.Context(), r); !fault.Is(err, fault.OutOfMemory) || fault.Hint(err) == "" {
		t.Errorf("Modules = %v; want out-of-memory, with a hint", err)
	}
}

// TestTypesFlagsOfMakefiles has a kernel like those since Linux 6.9, whose scripts/Makefile.btf contains pahole's
// flags. Older kernels have scripts/pahole-flags.sh instead.
func TestTypesFlagsOfMakefiles(t *testing.T) {
	t.Parallel()
	r := typedToy(t, takesBTF)
	write(t, r.Headers, map[string]string{
		"include/config/auto.conf": "CONFIG_PAHOLE_VERSION=124\n",
		"scripts/Kbuild.include":   "same = $(if $(filter $1,$2),y)\n",
		"scripts/Makefile.btf": "flags-$(call same,$(CONFIG_PAHOLE_VERSION),124) := --jobs=4 -j2 " +
			"--btf_gen_floats\nexport PAHOLE_FLAGS := $(flags-y)\nexport MODULE_PAHOLE_FLAGS := --of_the_future\n",
	})
	var log bytes.Buffer
	r.Log = &log
	if _, err := compile.Modules(t.Context(), r); err != nil ||
		!strings.Contains(log.String(), "nvidia.ko --btf_gen_floats "+noCPP+"\n") {
		t.Errorf("Modules = %v; want the makefile's flags in\n%s", err, &log)
	}
}

// cpp is C text with debug information of a C++ source, which has a reference type. pahole cannot express this type.
// NVIDIA's core object of nvidia-modeset has C++ sources; those of Debian's open flavour have debug information.
const cpp = `
__asm__(
	".pushsection .debug_abbrev,\"\",@progbits\n.Lcpp_abbrev:\n"
	".uleb128 1,0x11\n.byte 1\n.uleb128 0x13,0x0b,0x03,0x08,0,0\n" /* a unit: language, name */
	".uleb128 2,0x24\n.byte 0\n.uleb128 0x03,0x08,0x3e,0x0b,0x0b,0x0b,0,0\n" /* a base type: name, encoding, size */
	".uleb128 3,0x10\n.byte 0\n.uleb128 0x49,0x13,0x0b,0x0b,0,0\n" /* a reference type: type, size */
	".byte 0\n.popsection\n"
	".pushsection .debug_info,\"\",@progbits\n"
	".Lcpp:\n.long .Lcpp_end - . - 4\n.value 4\n.long .Lcpp_abbrev\n.byte 8\n"
	".uleb128 1\n.byte 0x1a\n.asciz \"a.cpp\"\n" /* C++11 */
	".Lcpp_int:\n.uleb128 2\n.asciz \"int\"\n.byte 5,4\n"
	".uleb128 3\n.long .Lcpp_int - .Lcpp\n.byte 8\n"
	".byte 0\n.Lcpp_end:\n.popsection\n");
`

// TestTypesWithoutCPP checks that the BTF of a module leaves out its C++ sources.
func TestTypesWithoutCPP(t *testing.T) {
	t.Parallel()
	for _, config := range []string{"echo --lang_exclude=rust\n", "echo --btf_gen_floats\n"} {
		r := typedToy(t, takesBTF)
		write(t, r.Headers, map[string]string{"scripts/pahole-flags.sh": config})
		write(t, r.Source, map[string]string{"nvidia/nv.c": "struct nv_state { int minor; }; int nv(struct nv_state *s) " +
			"{ return s->minor; }\n" + cpp})
		var log bytes.Buffer
		r.Log = &log
		result, err := compile.Modules(t.Context(), r)
		if err != nil {
			t.Errorf("Modules = %v\n%s", err, &log)
			continue
		}
		data, err := os.ReadFile(result.Modules["nvidia"])
		if err != nil {
			t.Fatal(err)
		}
		if types, err := btf.Read(bytes.NewReader(data)); err != nil || !bytes.Contains(types, []byte("nv_state\x00")) {
			t.Errorf("types = %q, %v; want those of the C source", types, err)
		}
	}
}
