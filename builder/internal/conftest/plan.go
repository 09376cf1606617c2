// Package conftest reads NVIDIA's conftest.sh, the script that finds out which interfaces a kernel has. Each of its
// tests checks one fact, such as whether a header exists. The result of a test is the text that the script prints:
// #define and #undef lines. In the package's names, a question is a test and an answer is its result. The package
// reports:
//   - which tests a driver runs on a kernel,
//   - what decides each result,
//   - in which files `make` expects the results.
//
// The builder stores the results in the conftest cache by kernel view and compiler. A kernel view is a kernel's header
// tree without the parts that differ between sibling kernels (see builder/internal/compile/view.go). So a sibling
// kernel, and the next driver of a branch, reuse the results.
//
// The package never guesses. If the format of a script or a plan is unknown, it returns [ErrShape], and its caller lets
// `make` run the tests. The package runs no program; builder/internal/compile runs conftest.sh.
package conftest

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// ErrShape means that a script or a plan has a format that this package does not know.
var ErrShape = errors.New("conftest.sh has an unknown form")

// categories returns the categories of compile tests. For each category, `make` concatenates the results into one
// header, such as functions.h.
func categories() []string { return []string{"functions", "generic", "macros", "symbols", "types"} }

// Plan has the tests of conftest.sh that a driver's Kbuild file runs, and the arguments of the script.
type Plan struct {
	// CC, Arch, Sources and Output are the script's first four arguments.
	CC, Arch, Sources, Output string
	// Flags is the expanded value of NV_CONFTEST_CFLAGS. CFlags is NV_CFLAGS_FROM_CONFTEST, the part of Flags that the
	// script adds itself.
	Flags, CFlags string
	// Headers are the headers whose presence is tested, in the order of the Kbuild file. A header may occur twice.
	Headers []string
	// Tests has the compile tests of each category, in the order of the Kbuild file. A test may occur twice.
	Tests map[string][]string
}

// planVariables are the lines of a plan, in order. A line is the name, a blank, and the value of the expression.
var planVariables = []struct{ name, expression string }{
	{"cc", "$(strip $(CC))"},
	{"arch", "$(ARCH)"},
	{"sources", "$(NV_KERNEL_SOURCES)"},
	{"output", "$(NV_KERNEL_OUTPUT)"},
	{"flags", "$(NV_CONFTEST_CFLAGS)"},
	{"cflags", "$(NV_CFLAGS_FROM_CONFTEST)"},
	{"headers", "$(NV_HEADER_PRESENCE_TESTS)"},
	{"functions", "$(NV_CONFTEST_FUNCTION_COMPILE_TESTS)"},
	{"generic", "$(NV_CONFTEST_GENERIC_COMPILE_TESTS)"},
	{"macros", "$(NV_CONFTEST_MACRO_COMPILE_TESTS)"},
	{"symbols", "$(NV_CONFTEST_SYMBOL_COMPILE_TESTS)"},
	{"types", "$(NV_CONFTEST_TYPE_COMPILE_TESTS)"},
}

// PlanRules returns makefile text for the end of a driver's Kbuild file. With it, `make` runs the driver's sanity
// checks, writes the plan to the given file, and stops before the first test. The rules add a prerequisite to
// conftest/uts_release, which `make` makes before every header with results. This order is in NVIDIA's releases from
// 515.43.04 to 595.45.04, and in Debian's edition of them.
func PlanRules(file string) string {
	var b strings.Builder
	b.WriteString("\n$(obj)/conftest/uts_release: prebake-plan\n.PHONY: prebake-plan\nprebake-plan: " +
		"$(BUILD_SANITY_CHECKS)\n")
	for i, v := range planVariables {
		arrow := ">>"
		if i == 0 {
			arrow = ">"
		}
		fmt.Fprintf(&b, "\t$(file %s%s,%s %s)\n", arrow, file, v.name, v.expression)
	}
	b.WriteString("\t@false\n")
	return b.String()
}

var (
	testName   = regexp.MustCompile(`^[A-Za-z0-9_]{1,200}$`)
	headerName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$`)
	word       = regexp.MustCompile(`^[A-Za-z0-9_./+-]+$`)
)

// ParsePlan parses the text that `make` wrote with [PlanRules]. If its format is unknown, the error is ErrShape.
func ParsePlan(text string) (*Plan, error) {
	p := &Plan{Tests: map[string][]string{}}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != len(planVariables) {
		return nil, fmt.Errorf("%w: make's list of conftest.sh's tests has %d lines; want %d lines", ErrShape, len(lines),
			len(planVariables))
	}
	for i, v := range planVariables {
		name, value, _ := strings.Cut(lines[i], " ")
		if name != v.name {
			return nil, fmt.Errorf("%w: line %d of make's list of conftest.sh's tests begins with %q; want %q", ErrShape, i+1,
				name, v.name)
		}
		switch name {
		case "cc":
			p.CC = value
		case "arch":
			p.Arch = value
		case "sources":
			p.Sources = value
		case "output":
			p.Output = value
		case "flags":
			// `make` puts the flags between quotes for the shell.
			if strings.ContainsAny(value, "'\x00") {
				return nil, fmt.Errorf("%w: the compiler flags for conftest.sh contain a quotation mark or a zero byte", ErrShape)
			}
			p.Flags = value
		case "cflags":
			p.CFlags = value
		case "headers":
			p.Headers = strings.Fields(value)
		default:
			p.Tests[name] = strings.Fields(value)
		}
	}
	for _, w := range []string{p.CC, p.Arch, p.Sources, p.Output} {
		if !word.MatchString(w) {
			return nil, fmt.Errorf("%w: make passes the argument %q to conftest.sh; want one plain word", ErrShape, w)
		}
	}
	for _, h := range p.Headers {
		if !headerName.MatchString(h) {
			return nil, fmt.Errorf("%w: %q in make's list of headers is not a header name", ErrShape, h)
		}
	}
	for _, t := range p.All() {
		if !testName.MatchString(t) {
			return nil, fmt.Errorf("%w: %q in make's list of conftest.sh's tests is not a test name", ErrShape, t)
		}
	}
	if len(p.All()) == 0 { // releases before 515.76 list no headers
		return nil, fmt.Errorf("%w: make's list of conftest.sh's tests has no test", ErrShape)
	}
	return p, nil
}

// All returns every compile test once, sorted by name.
func (p *Plan) All() []string {
	var all []string
	for _, c := range categories() {
		all = append(all, p.Tests[c]...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// unique removes repetitions, as `make`'s variable $^ does.
func unique(list []string) []string {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool {
		was := seen[s]
		seen[s] = true
		return was
	})
}

// Files returns the files that `make` would write to the folder conftest/. The caller must write them in this order: no
// file may be older than the files from which `make` makes it.
//
// The two maps have the results by the name of the header or test. If the plan has no headers, headers[""] is the whole
// content of headers.h. The other arguments are the script's output for [ModePatches] and for the test uts_release.
func (p *Plan) Files(headers, tests map[string]string, patches, release string) []File {
	version := "// Kernel version: " + strings.TrimRight(release, "\n") + "\n"
	files := []File{{"uts_release", version}, {"patches.h", patches}}
	var all strings.Builder
	for _, h := range unique(p.Headers) {
		files = append(files, File{"header_presence/" + h + ".part", headers[h]})
		all.WriteString(headers[h])
	}
	if len(p.Headers) == 0 {
		files = append(files, File{"headers.h", headers[""]})
	} else {
		files = append(files, File{"headers.h", all.String() + version})
	}
	for _, t := range p.All() {
		files = append(files, File{"compile-tests/" + t + ".h", tests[t]})
	}
	for _, c := range categories() {
		all.Reset()
		for _, t := range unique(p.Tests[c]) {
			all.WriteString(tests[t])
		}
		files = append(files, File{c + ".h", all.String() + version})
	}
	return files
}

// File is one file of the folder conftest/. Name is its slash path in that folder.
type File struct{ Name, Text string }
