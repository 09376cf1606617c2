package conftest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"regexp"
	"strings"
)

// Script is a driver's conftest.sh, taken apart: compile tests are stanzas of
// one case statement, everything else is common to all.
type Script struct {
	text    []byte
	rest    string // all but the stanzas
	stanzas []stanza
}

type stanza struct {
	patterns []string
	text     string
}

var (
	stanzaHead = regexp.MustCompile(`^\s*([A-Za-z0-9_]+\*?(?:\s*\|\s*[A-Za-z0-9_]+\*?)*)\)\s*$`)
	innerCase  = regexp.MustCompile(`^\s*case\s.*\sin\s*$`)
)

const (
	beginTests = "\ncompile_test() {\n    case \"$1\" in\n"
	endTests   = "\n    esac\n}\n"
	testLoop   = "        for i in $*; do compile_test $i; done\n"
	testMode   = "\n    compile_tests)\n"
)

// ParseScript takes a conftest.sh apart, or returns ErrShape.
func ParseScript(text []byte) (*Script, error) {
	s := &Script{text: text}
	all := string(text)
	for _, part := range []string{beginTests, testLoop, testMode} {
		if strings.Count(all, part) != 1 {
			return nil, fmt.Errorf("%w: %q is not in the script once", ErrShape, strings.TrimSpace(part))
		}
	}
	head, body, _ := strings.Cut(all, beginTests)
	body, tail, found := strings.Cut(body, endTests)
	if !found {
		return nil, fmt.Errorf("%w: the tests have no end", ErrShape)
	}
	s.rest = head + beginTests + endTests + tail
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
				return nil, fmt.Errorf("%w: %.80q begins no test", ErrShape, bare)
			}
			now = &stanza{}
			for p := range strings.SplitSeq(m[1], "|") {
				now.patterns = append(now.patterns, strings.TrimSpace(p))
			}
		case bare == ";;":
			s.stanzas = append(s.stanzas, *now)
			now = nil
		case innerCase.MatchString(line):
			return nil, fmt.Errorf("%w: a case within a test", ErrShape)
		}
		if now != nil {
			now.text += line
		}
	}
	if now != nil || len(s.stanzas) == 0 {
		return nil, fmt.Errorf("%w: a test without an end", ErrShape)
	}
	return s, nil
}

// find returns the text of the stanza that answers a test.
func (s *Script) find(test string) (string, bool) {
	for _, st := range s.stanzas {
		for _, p := range st.patterns {
			if p == "*" {
				return "", false // says "unknown test" and ends the script
			}
			if ok, err := path.Match(p, test); err == nil && ok {
				return st.text, true
			}
		}
	}
	return "", false
}

// Knows reports whether the script answers a test.
func (s *Script) Knows(test string) bool {
	_, ok := s.find(test)
	return ok
}

// Batch returns a script that answers many questions in one shell: with
// compile_tests each answer goes to out/tests/NAME, and prebake_headers is
// test_kernel_header for many. A question still has a shell's state to itself.
func (s *Script) Batch(out string) []byte {
	batch := bytes.Replace(s.text, []byte(testLoop),
		[]byte("        for i in $*; do echo \" CONFTEST: $i\"; ( compile_test $i ) > \""+out+"/tests/$i\"; done\n"), 1)
	return bytes.Replace(batch, []byte(testMode), []byte(`
    prebake_headers)
        shift 5
        CFLAGS=$1
        shift
        for i in $*; do
            echo " CONFTEST: $i"
            mkdir -p "`+out+`/headers/${i%/*}"
            ( test_header_presence "$i" ) > "`+out+`/headers/$i"
        done
        exit 0
    ;;
`+testMode[1:]), 1)
}

func digest(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
