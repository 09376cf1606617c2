package pch

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

// kernel returns #include lines for minWeight kernel headers, the fewest that are worth a precompiled header.
func kernel() string {
	var b strings.Builder
	for i := range minWeight {
		fmt.Fprintf(&b, "#include <linux/h%d.h>\n", i)
	}
	return b.String()
}

func header(name, rest string) string {
	return fmt.Sprintf("/* a license */\n#ifndef __%s_H__\n#define __%s_H__\n%s\n#endif // __%s_H__\n", name, name, rest,
		name)
}

func find(t *testing.T, files map[string]string) []Header {
	t.Helper()
	tree := fstest.MapFS{}
	for name, text := range files {
		tree[name] = &fstest.MapFile{Data: []byte(text)}
	}
	all, err := Find(tree, "/src")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// four adds four sources with the same text: m/NAME0.c to m/NAME3.c.
func four(files map[string]string, name, text string) map[string]string {
	for i := range 4 {
		files[fmt.Sprintf("m/%s%d.c", name, i)] = text + fmt.Sprintf("\nint %s%d;\n", name, i)
	}
	return files
}

func TestFind(t *testing.T) {
	t.Parallel()
	base := func(more ...string) map[string]string {
		files := map[string]string{"m/base.h": header("BASE", kernel()+"typedef int base;")}
		for i := 0; i < len(more); i += 2 {
			files[more[i]] = more[i+1]
		}
		return files
	}
	const wanted = "#include \"/src/m/base.h\"\n"
	for name, c := range map[string]struct {
		files map[string]string
		texts []string
	}{
		"the same first header": {four(base(), "a", `#include "base.h"`), []string{wanted}},
		"behind comments": {four(base(), "a", "// one\n/* two\n */\n\n# include   \"base.h\" /* three */"),
			[]string{wanted}},
		"a definition first": {four(base(), "a", "#define NO_VERSION\n#include \"base.h\""),
			[]string{"#define NO_VERSION\n" + wanted}},
		"by way of another header": {four(base("m/way.h", header("WAY", "#include \"base.h\"\nstruct way;")), "a",
			`#include "way.h"`), []string{wanted}},
		"a header where every module looks": {four(map[string]string{"common/inc/base.h": header("BASE", kernel())}, "a",
			`#include "base.h"`), []string{"#include \"/src/common/inc/base.h\"\n"}},
		"a kernel's header first": {four(base(), "a", "#include <linux/x.h>\n#include \"base.h\""),
			[]string{"#include <linux/x.h>\n" + wanted}},

		"too few": {map[string]string{"m/base.h": header("BASE", kernel()),
			"m/a.c": `#include "base.h"`, "m/b.c": `#include "base.h"`, "m/c.c": `#include "base.h"`}, nil},
		"not worth it": {four(map[string]string{"m/base.h": header("BASE", "#include <linux/x.h>")}, "a",
			`#include "base.h"`), nil},
		"code first":        {four(base(), "a", "int early;\n#include \"base.h\""), nil},
		"a condition first": {four(base(), "a", "#if defined(X)\n#include \"base.h\"\n#endif"), nil},
		"a definition over two lines": {four(base(), "a", "#define X \\\n  1\n#include \"base.h\""),
			[]string{"#define X   1\n" + wanted}},
		"a condition over two lines": {four(base("m/way.h", header("WAY", "#include \"base.h\""), "m/base.h",
			header("BASE", kernel()+"#if defined(X) || \\\n  defined(__WAY_H__)\nint way;\n#endif")), "a", `#include "way.h"`),
			[]string{"#include \"/src/m/way.h\"\n"}},
		"what a header includes computed": {four(base("m/base.h",
			header("BASE", kernel()+"#define N <linux/x.h>\n#include N\n")), "a", `#include "base.h"`), nil},
		"a computed name": {four(base(), "a", "#include NAME\n#include \"base.h\""), nil},
		"two headers of that name": {four(base("common/inc/base.h", header("OTHER", kernel())), "a",
			`#include "base.h"`), nil},
		"a way out of the tree":      {four(base(), "a", `#include "../m/base.h"`), nil},
		"a header that is not there": {four(base(), "a", "#include \"nowhere.h\"\n#include \"base.h\""), nil},
		"modules that are not below": {map[string]string{"base.h": header("BASE", kernel()), "a.c": `#include "base.h"`,
			"b.c": `#include "base.h"`, "c.c": `#include "base.h"`, "d.c": `#include "base.h"`}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var texts []string
			for _, p := range find(t, c.files) {
				texts = append(texts, p.Text)
				if len(p.Sources) != 4 || p.Sources[0].Path != "m/a0.c" {
					t.Errorf("sources of %q: %v", p.Text, p.Sources)
				}
			}
			if diff := cmp.Diff(c.texts, texts); diff != "" {
				t.Errorf("precompiled headers differ (-want +got):\n%s", diff)
			}
		})
	}
}

// TestThrough has sources that include base.h through two other headers, one.h and two.h. They may share a precompiled
// base.h only if it does not matter whether the compiler reads base.h before the rest.
func TestThrough(t *testing.T) {
	t.Parallel()
	ways := func(one, base string) map[string]string {
		files := map[string]string{"m/base.h": header("BASE", kernel()+base), "m/one.h": one,
			"m/two.h": header("TWO", "#include \"base.h\"\nint two;")}
		for i := range 3 {
			files[fmt.Sprintf("m/a%d.c", i)] = `#include "one.h"`
			files[fmt.Sprintf("m/b%d.c", i)] = `#include "two.h"`
		}
		return files
	}
	one := header("ONE", "#include \"base.h\"\nint one;")
	got := find(t, ways(one, ""))
	if len(got) != 1 || len(got[0].Sources) != 6 || got[0].Text != "#include \"/src/m/base.h\"\n" {
		t.Fatalf("got %+v; want one precompiled header for six sources", got)
	}
	want := Source{Path: "m/a0.c", Through: []string{"/src/m/one.h"}, First: "/src/m/base.h"}
	if diff := cmp.Diff(want, got[0].Sources[0]); diff != "" {
		t.Errorf("the first source differs (-want +got):\n%s", diff)
	}
	for name, files := range map[string]map[string]string{
		"the header asks for the way":      ways(one, "#ifdef __ONE_H__\nint asked;\n#endif"),
		"the header leads back to the way": ways(one, "#include \"one.h\""),
		"the way has no guard":             ways("#include \"base.h\"\nint one;", ""),
		"the way's guard ends early": ways("#ifndef __ONE_H__\n#define __ONE_H__\n#include "+
			"\"base.h\"\n#endif\nint one;", ""),
		"the way says something first": ways(header("ONE", "int one;\n#include \"base.h\""), ""),
	} {
		if got := find(t, files); len(got) != 0 {
			t.Errorf("%s: %+v; want no precompiled header", name, got)
		}
	}
}

func FuzzFind(f *testing.F) {
	f.Add("#define A\n#include \"base.h\"\n", header("BASE", kernel()))
	f.Add("/* \"", "'\\")
	f.Add("#include \"m/../m/base.h\"", "#include \"base.h\"")
	f.Fuzz(func(t *testing.T, source, header string) {
		tree := fstest.MapFS{"m/base.h": &fstest.MapFile{Data: []byte(header)}}
		for i := range minSources {
			tree[fmt.Sprintf("m/%d.c", i)] = &fstest.MapFile{Data: []byte(source)}
		}
		all, err := Find(tree, "/src")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			for line := range strings.Lines(p.Text) {
				if _, ok := parseDirective(strings.TrimSuffix(line, "\n")); !ok {
					t.Errorf("the precompiled header has the line %q; want only includes and definitions", line)
				}
			}
		}
	})
}
