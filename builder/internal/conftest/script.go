package conftest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"regexp"
	"strings"
)

// Script is the parsed conftest.sh of a driver. Its function compile_test consists of one case statement. Each stanza
// is a compile test, and all other text is common to all tests.
type Script struct {
	head, tail string // the text before and after the stanzas
	stanzas    []stanza
	// oneHeader is true if one call tests one header, as in scripts since 515.76. One call of an older script tests all
	// headers in the script's own list.
	oneHeader bool
}

// frame returns the script without its stanzas.
func (s *Script) frame() string { return s.head + beginTests + endTests + s.tail }

type stanza struct {
	patterns []string
	text     string
}

var (
	stanzaHead = regexp.MustCompile(`^\s*([A-Za-z0-9_]+\*?(?:\s*\|\s*[A-Za-z0-9_]+\*?)*)\)\s*$`)
	innerCase  = regexp.MustCompile(`^\s*case\s.*\sin\s*$`)
)

// These constants are text of conftest.sh in NVIDIA's releases, by which ParseScript finds the parts of a script.
const (
	beginTests = "\ncompile_test() {\n    case \"$1\" in\n"
	endTests   = "\n    esac\n}\n"
	testLoop   = "        for i in $*; do compile_test $i; done\n"
	testMode   = "\n    compile_tests)\n"

	headerMode     = "\n    test_kernel_header)\n"
	headerModeAll  = "\n    test_kernel_headers)\n"
	answersAnother = "compile_test " // a test with this text calls another test
)

// ParseScript parses a conftest.sh. If its format is unknown, the error is ErrShape.
func ParseScript(text []byte) (*Script, error) {
	s := &Script{}
	all := string(text)
	for _, part := range []string{beginTests, testLoop, testMode} {
		if strings.Count(all, part) != 1 {
			return nil, fmt.Errorf("%w: the script does not contain %q exactly once", ErrShape, strings.TrimSpace(part))
		}
	}
	head, body, _ := strings.Cut(all, beginTests)
	body, tail, found := strings.Cut(body, endTests)
	if !found {
		return nil, fmt.Errorf("%w: the script has no line that ends its tests", ErrShape)
	}
	s.head, s.tail = head, tail
	switch one, every := strings.Contains(all, headerMode), strings.Contains(all, headerModeAll); {
	case one == every:
		return nil, fmt.Errorf(
			"%w: the script has both or none of the modes test_kernel_header and test_kernel_headers; want one", ErrShape)
	default:
		s.oneHeader = one
	}
	var now *stanza // nil between stanzas
	for line := range strings.Lines(body + "\n") {
		bare := strings.TrimSpace(line)
		switch {
		case now == nil && (bare == "" || strings.HasPrefix(bare, "#")):
		case now == nil && bare == "*)":
			now = &stanza{patterns: []string{"*"}}
		case now == nil:
			m := stanzaHead.FindStringSubmatch(line)
			if m == nil {
				return nil, fmt.Errorf("%w: the line %.80q is outside of a test, and does not begin one", ErrShape, bare)
			}
			now = &stanza{}
			for p := range strings.SplitSeq(m[1], "|") {
				now.patterns = append(now.patterns, strings.TrimSpace(p))
			}
		case bare == ";;":
			s.stanzas = append(s.stanzas, *now)
			now = nil
		case innerCase.MatchString(line):
			return nil, fmt.Errorf("%w: a test contains a case statement, which Prebake cannot parse", ErrShape)
		}
		if now != nil {
			now.text += line
		}
	}
	if now != nil || len(s.stanzas) == 0 {
		return nil, fmt.Errorf("%w: the script has no test, or its last test has no end", ErrShape)
	}
	return s, nil
}

// find returns the text of the stanza for a test.
func (s *Script) find(test string) (string, bool) {
	for _, st := range s.stanzas {
		for _, p := range st.patterns {
			if p == "*" {
				return "", false // this stanza prints "unknown test" and ends the script
			}
			if ok, err := path.Match(p, test); err == nil && ok {
				return st.text, true
			}
		}
	}
	return "", false
}

// Knows reports whether the script has a stanza for a test.
func (s *Script) Knows(test string) bool {
	_, ok := s.find(test)
	return ok
}

// These constants are the script's modes. The mode is the script's fifth argument.
const (
	ModeTest    = "compile_tests"       // the next arguments are the flags and the test's name
	ModeHeader  = "test_kernel_header"  // the next arguments are the flags and the header's name
	ModeHeaders = "test_kernel_headers" // the next argument is the flags
	ModePatches = "patch_check"         // no further arguments
)

// contains reports whether a word occurs anywhere in the script.
func (s *Script) contains(word string) bool {
	for _, st := range s.stanzas {
		if strings.Contains(st.text, word) {
			return true
		}
	}
	return strings.Contains(s.frame(), word)
}

// OneHeader reports whether one call of the script tests one header, not all headers in the script's own list.
func (s *Script) OneHeader() bool { return s.oneHeader }

// Question returns a script with only the given compile test. For "", the script has no compile test. Callers run the
// returned script instead of the whole one, because [Keyer.CacheKey] and [Keyer.TestKey] together cover its text. If
// the script lacks the test, or the test calls another test, the error is ErrShape.
func (s *Script) Question(test string) ([]byte, error) {
	text := ""
	if test != "" {
		var ok bool
		if text, ok = s.find(test); !ok {
			return nil, fmt.Errorf("%w: the script has no test %s", ErrShape, test)
		}
		if strings.Contains(text, answersAnother) {
			return nil, fmt.Errorf("%w: the test %s runs another test", ErrShape, test)
		}
		text += "        ;;\n"
	}
	return []byte(s.head + beginTests + text + noOther + endTests + s.tail), nil
}

// noOther is the last stanza of the scripts that this package makes. It ends the script with an error for a missing
// test.
const noOther = "        *) exit 1\n        ;;"

func digest(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
