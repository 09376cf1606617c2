package compile_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/testdriver"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// addTests adds seven conftest tests to the driver, in the formats of NVIDIA's conftest.sh. Their programs begin with
// the same header. The seventh test also gives the compiler another flag.
func addTests(t *testing.T, r compile.Request, header string) {
	t.Helper()
	const preamble = `
CONFTEST_PREAMBLE="#include \"conftest/headers.h\"
    #if defined(NV_LINUX_GONE_H_PRESENT)
    #error gone
    #endif"

compile_check_conftest() {
    CODE="$1"
    echo "$CONFTEST_PREAMBLE
    $CODE" > conftest$$.c
    if $CC $CFLAGS -c conftest$$.c > /dev/null 2>&1; then echo "#define $2"; else echo "#undef $2"; fi
    rm -f conftest$$.c conftest$$.o
}
`
	var tests, names strings.Builder
	test := func(name, begin, member, flags string) {
		fmt.Fprintf(&names, " %s", name)
		fmt.Fprintf(&tests, "        %s)\n            CODE=\"\n%s            int f(struct here *h) { return h->%s; }\"\n   "+
			"         %s\n            compile_check_conftest \"$CODE\" \"NV_%s\" \"\" \"types\"\n        ;;\n\n",
			name, begin, member, flags, name)
	}
	const plain = "            #include <linux/here.h>\n"
	for i := range 4 {
		test(fmt.Sprintf("same_%d", i), plain, "size", ":")
	}
	test("where_present", "\n            #if defined(NV_LINUX_HERE_H_PRESENT)\n            #include <linux/here.h>\n    "+
		"        #endif\n", "size", ":")
	test("no_member", plain, "gone", ":")
	test("other_flags", plain, "size", `CFLAGS="$CFLAGS -DOTHER"`)
	const before = "compile_test() {\n    case \"$1\" in\n"
	script := strings.Replace(testdriver.Script, before, preamble[1:]+"\n"+before+tests.String(), 1)
	kbuild := strings.Replace(testdriver.Kbuild, "COMPILE_TESTS += has_size\n",
		"COMPILE_TESTS += has_size"+names.String()+"\n", 1)
	write(t, r.Source, map[string]string{"conftest.sh": script, "Kbuild": kbuild})
	write(t, r.Headers, map[string]string{"include/linux/here.h": header})
}

// functionAnswers compiles the driver and returns conftest's answers about functions, which `make` writes into
// functions.h.
func functionAnswers(t *testing.T, r compile.Request) string {
	t.Helper()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cache.Close() })
	var log bytes.Buffer
	r.Cache, r.WorkDir, r.Log = cache, t.TempDir(), &log
	if _, err := compile.Modules(t.Context(), r); err != nil ||
		strings.Contains(log.String(), "make has to run conftest.sh itself") {
		t.Fatalf("Modules = %v\n%s", err, &log)
	}
	text, err := os.ReadFile(filepath.Join(r.WorkDir, "src/conftest/functions.h"))
	if err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(r.WorkDir, "ask/begin-*")); err != nil || len(left) > 0 {
		t.Errorf("precompiled headers are left: %v, %v", left, err)
	}
	return string(text)
}

// replaceCompiler replaces the toolchain's compiler by a script.
func replaceCompiler(t *testing.T, r compile.Request, script string) {
	t.Helper()
	path := filepath.Join(r.Toolchain, "bin/x86_64-cros-linux-gnu-gcc")
	to, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	program.Write(t, path, []byte("#!/bin/sh\n"+strings.ReplaceAll(script, "@GCC@", to)+"exec "+to+" \"$@\"\n"))
}

// TestBeginnings checks that conftest programs that begin with the same headers share one precompiled header, unless a
// program gives the compiler other flags. The answers must be the same without a precompiled header.
func TestBeginnings(t *testing.T) {
	t.Parallel()
	const guarded = "#ifndef HERE_H\n#define HERE_H\nstruct here { int size; };\n#endif\n"
	yes := []string{"#define NV_same_0", "#define NV_same_1", "#define NV_same_2", "#define NV_same_3",
		"#define NV_where_present", "#undef NV_no_member"}
	for name, row := range map[string]struct {
		script string
		want   []string
		header string
	}{
		// This compiler refuses a program that includes linux/here.h but does not use the precompiled header. So the answers
		// show which programs used the precompiled header.
		"precompiled": {`case "$*" in *"-include /prebake/begin/text.h"*) ;; *" -c conftest"*) grep -q linux/here.h conftest*.c && exit 1 ;; esac
`, append(yes, "#undef NV_other_flags"), guarded},
		"no precompiled headers": {`case "$*" in *c-header*) exit 1 ;; esac
`, append(yes, "#define NV_other_flags"), guarded},
		"none that works": {`case "$*" in *c-header*) : > /prebake/begin/text.h.gch; exit 0 ;; esac
`, append(yes, "#define NV_other_flags"), guarded},
		"one that cannot be read later": {`case "$*" in *"-include /prebake/begin/text.h"*) [ ! -e /prebake/begin/works ] || { echo "fatal error: had to relocate PCH" >&2; exit 1; } ;; esac
`, append(yes, "#define NV_other_flags"), guarded},
		"a compiler that crashes over them": {`case "$*" in *c-header*) kill -SEGV $$ ;; esac
`, append(yes, "#define NV_other_flags"), guarded},
		"as it is": {"", append(yes, "#define NV_other_flags"), guarded},
		// This header cannot be included twice. So no program can use it in precompiled form.
		"a header without a guard": {"", append(yes, "#define NV_other_flags"), "struct here { int size; };\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := toyWithTests(t)
			addTests(t, r, row.header)
			replaceCompiler(t, r, row.script)
			got := functionAnswers(t, r)
			for _, line := range row.want {
				if !strings.Contains(got, line+"\n") {
					t.Errorf("conftest does not say %q:\n%s", line, got)
				}
			}
		})
	}
}

// TestOwnHeader has a conftest test like assign_str, which NVIDIA's drivers ask since 575.51.02. The test writes a
// header beside its program. A header of the kernel includes it by a path that begins with a dot. The compiler looks
// for such a path beside the kernel's header and in the folders of -I, where the driver's folder is. So the test must
// run in that folder, as make's tests do. With the wrong answer, these drivers do not compile for Linux 6.10 and later.
func TestOwnHeader(t *testing.T) {
	t.Parallel()
	r := toyWithTests(t)
	const before = "compile_test() {\n    case \"$1\" in\n"
	write(t, r.Source, map[string]string{
		"conftest.sh": strings.Replace(testdriver.Script, before, before+`        own_header)
            echo "int own;" > conftest$$.h
            echo "#define OWN_PATH .
            #define OWN_NAME conftest$$
            #include <linux/again.h>" > conftest$$.c
            $CC $CFLAGS -c conftest$$.c > /dev/null 2>&1
            rm -f conftest$$.c conftest$$.h
            if [ -f conftest$$.o ]; then
                rm -f conftest$$.o
                echo "#define NV_OWN_HEADER 1"
            else
                echo "#define NV_OWN_HEADER 2"
            fi
        ;;

`, 1),
		"Kbuild": strings.Replace(testdriver.Kbuild, "COMPILE_TESTS += has_size\n", "COMPILE_TESTS += has_size own_header\n",
			1),
	})
	write(t, r.Headers, map[string]string{"include/linux/again.h": "#define TEXT(x) #x\n#define FILE_OF(path, name) " +
		"TEXT(path/name.h)\n#include FILE_OF(OWN_PATH, OWN_NAME)\n"})
	const want = "#define NV_OWN_HEADER 1\n"
	if got := functionAnswers(t, r); !strings.Contains(got, want) {
		t.Errorf("the builder answers %q; want %q, as make does", got, want)
	}
	r.WorkDir = t.TempDir()
	if _, err := compile.Modules(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(r.WorkDir, "src/conftest/functions.h"))
	if err != nil || !strings.Contains(string(text), want) {
		t.Errorf("make answers %q, %v; want %q", text, err, want)
	}
}
