package conftest_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/conftest"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// script has the format of NVIDIA's conftest.sh, but is written for this test.
const script = `#!/bin/sh
CC="$1"
test_header_presence() {
    echo "#define HEADER $1 $CFLAGS"
}
compile_test() {
    case "$1" in
        set_uc)
            #
            # A comment; with ;; within.
            #
            CODE="
            #if defined(NV_ASM_PAGE_H_PRESENT)
            int x;"
            echo "#define SET_UC $CODE" | tr -d '\n'; echo
        ;;

        # Between two.
        one | other)
            LEFT=over
            echo "#undef $1 $CC"
        ;;

    symbol_*)
            echo "#define $1 1$LEFT"
        ;;

        uts_release)
            echo '"masked"'
        ;;

        *)
            echo "Error: unknown conftest '$1' requested" >&2
            exit 1
        ;;
    esac
}

case "$5" in
    test_kernel_header)
        CFLAGS=$6
        test_header_presence "$7"
        exit $?
    ;;

    patch_check)
        exit 0
    ;;

    compile_tests)
        shift 5

        CFLAGS=$1
        shift

        for i in $*; do compile_test $i; done

        exit 0
    ;;
esac
`

const plan = `cc gcc
arch x86_64
sources /k
output /k
flags -O2 -DKBUILD_BASENAME="#conftest12" -DNV_VERSION_STRING=\"535.1\"
cflags -O2
headers asm/page.h linux/b.h asm/page.h
functions set_uc one
generic 
macros 
symbols symbol_x symbol_y symbol_x
types one
`

func parse(t *testing.T, scriptText, planText string) (*conftest.Script, *conftest.Plan) {
	t.Helper()
	s, err := conftest.ParseScript([]byte(scriptText))
	if err != nil {
		t.Fatal(err)
	}
	p, err := conftest.ParsePlan(planText)
	if err != nil {
		t.Fatal(err)
	}
	return s, p
}

// TestPlanRules runs `make` with makefile rules that print which tests a driver's makefile wants. `make` must run the
// sanity checks, write this plan, and stop before the first test. The makefile here is a short version of NVIDIA's
// Kbuild files; deploy/e2e tests NVIDIA's own.
func TestPlanRules(t *testing.T) {
	t.Parallel()
	installed.Program(t, "make")
	const text = `obj := .
CC = gcc
ARCH = x86_64
NV_KERNEL_SOURCES = /k
NV_KERNEL_OUTPUT = /k
NV_CFLAGS_FROM_CONFTEST := -O2
NV_CONFTEST_CFLAGS = -O2 -DKBUILD_BASENAME="\#conftest12" -DNV_VERSION_STRING=\"535.1\"
NV_HEADER_PRESENCE_TESTS = asm/page.h linux/b.h \
 asm/page.h
NV_CONFTEST_FUNCTION_COMPILE_TESTS = set_uc one
NV_CONFTEST_SYMBOL_COMPILE_TESTS = symbol_x symbol_y symbol_x
NV_CONFTEST_TYPE_COMPILE_TESTS += one
HEADERS := $(obj)/conftest/patches.h $(obj)/conftest/headers.h
all: nv.o
	@echo went on
nv.o: | $(HEADERS)
	@echo asked
$(HEADERS):
	@echo asked
BUILD_SANITY_CHECKS = cc_sanity_check xen_sanity_check
.PHONY: $(BUILD_SANITY_CHECKS)
$(BUILD_SANITY_CHECKS):
	@echo checked $@
$(HEADERS): | $(BUILD_SANITY_CHECKS)
$(obj)/conftest/uts_release: NV_GENERATE_UTS_RELEASE
	@echo asked
.PHONY: NV_GENERATE_UTS_RELEASE
$(HEADERS): $(obj)/conftest/uts_release
`
	for name, row := range map[string]struct{ text, said string }{
		"as NVIDIA has it": {text, "checked cc_sanity_check\nchecked xen_sanity_check\n"},
		"as Debian edits it": {text +
			".PHONY: conftest-verbose\nconftest-verbose:\n\t@echo flags\n$(obj)/conftest/uts_release $(BUILD_SANITY_CHECKS) " +
			"$(obj)/conftest/patches.h: | conftest-verbose\n", "flags\nchecked cc_sanity_check\nchecked xen_sanity_check\n"},
	} {
		file := filepath.Join(t.TempDir(), "plan")
		cmd := exec.CommandContext(t.Context(), "make", "-f", "-", "all")
		// If `make` started this test, the environment has variables for nested makes. The `make` below must not see them.
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
		cmd.Stdin = strings.NewReader(row.text + conftest.PlanRules(file))
		out, err := cmd.Output()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || string(out) != row.said {
			t.Errorf("%s: make ended with %v and said\n%s\nwant it stopped before the first question, and\n%s", name, err, out,
				row.said)
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(plan, string(got)); diff != "" {
			t.Errorf("%s: plan differs (-want +got):\n%s", name, diff)
		}
	}
	// If a sanity check fails, `make` must stop before it writes a plan.
	file := filepath.Join(t.TempDir(), "plan")
	cmd := exec.CommandContext(t.Context(), "make", "-f", "-", "all")
	cmd.Stdin = strings.NewReader(strings.Replace(text, "@echo checked $@", "@exit 1", 1) + conftest.PlanRules(file))
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "cc_sanity_check] Error 1") {
		t.Errorf("make with a check that fails = %v\n%s", err, out)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Stat(plan) = %v; want no plan after a check that fails", err)
	}
}

func TestParsePlan(t *testing.T) {
	t.Parallel()
	_, p := parse(t, script, plan)
	want := &conftest.Plan{
		CC: "gcc", Arch: "x86_64", Sources: "/k", Output: "/k",
		Flags: `-O2 -DKBUILD_BASENAME="#conftest12" -DNV_VERSION_STRING=\"535.1\"`, CFlags: "-O2",
		Headers: []string{"asm/page.h", "linux/b.h", "asm/page.h"},
		Tests: map[string][]string{"functions": {"set_uc", "one"}, "generic": {}, "macros": {},
			"symbols": {"symbol_x", "symbol_y", "symbol_x"}, "types": {"one"}},
	}
	if diff := cmp.Diff(want, p); diff != "" {
		t.Errorf("plan differs (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"one", "set_uc", "symbol_x", "symbol_y"}, p.All()); diff != "" {
		t.Errorf("tests differ (-want +got):\n%s", diff)
	}
	for _, row := range []struct{ name, from, to string }{
		{"a quote in the flags", "-O2", "-D'x'"},
		{"a header that climbs", "linux/b.h", "../b.h"},
		{"an absolute header", "linux/b.h", "/b.h"},
		{"a test that is a path", "set_uc", "a/b"},
		{"a compiler with arguments", "cc gcc", "cc gcc -x"},
		{"a line too many", "types one", "types one\nmore"},
		{"lines out of order", "arch", "ark"},
		{"nothing", plan, ""},
		{"no tests", "set_uc one\n", "\n"},
	} {
		text := strings.ReplaceAll(plan, row.from, row.to)
		if row.name == "no tests" {
			text = "cc gcc\narch x\nsources /k\noutput /k\nflags \ncflags \nheaders a.h\nfunctions \ngeneric \nmacros " +
				"\nsymbols \ntypes \n"
		}
		if got, err := conftest.ParsePlan(text); !errors.Is(err, conftest.ErrShape) {
			t.Errorf("ParsePlan of %s = %+v, %v; want %v", row.name, got, err, conftest.ErrShape)
		}
	}
}

// TestQuestion checks a script from which all tests but one are cut. It must answer this test as the whole script does.
// It must not answer any other test.
func TestQuestion(t *testing.T) {
	t.Parallel()
	s, p := parse(t, script, plan)
	sh := func(text []byte, args ...string) (string, error) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", append([]string{"-s", "gcc", "x86_64", "/k", "/k"}, args...)...)
		cmd.Stdin = strings.NewReader(string(text))
		out, err := cmd.Output()
		return string(out), err
	}
	question := func(test string) []byte {
		t.Helper()
		text, err := s.Question(test)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for _, test := range p.All() {
		want, err := sh([]byte(script), conftest.ModeTest, "-O2", test)
		if err != nil || want == "" {
			t.Fatal(err)
		}
		if got, err := sh(question(test), conftest.ModeTest, "-O2", test); err != nil || got != want {
			t.Errorf("%s: the script with this test alone answers %q, %v; the whole script answers %q", test, got, err, want)
		}
		if got, err := sh(question(test), conftest.ModeTest, "-O2", "other"); test != "one" && err == nil {
			t.Errorf("the script for %s answers %q to another question", test, got)
		}
	}
	if got, err := sh(question(""), conftest.ModeHeader, "-O2", "asm/page.h"); err != nil ||
		got != "#define HEADER asm/page.h -O2\n" {
		t.Errorf("asm/page.h: the script answers %q, %v", got, err)
	}
	if got, err := sh(question(""), conftest.ModePatches); err != nil || got != "" {
		t.Errorf("patches: the script answers %q, %v", got, err)
	}
	if _, err := s.Question("gone"); !errors.Is(err, conftest.ErrShape) {
		t.Errorf("Question of no test = %v; want %v", err, conftest.ErrShape)
	}
	calls, _ := parse(t, strings.Replace(script, "LEFT=over", "compile_test set_uc", 1), plan)
	if _, err := calls.Question("one"); !errors.Is(err, conftest.ErrShape) {
		t.Errorf("Question of a test that runs another = %v; want %v", err, conftest.ErrShape)
	}
}

func TestScriptShapes(t *testing.T) {
	t.Parallel()
	s, _ := parse(t, script, plan)
	for test, want := range map[string]bool{"set_uc": true, "one": true, "other": true, "symbol_abc": true, "gone": false,
		"set_uc2": false, "*": false} {
		if got := s.Knows(test); got != want {
			t.Errorf("Knows(%s) = %t; want %t", test, got, want)
		}
	}
	for _, row := range []struct{ name, from, to string }{
		{"two loops", "        for i in $*; do compile_test $i; done\n",
			"        for i in $*; do compile_test $i; done\n        for i in $*; do compile_test $i; done\n"},
		{"another loop", "do compile_test $i", "do compile_test \"$i\""},
		{"no way to ask for headers", "test_kernel_header)", "test_header)"},
		{"no tests", "compile_test() {", "compile_it() {"},
		{"a case within", "LEFT=over", "LEFT=over\n            case $LEFT in\n            over) ;;\n            esac"},
		{"a stanza with its body beside", "        one | other)", "        one | other) LEFT=over"},
		{"a stanza that does not end", "            echo \"#undef $1 $CC\"\n        ;;\n",
			"            echo \"#undef $1 $CC\"\n"},
	} {
		text := strings.Replace(script, row.from, row.to, 1)
		if text == script {
			t.Fatalf("%s: changes nothing", row.name)
		}
		got, err := conftest.ParseScript([]byte(text))
		if row.name == "a stanza that does not end" {
			// This is no error: the stanza of test "one" then contains the stanza of symbol_*, and the key of "one" covers both.
			if err != nil || got.Knows("symbol_x") {
				t.Errorf("%s: ParseScript = %v; want one test that swallows the next", row.name, err)
			}
			continue
		}
		if !errors.Is(err, conftest.ErrShape) {
			t.Errorf("%s: ParseScript = %v; want %v", row.name, err, conftest.ErrShape)
		}
	}
}

// TestKeys checks that the keys of stored answers cover everything that decides an answer, and nothing else.
func TestKeys(t *testing.T) {
	t.Parallel()
	const headers = "#define NV_ASM_PAGE_H_PRESENT\n#undef NV_LINUX_B_H_PRESENT\n"
	keys := func(scriptText, planText, headersText string, basis conftest.Basis) map[string]string {
		t.Helper()
		s, p := parse(t, scriptText, planText)
		a := conftest.NewKeyer(s, p, basis)
		set, ok := a.TestKey("set_uc", headersText)
		if !ok {
			t.Fatal("no key for set_uc")
		}
		one, _ := a.TestKey("one", headersText)
		if _, ok := a.TestKey("gone", headersText); ok {
			t.Error("a key for a test that the script does not know")
		}
		return map[string]string{"sheet": a.CacheKey(), "set_uc": set, "one": one, "header": a.HeaderKey("asm/page.h")}
	}
	basis := conftest.Basis{View: "v", Toolchain: "t", Recipe: "r"}
	base := keys(script, plan, headers, basis)
	replace := strings.ReplaceAll
	ms := replace(plan, `535.1\"`, `535.1\" -fms-extensions`)
	rows := []struct {
		name, script, plan, headers string
		basis                       conftest.Basis
		changed                     string // names of the keys that differ
	}{
		{"nothing", script, plan, headers, basis, ""},
		{"process number", script, replace(plan, "conftest12", "conftest345"), headers, basis, ""},
		{"driver version", script, replace(plan, "535.1", "535.2"), headers, basis, ""},
		{"driver version that a header names", script, replace(plan, "535.1", "535.2"), headers,
			conftest.Basis{View: "v", Toolchain: "t", Recipe: "r", Macros: true}, "sheet set_uc one"},
		{"-fms-extensions", script, ms, headers, basis, "sheet"}, // a header may use what this flag allows
		{"other flags", script, replace(plan, "-O2", "-O3"), headers, basis, "sheet"},
		{"another compiler's name", script, replace(plan, "cc gcc", "cc gcc-12"), headers, basis, "sheet"},
		{"view", script, plan, headers, conftest.Basis{View: "w", Toolchain: "t", Recipe: "r"}, "sheet"},
		{"toolchain", script, plan, headers, conftest.Basis{View: "v", Toolchain: "u", Recipe: "r"}, "sheet"},
		{"host tools", script, plan, headers, conftest.Basis{View: "v", Toolchain: "t", Host: "h", Recipe: "r"}, "sheet"},
		{"recipe", script, plan, headers, conftest.Basis{View: "v", Toolchain: "t", Recipe: "s"}, "sheet"},
		{"a program", replace(script, "int x;", "int y;"), plan, headers, basis, "set_uc"},
		{"the frame", replace(script, "CC=\"$1\"", "CC=\"$1 \""), plan, headers, basis, "sheet"},
		{"another test", strings.Replace(script, "1$LEFT", "2$LEFT", 1), plan, headers, basis, ""},
		{"a macro that one names", script, plan, replace(headers, "#define NV_ASM", "#undef NV_ASM"), basis, "set_uc"},
		{"a macro that none names", script, plan, replace(headers, "#undef NV_LINUX", "#define NV_LINUX"), basis, ""},
		{"one more macro", script, plan, headers + "#define NV_C_H_PRESENT\n", basis, ""},
	}
	for _, row := range rows {
		var changed []string
		got := keys(row.script, row.plan, row.headers, row.basis)
		for _, name := range []string{"sheet", "set_uc", "one", "header"} {
			if got[name] != base[name] {
				changed = append(changed, name)
			}
		}
		if strings.Join(changed, " ") != row.changed {
			t.Errorf("with another %s the keys of %q change; want %q", row.name, changed, row.changed)
		}
	}
	s, p := parse(t, script, plan)
	a := conftest.NewKeyer(s, p, basis)
	if got := a.Flags(); strings.Contains(got, "535.1") || strings.Contains(got, "conftest12") {
		t.Errorf("Flags = %q; want no version and no process number in them, because no key covers these", got)
	}
	if got := a.Visible("set_uc", headers); got != "#define NV_ASM_PAGE_H_PRESENT\n" {
		t.Errorf("Visible = %q; want the one line that the test's text names", got)
	}
}

// TestKeyOfLinesInText checks that a test cannot forge the key of another test. The first test sees a line in
// headers.h. The second has the same line in its own text, where the shell ignores it as a comment. The two keys must
// differ.
func TestKeyOfLinesInText(t *testing.T) {
	t.Parallel()
	const line = "#define NV_ASM_PAGE_H_PRESENT\n"
	key := func(scriptText, headers string) (string, string) {
		t.Helper()
		s, p := parse(t, scriptText, plan)
		a := conftest.NewKeyer(s, p, conftest.Basis{View: "v", Toolchain: "t", Recipe: "r"})
		k, ok := a.TestKey("set_uc", headers)
		if !ok {
			t.Fatal("no key for set_uc")
		}
		return k, a.CacheKey()
	}
	_, text, _ := strings.Cut(script, "        set_uc)\n")
	text, _, _ = strings.Cut(text, "        ;;")
	honest, sheet := key(script, line)
	forged, other := key(strings.Replace(script, text, text+line, 1), "")
	if sheet != other {
		t.Fatal("the two tests do not share their stored answers")
	}
	if honest == forged {
		t.Error("a test with the line in its text has the same key as a test that sees the line in headers.h")
	}
}

// TestFiles checks that Files returns the files that the rules of NVIDIA's makefile would write.
func TestFiles(t *testing.T) {
	t.Parallel()
	_, p := parse(t, script, plan)
	got := map[string]string{}
	order := map[string]int{}
	for i, f := range p.Files(map[string]string{"asm/page.h": "P\n", "linux/b.h": "B\n"},
		map[string]string{"set_uc": "S\n", "one": "1\n", "symbol_x": "X\n", "symbol_y": "Y\n"}, "patches\n",
		"   \"6.1\"\n\n") {
		got[f.Name], order[f.Name] = f.Text, i
	}
	p.Headers = nil
	for _, f := range p.Files(map[string]string{"": "all\n"}, nil, "", "") {
		if f.Name == "headers.h" && f.Text != "all\n" {
			t.Errorf("headers.h of a script that knows its headers is %q; want all that it answered", f.Text)
		}
	}
	const v = "// Kernel version:    \"6.1\"\n"
	want := map[string]string{
		"uts_release": v, "patches.h": "patches\n", "headers.h": "P\nB\n" + v,
		"header_presence/asm/page.h.part": "P\n", "header_presence/linux/b.h.part": "B\n",
		"compile-tests/set_uc.h": "S\n", "compile-tests/one.h": "1\n", "compile-tests/symbol_x.h": "X\n",
		"compile-tests/symbol_y.h": "Y\n",
		"functions.h":              "S\n1\n" + v, "generic.h": v, "macros.h": v, "symbols.h": "X\nY\n" + v,
		"types.h": "1\n" + v,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files differ (-want +got):\n%s", diff)
	}
	for _, pair := range [][2]string{{"uts_release", "header_presence/asm/page.h.part"},
		{"header_presence/linux/b.h.part", "headers.h"}, {"headers.h", "compile-tests/one.h"},
		{"compile-tests/one.h", "types.h"}} {
		if order[pair[0]] >= order[pair[1]] {
			t.Errorf("%s comes after %s, which is made of it", pair[0], pair[1])
		}
	}
}

func TestSheet(t *testing.T) {
	t.Parallel()
	s := conftest.Answers{"k": "#define A\n"}
	if got := conftest.ReadAnswers(s.Bytes()); !cmp.Equal(got, s) {
		t.Errorf("ReadAnswers(Bytes) = %v; want %v", got, s)
	}
	for _, raw := range []string{"", "null", "[]", `{"a":1}`} {
		if got := conftest.ReadAnswers([]byte(raw)); got == nil || len(got) != 0 {
			t.Errorf("ReadAnswers(%q) = %v; want no answers", raw, got)
		}
	}
	if raw := (conftest.Answers{"k": strings.Repeat("x", 2<<20)}).Bytes(); raw != nil {
		t.Errorf("Bytes of answers that are too large = %d bytes; want none", len(raw))
	}
}

func FuzzParseScript(f *testing.F) {
	f.Add(script)
	f.Fuzz(func(t *testing.T, text string) {
		s, err := conftest.ParseScript([]byte(text))
		if err != nil {
			if !errors.Is(err, conftest.ErrShape) {
				t.Errorf("ParseScript = %v; want %v", err, conftest.ErrShape)
			}
			return
		}
		if one, err := s.Question("x"); err == nil != s.Knows("x") && !errors.Is(err, conftest.ErrShape) {
			t.Errorf("Question = %q, %v", one, err)
		}
	})
}

func FuzzParsePlan(f *testing.F) {
	f.Add(plan)
	f.Fuzz(func(t *testing.T, text string) {
		p, err := conftest.ParsePlan(text)
		if err != nil {
			return
		}
		for _, file := range p.Files(nil, nil, "", "") {
			if !filepath.IsLocal(file.Name) {
				t.Errorf("a plan makes the file %q", file.Name)
			}
		}
	})
}
