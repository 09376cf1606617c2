package conftest

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Prefix is the beginning of a test's C program: its first include lines, and the conditions around them. Tests with
// the same headers can share one precompiled header.
type Prefix struct {
	// Lines are the program's lines after the script's own preamble, without empty lines and leading blanks.
	Lines []string
	// Headers are the headers that the compiler reads for Lines, in order, such as "<linux/mm.h>". Includes within a false
	// condition are left out.
	Headers []string
}

var (
	programStart = regexp.MustCompile(`(?m)^[ \t]*(?:CODE="|echo "\$CONFTEST_PREAMBLE)`)
	includeLine  = regexp.MustCompile(`^#\s*include\s+(<[\w./-]+>)\s*$`)
	presentLine  = regexp.MustCompile(`^#\s*(if|elif)\s+defined\s*\(?\s*(NV_\w+_PRESENT)\s*\)?\s*$`)
	ifdefLine    = regexp.MustCompile(`^#\s*(ifdef|ifndef)\s+(NV_\w+_PRESENT)\s*$`)
	elseLine     = regexp.MustCompile(`^#\s*else\s*(?:/\*[^*]*\*/\s*)?$`)
	endifLine    = regexp.MustCompile(`^#\s*endif\s*(?:/\*[^*]*\*/\s*)?$`)
	defineLine   = regexp.MustCompile(`^#\s*define\s+(NV_\w+_PRESENT)\b`)
)

// Prefixes returns the beginnings of a test's first program: up to its first header, up to its second one, and so on.
// Its second argument is the content of headers.h, which defines the presence macros (NV_..._PRESENT). Prefixes
// evaluates conditions on these macros, and stops at any other line that is not an include.
//
// Prefixes reads the test's text as C, although it is shell code. Callers must compare the lines with the program that
// the shell makes of the text.
func (s *Script) Prefixes(test, headers string) []Prefix {
	text, _ := s.find(test)
	at := programStart.FindStringIndex(text)
	if at == nil {
		return nil
	}
	defined := map[string]bool{}
	for line := range strings.Lines(headers) {
		if m := defineLine.FindStringSubmatch(line); m != nil {
			defined[m[1]] = true
		}
	}
	type condition struct{ outer, taken, active bool }
	var (
		all    []Prefix
		now    Prefix
		nested []condition
		active = true
	)
	for line := range strings.Lines(text[at[1]:]) {
		line = strings.TrimLeft(strings.TrimRight(line, "\r\n"), " \t")
		if line == "" {
			continue
		}
		now.Lines = append(now.Lines, line)
		if m := includeLine.FindStringSubmatch(line); m != nil {
			if active {
				now.Headers = append(now.Headers, m[1])
				all = append(all, Prefix{slices.Clone(now.Lines), slices.Clone(now.Headers)})
			}
			continue
		}
		present := presentLine.FindStringSubmatch(line)
		about := ifdefLine.FindStringSubmatch(line)
		switch last := len(nested) - 1; {
		case present != nil && present[1] == "if":
			yes := defined[present[2]]
			nested = append(nested, condition{active, yes, yes})
		case about != nil:
			yes := defined[about[2]] == (about[1] == "ifdef")
			nested = append(nested, condition{active, yes, yes})
		case present != nil && last >= 0:
			c := &nested[last]
			c.active = !c.taken && defined[present[2]]
			c.taken = c.taken || c.active
		case elseLine.MatchString(line) && last >= 0:
			c := &nested[last]
			c.active, c.taken = !c.taken, true
		case endifLine.MatchString(line) && last >= 0:
			active, nested = nested[last].outer, nested[:last]
			continue
		default:
			return all
		}
		c := nested[len(nested)-1]
		active = c.outer && c.active
	}
	return all
}

const checkFunction = "\ncompile_check_conftest() {\n"

// OnlyHeaders returns a script with a single test, and the name of that test. The test's program only includes the
// given headers. Callers run the test to make a precompiled header. If the script or a header has an unknown format,
// the error is ErrShape.
func (s *Script) OnlyHeaders(headers []string) (script []byte, test string, err error) {
	if !strings.Contains(s.head, checkFunction) && !strings.Contains(s.tail, checkFunction) {
		return nil, "", fmt.Errorf("%w: the script has no function compile_check_conftest", ErrShape)
	}
	const name = "prebake_headers"
	var text strings.Builder
	fmt.Fprintf(&text, "        %s)\n            compile_check_conftest \"", name)
	for _, h := range headers {
		if !includeLine.MatchString("#include " + h) {
			return nil, "", fmt.Errorf("%w: %q is not a header name in angle brackets", ErrShape, h)
		}
		fmt.Fprintf(&text, "#include %s\n", h)
	}
	text.WriteString("\" \"NV_PREBAKE_HEADERS\" \"\" \"types\"\n        ;;\n")
	return []byte(s.head + beginTests + text.String() + noOther + endTests + s.tail), name, nil
}

// VisibleToAll returns the part of headers.h that every test's program may see.
func (a *Keyer) VisibleToAll(headers string) string { return a.Visible("", headers) }
