package compile

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/testkit/program"
)

// fakeClang is a script that stands for clang. It logs its arguments, and writes an object and a dependency list in
// clang's order. A file that contains "bad" does not compile. A source that contains "late" compiles only without a
// precompiled header.
const fakeClang = `#!/bin/sh
echo "$*" >>@LOG@
for arg; do
	case $last in -o) out=$arg ;; -include-pch) pch=$arg ;; esac
	case $arg in -Wp,-MMD,*) dep=${arg#-Wp,-MMD,} ;; c-header) header=yes ;; esac
	last=$arg
done
if [ "$header" ]; then
	grep -q bad "$last" && exit 1
	echo compiled >"$out"
	exit
fi
echo "warning of $last" >&2
grep -q bad "$last" && { echo "error in $last" >&2; exit 1; }
[ "$pch" ] && grep -q late "$last" && exit 1
if [ "$pch" ]; then
	printf 'x.o: %s \\\n %s \\\n /kernel/include/linux/x.h /src/m/base.h \\\n /kernel/include/linux/y.h %s \\\n /src/m/way.h /src/m/more.h\n' "${pch%-*}.h" "$pch" "$last" >"$dep"
else
	echo plain >"$dep"
fi
echo "object of $last" >"$out"
`

// setUp writes sources, the text of precompiled headers, and the builder's wrapper script around the compiler. compile
// runs the wrapper as kbuild would.
func setUp(t *testing.T, preamble, source string) (compile func(name string, more ...string) (said string, err error),
	calls func() []string, dir string) {
	t.Helper()
	dir = t.TempDir()
	log := filepath.Join(dir, "log")
	for path, text := range map[string]string{
		"src/m/a.c": source, "src/m/b.c": "int b;\n", "src/m/other.c": "int other;\n",
		"preambles/0.h":      preamble,
		"preambles/of/m/a.c": "0\n" + dir + "/first\n\n", "preambles/of/m/b.c": "0\n/src/m/base.h\n/src/m/way.h\n",
	} {
		if err := write(filepath.Join(dir, path), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	program.Write(t, filepath.Join(dir, "clang"), []byte(strings.ReplaceAll(fakeClang, "@LOG@", log)))
	script := strings.NewReplacer("@COMPILER@", filepath.Join(dir, "clang"), "@SOURCES@", dir+"/src", "@KERNEL@",
		"/kernel", "@PREAMBLES@", dir+"/preambles").Replace(pchScript)
	program.Write(t, filepath.Join(dir, "cc"), []byte(script))
	compile = func(name string, more ...string) (string, error) {
		args := []string{"-Wp,-MMD," + dir + "/" + name + ".d", "-DX", "-DKBUILD_BASENAME=\"" + name + "\""}
		args = append(append(args, more...), "-o", dir+"/"+name+".o", dir+"/src/m/"+name+".c")
		said, err := exec.CommandContext(t.Context(), filepath.Join(dir, "cc"), args...).CombinedOutput()
		return strings.ReplaceAll(string(said), dir, ""), err
	}
	calls = func() []string {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		var kinds []string
		for line := range strings.Lines(string(text)) {
			kind := "plain"
			if strings.Contains(line, "c-header") {
				kind = "preamble"
				for _, own := range []string{"KBUILD_BASENAME", "MMD", " -c ", ".c "} {
					if strings.Contains(line, own) {
						t.Errorf("a preamble is compiled with %s: %s", own, line)
					}
				}
			} else if strings.Contains(line, "-include-pch") {
				kind = "with it"
			}
			kinds = append(kinds, kind)
		}
		return kinds
	}
	return compile, calls, dir
}

func TestPreambleScript(t *testing.T) {
	t.Parallel()
	type step struct {
		name string
		more []string
		said string
		fail bool
	}
	c := []string{"-c"}
	warning := func(name string) string { return "warning of /src/m/" + name + ".c\n" }
	for name, tc := range map[string]struct {
		preamble, source string
		steps            []step
		calls            []string
	}{
		"made once": {"", "int a;",
			[]step{{name: "a", more: c, said: warning("a")}, {name: "b", more: c, said: warning("b")},
				{name: "other", more: c, said: warning("other")}},
			[]string{"preamble", "with it", "with it", "plain"}},
		"once for each set of flags": {"", "int a;",
			[]step{{name: "a", more: c, said: warning("a")}, {name: "b", more: []string{"-c", "-DY"}, said: warning("b")}},
			[]string{"preamble", "with it", "preamble", "with it"}},
		"it can't be compiled": {"bad", "int a;",
			[]step{{name: "a", more: c, said: warning("a")}, {name: "b", more: c, said: warning("b")}},
			[]string{"preamble", "plain", "plain"}},
		"a source can't": {"", "bad", []step{{name: "a", more: c, said: warning("a") + "error in /src/m/a.c\n", fail: true}},
			[]string{"preamble", "with it", "plain"}},
		"a source can't with it": {"", "late", []step{{name: "a", more: c, said: warning("a")}},
			[]string{"preamble", "with it", "plain"}},
		"the preprocessor alone": {"", "int a;", []step{{name: "a", more: []string{"-E"}, said: warning("a")}},
			[]string{"plain"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			compile, calls, dir := setUp(t, tc.preamble, tc.source)
			for _, s := range tc.steps {
				said, err := compile(s.name, s.more...)
				if said != s.said || (err != nil) != s.fail {
					t.Errorf("%s: %v, said %q; want %q", s.name, err, said, s.said)
				}
				if text, err := os.ReadFile(filepath.Join(dir, s.name+".o")); !s.fail &&
					(err != nil || !strings.HasPrefix(string(text), "object of ")) {
					t.Errorf("%s.o: %q, %v", s.name, text, err)
				}
			}
			if diff := cmp.Diff(tc.calls, calls()); diff != "" {
				t.Errorf("the compiler is called (-want +got):\n%s", diff)
			}
		})
	}
}

// TestPreamblesLeftOut has a source file that is too large to read. The build must go on without precompiled headers.
func TestPreamblesLeftOut(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	b := &build{r: Request{WorkDir: t.TempDir()}, t: tools{clang: true, compiler: insideToolchain + "/bin/clang"},
		src: t.TempDir()}
	b.box.Env = map[string]string{"PATH": "/bin"}
	b.watch = newWatch(&log, func(string, int, int) {}, work{}, time.Now)
	large := filepath.Join(b.src, "m", "large.c")
	if err := write(large, "int large;\n", 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 9<<20); err != nil {
		t.Fatal(err)
	}
	box, err := b.precompile(b.box)
	if err := errors.Join(err, b.watch.close(false)); err != nil {
		t.Fatal(err)
	}
	if box.Env["PATH"] != "/bin" || len(box.Binds) != 0 || !strings.Contains(log.String(), "no precompiled headers: ") {
		t.Errorf("PATH %q, binds %v, log %q; want them as they were, and a word in the log", box.Env["PATH"], box.Binds,
			log.String())
	}
}

// TestPreambleDependencies checks the dependency list of a source that is compiled with a precompiled header. It must
// have the order of a plain compilation, because modpost's checksums of sources depend on this order.
func TestPreambleDependencies(t *testing.T) {
	t.Parallel()
	compile, _, dir := setUp(t, "", "int a;")
	if said, err := compile("b", "-c"); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	text, err := os.ReadFile(filepath.Join(dir, "b.d"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"x.o:", dir + "/src/m/b.c", "include/linux/x.h", "/src/m/way.h", "/src/m/base.h", "include/linux/y.h",
		"/src/m/more.h"}
	if diff := cmp.Diff(want, strings.Fields(strings.ReplaceAll(string(text), "\\\n", ""))); diff != "" {
		t.Errorf("dependencies differ (-want +got):\n%s", diff)
	}
}
