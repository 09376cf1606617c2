package conftest

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Prefix is the beginning of a test's C program: its first include lines, and the conditions around them. Tests whose
// programs begin with the same headers can share one precompiled header.
type Prefix struct {
	// Lines are the program's lines after the preamble that the script puts before every program. Blanks at the start of
	// a line are removed, and empty lines are left out.
	Lines []string
	// Headers are the headers that the compiler reads for Lines, in order, such as "<linux/mm.h>". An include line within
	// a false condition adds no header.
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
// The argument headers is the content of headers.h, which defines the presence macros (NV_..._PRESENT) for the program.
// Prefixes evaluates conditions on these macros. It stops at the first line that is neither such a condition nor an
// include line.
//
// A test's text is shell code, but Prefixes reads the program in it as C. Callers must therefore compare the lines with
// the program that the shell makes from the text.
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

// OnlyHeaders returns a script with a single test, and the name of that test. After the script's preamble, the test's
// program consists of one include line for each of the headers. Callers run the test to make a precompiled header from
// the program. If the script has no function compile_check_conftest, or a header has an unknown form, the error is
// ErrShape.
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
