package compile

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cas"
)

// TestView checks the digest of a view, which is the header tree without what differs between sibling kernels. A change
// of anything else in the tree must change the digest.
func TestView(t *testing.T) {
	t.Parallel()
	files := map[string]string{
		".config":                        "CONFIG_A=y\nCONFIG_BUILD_SALT=\"55\"\n",
		"Module.symvers":                 "0x12345678\ta\tvmlinux\tEXPORT_SYMBOL\t\n",
		"include/generated/autoconf.h":   "#define CONFIG_A 1\n#define CONFIG_BUILD_SALT \"55\"\n",
		"include/generated/utsrelease.h": "#define UTS_RELEASE \"6.1-55\"\n",
		"include/generated/compile.h":    "#define LINUX_COMPILE_BY \"me\"\n",
		"include/config/kernel.release":  "6.1-55\n",
		"include/linux/a.h":              "int a;\n",
	}
	digest := func(change map[string]string) viewFact {
		t.Helper()
		dir := t.TempDir()
		for _, set := range []map[string]string{files, change} {
			for name, text := range set {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		cache, err := cas.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer cache.Close()
		var first viewFact
		for range 2 { // the first round computes the view, the second reads it from the cache
			v, err := newView(t.Context(), cache, dir, "headers")
			if err != nil {
				t.Fatal(err)
			}
			if first.Digest != "" && first != v.viewFact {
				t.Errorf("the view from the cache is %+v; want %+v, as computed", v.viewFact, first)
			}
			first = v.viewFact
			for name, text := range v.masked {
				if bytes.Contains(text, []byte("55")) || bytes.Contains(text, []byte("12345678")) ||
					bytes.Contains(text, []byte("me\"")) {
					t.Errorf("%s shows %s", name, text)
				}
			}
		}
		return first
	}
	base := digest(nil)
	for _, row := range []struct {
		name, file, text string
		same, macros     bool
	}{
		{"salt", "include/generated/autoconf.h", "#define CONFIG_A 1\n#define CONFIG_BUILD_SALT \"56\"\n", true, false},
		{"no salt", "include/generated/autoconf.h", "#define CONFIG_A 1\n", true, false},
		{"option", "include/generated/autoconf.h", "#define CONFIG_A 2\n#define CONFIG_BUILD_SALT \"55\"\n", false, false},
		{"salt in .config", ".config", "CONFIG_A=y\nCONFIG_BUILD_SALT=\"56\"\n", true, false},
		{"release", "include/generated/utsrelease.h", "#define UTS_RELEASE \"6.1-56\"\n", true, false},
		{"release file", "include/config/kernel.release", "6.1-56\n", true, false},
		{"who compiled", "include/generated/compile.h", "#define LINUX_COMPILE_BY \"you\"\n", true, false},
		{"a macro in utsrelease.h", "include/generated/utsrelease.h", "#define UTS_RELEASE \"6.1-55\"\n#define X 1\n", false,
			false},
		{"a symbol's checksum", "Module.symvers", "0x87654321\ta\tvmlinux\tEXPORT_SYMBOL\t\n", true, false},
		{"a symbol's licence", "Module.symvers", "0x12345678\ta\tvmlinux\tEXPORT_SYMBOL_GPL\t\n", false, false},
		{"header", "include/linux/a.h", "long a;\n", false, false},
		{"header more", "include/linux/b.h", "", false, false},
		{"header that knows the driver", "include/linux/b.h", "#ifdef NV_LINUX_A_H_PRESENT\n", false, true},
		{"script", "scripts/x.sh", "x", false, false},
		{"generated header of no known kind", "include/generated/bounds.h", "#define X \"y\"\n", false, false},
	} {
		got := digest(map[string]string{row.file: row.text})
		if (got.Digest == base.Digest) != row.same || got.Macros != row.macros {
			t.Errorf("%s: same digest %t, macros %t; want %t, %t", row.name, got.Digest == base.Digest, got.Macros, row.same,
				row.macros)
		}
	}
}

// TestBuildID checks that setBuildID gives the stripped and the unstripped module the same build id. The stripped
// module must have the same bytes, however much debug information the compiler made.
func TestBuildID(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source := filepath.Join(dir, "a.c")
	if err := os.WriteFile(source, []byte("int f(int x) { return x + 1; }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	sh := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	id := func(path string) string {
		t.Helper()
		f, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		note, err := f.Section(".note.gnu.build-id").Data()
		if err != nil {
			t.Fatal(err)
		}
		return string(note[16:])
	}
	var stripped [][]byte
	for _, debug := range []string{"-g0", "-g", "-g3"} {
		object, full, bare := filepath.Join(dir, "a"+debug+".o"), filepath.Join(dir, "full"+debug), filepath.Join(dir,
			"bare"+debug)
		sh("gcc", "-O2", debug, "-c", "-o", object, source)
		sh("ld", "-r", "--build-id=sha1", "-o", full, object)
		sh("strip", "--strip-debug", "-o", bare, full)
		was := id(full)
		if err := setBuildID(bare, full); err != nil {
			t.Fatal(err)
		}
		if id(bare) != id(full) || id(bare) == was || len(was) != 20 || id(bare) == strings.Repeat("\x00", 20) {
			t.Errorf("%s: build ids %x and %x; was %x", debug, id(bare), id(full), was)
		}
		text, err := os.ReadFile(bare)
		if err != nil {
			t.Fatal(err)
		}
		stripped = append(stripped, text)
		if err := setBuildID(bare, ""); err != nil {
			t.Fatal(err)
		}
		if again, err := os.ReadFile(bare); err != nil || !bytes.Equal(again, text) {
			t.Errorf("%s: set twice, it is another file: %v", debug, err)
		}
	}
	if !bytes.Equal(stripped[0], stripped[1]) || !bytes.Equal(stripped[0], stripped[2]) {
		t.Error("the stripped modules differ; want the same bytes for every amount of debug information")
	}
	none := filepath.Join(dir, "a-g0.o")
	before, err := os.ReadFile(none)
	if err != nil {
		t.Fatal(err)
	}
	if err := setBuildID(none, ""); err != nil {
		t.Errorf("setBuildID of a file without one: %v", err)
	}
	if after, err := os.ReadFile(none); err != nil || !bytes.Equal(before, after) {
		t.Errorf("setBuildID changed a file without one: %v", err)
	}
	if err := setBuildID(source, ""); err == nil {
		t.Error("setBuildID took a text for a module")
	}
}

const aCommand = `cmd_/prebake/src/nvidia/nv.o := gcc -O2 -c -o /prebake/src/nvidia/nv.o /prebake/src/nvidia/nv.c   ; ./tools/objtool/objtool --orc /prebake/src/nvidia/nv.o

source_/prebake/src/nvidia/nv.o := /prebake/src/nvidia/nv.c

deps_/prebake/src/nvidia/nv.o := \
    $(wildcard include/config/SMP) \
  include/linux/kconfig.h \
    $(wildcard include/config/X) \
  /prebake/src/common/inc/nv.h \

/prebake/src/nvidia/nv.o: $(deps_/prebake/src/nvidia/nv.o)

$(deps_/prebake/src/nvidia/nv.o):
`

func TestParseCommand(t *testing.T) {
	t.Parallel()
	for _, text := range []string{aCommand, "saved" + aCommand} {
		got, ok := parseCommand(text)
		if diff := cmp.Diff([]string{"/prebake/src/nvidia/nv.c", "include/linux/kconfig.h", "/prebake/src/common/inc/nv.h"},
			got.deps); !ok || diff != "" {
			t.Errorf("parseCommand = %t; dependencies differ (-want +got):\n%s", ok, diff)
		}
	}
	unfinished, _, _ := strings.Cut(aCommand, "\n\n/prebake")
	for name, text := range map[string]string{
		"linked":           "cmd_/prebake/src/nvidia.o := ld -r -o /prebake/src/nvidia.o @/prebake/src/nvidia.mod\n",
		"two commands":     "cmd_x := gcc\n" + aCommand,
		"a response file":  strings.Replace(aCommand, "-O2", "@flags", 1),
		"a plugin":         strings.Replace(aCommand, "-O2", "-fplugin=./scripts/x.so", 1),
		"a profile":        strings.Replace(aCommand, "-O2", "-fprofile-sample-use=/x", 1),
		"a strange name":   strings.Replace(aCommand, "include/linux/kconfig.h", "$(shell x)", 1),
		"no end of a list": unfinished,
		"nothing":          "",
	} {
		if got, ok := parseCommand(text); ok {
			t.Errorf("parseCommand of %s = %+v; want no", name, got)
		}
	}
}

func TestWords(t *testing.T) {
	t.Parallel()
	read := func(text string) *fileFacts {
		return newNameScanner(map[string]bool{"UTS": true}).read("f", func() ([]byte, error) { return []byte(text), nil })
	}
	for text, want := range map[string]bool{
		"UTS": true, "a UTS b": true, "(UTS)": true, "XUTS UTS": true, "UTSUTS UTS": true,
		"": false, "XUTS": false, "UTSX UTS_ _UTS": false, "UTSUTS": false, "UT": false,
	} {
		if got := read(text).named["UTS"]; got != want {
			t.Errorf("words of %q name UTS: %t; want %t", text, got, want)
		}
	}
	if got := read("#define X(a) NV_IS_ ## a\n#define Y(b) b##_PRESENT\n").pastes; !got["NV_IS_"] || !got["_PRESENT"] ||
		len(got) != 2 {
		t.Errorf("pasted parts are %v", got)
	}
	for text, want := range map[string]bool{"asm(\".incbin \\\"f\\\"\");": true, "#embed <f>": true,
		"int incbin;": false} {
		if got := read(text).hides; got != want {
			t.Errorf("%q takes a file in: %t; want %t", text, got, want)
		}
	}
}

func FuzzParseCommand(f *testing.F) {
	f.Add(aCommand)
	f.Fuzz(func(t *testing.T, text string) {
		c, ok := parseCommand(text)
		if ok && (c.line == "" || len(c.deps) < 2) {
			t.Errorf("parseCommand = %+v", c)
		}
	})
}

// TestWatchReuse checks that the list of phases has the compile phase even if every object comes from the cache, so
// that `make` prints no line about it.
func TestWatchReuse(t *testing.T) {
	t.Parallel()
	var calls []string
	w := newWatch(&bytes.Buffer{}, func(phase string, done, total int) {
		calls = append(calls, phase)
		if done > total {
			t.Errorf("%s: %d of %d", phase, done, total)
		}
	}, work{conftest: 10, compile: 3, link: 2}, time.Now)
	w.reuse(phaseConftest, 9)
	w.reuse(phaseCompile, 3)
	for _, line := range []string{" CONFTEST: a", "  MODPOST x", "  LD [M]  a.ko"} {
		w.read(line)
	}
	if err := w.close(false); err != nil {
		t.Fatal(err)
	}
	var notes []string
	for _, p := range w.phases {
		notes = append(notes, p.Name+": "+p.Note)
	}
	if diff := cmp.Diff([]string{"conftest: 10 tests, 9 remembered", "compile: 3 files, 3 reused", "link: 1 step"},
		notes); diff != "" {
		t.Errorf("phases differ (-want +got):\n%s", diff)
	}
}
