// Package conftest knows NVIDIA's conftest.sh: which questions a driver asks
// about a kernel, what decides each answer, and the files that make expects
// them in. Answers are stored in the conftest cache, by kernel view and compiler, so that a sibling kernel and the next
// driver of a branch ask only what is new.
//
// It refuses to guess: a script or a plan whose shape it does not know is
// [ErrShape], and its caller leaves the questions to make. It runs nothing;
// builder/internal/compile does.
package conftest

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// ErrShape says that a script or a makefile is not of the shape that this
// package understands.
var ErrShape = errors.New("conftest.sh has an unknown form")

// categories are the headers that make concatenates from compile tests.
func categories() []string { return []string{"functions", "generic", "macros", "symbols", "types"} }

// Plan is what a driver's Kbuild file asks of conftest.sh, and how.
type Plan struct {
	// CC, Arch, Sources and Output are the script's first four arguments.
	CC, Arch, Sources, Output string
	// Flags is NV_CONFTEST_CFLAGS, expanded, and CFlags NV_CFLAGS_FROM_CONFTEST,
	// the script's own part of it.
	Flags, CFlags string
	// Headers are the headers tested for presence, in order.
	Headers []string
	// Tests are the compile tests of each category, in order.
	Tests map[string][]string
}

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

// PlanRules is makefile text which, appended to a driver's Kbuild file, has the
// driver's sanity checks run, writes the plan to file, and stops make before the
// first question: make alone knows the flags, which the kernel's makefiles
// compose. It hangs on conftest/uts_release, which every header of answers
// depends on: so it is in NVIDIA's releases from 515.43.04 to 595.45.04, and in
// Debian's edition of them.
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

// ParsePlan reads what PlanRules wrote.
func ParsePlan(text string) (*Plan, error) {
	p := &Plan{Tests: map[string][]string{}}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != len(planVariables) {
		return nil, fmt.Errorf("%w: a plan of %d lines", ErrShape, len(lines))
	}
	for i, v := range planVariables {
		name, value, _ := strings.Cut(lines[i], " ")
		if name != v.name {
			return nil, fmt.Errorf("%w: plan line %q", ErrShape, name)
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
			// make puts them between quotes for the shell.
			if strings.ContainsAny(value, "'\x00") {
				return nil, fmt.Errorf("%w: flags with a quote", ErrShape)
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
			return nil, fmt.Errorf("%w: %q", ErrShape, w)
		}
	}
	for _, h := range p.Headers {
		if !headerName.MatchString(h) {
			return nil, fmt.Errorf("%w: header %q", ErrShape, h)
		}
	}
	for _, t := range p.All() {
		if !testName.MatchString(t) {
			return nil, fmt.Errorf("%w: test %q", ErrShape, t)
		}
	}
	if len(p.All()) == 0 { // releases before 515.76 name no headers
		return nil, fmt.Errorf("%w: no tests", ErrShape)
	}
	return p, nil
}

// All returns every compile test once, in order of name.
func (p *Plan) All() []string {
	var all []string
	for _, c := range categories() {
		all = append(all, p.Tests[c]...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// unique drops repetitions, as make's $^ does.
func unique(list []string) []string {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool {
		was := seen[s]
		seen[s] = true
		return was
	})
}

// Files returns what make would have left in the folder conftest/, by slash
// path and in an order in which each file is as new as those it is made of.
// headers, tests and patches are what the script printed, and release what it
// printed for uts_release. A plan without headers has the answer for "" in
// headers, which is all of headers.h.
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

// File is one file of the folder conftest/.
type File struct{ Name, Text string }
