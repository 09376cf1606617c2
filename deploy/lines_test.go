package deploy_test

import (
	"go/scanner"
	"go/token"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// maxColumns is the length of the longest permitted line of Go and Markdown, in characters. A tab is one character.
const maxColumns = 120

// unbreakable matches a link or an address, which must not be broken.
var unbreakable = regexp.MustCompile(`\S{80,}|://`)

// TestLineLength refuses long lines. It ignores lines that must not be broken: raw strings, Markdown's tables and code
// blocks, and addresses. It also ignores nolint directives, which apply only to their own line.
func TestLineLength(t *testing.T) {
	t.Parallel()
	for _, name := range files(t, ".go", ".md") {
		text := read(t, name)
		var free map[int]bool
		switch {
		case strings.HasSuffix(name, ".pb.go"):
			continue // generated
		case strings.HasSuffix(name, ".go"):
			free = rawLines(text)
		default:
			free = fixedLines(text)
		}
		for i, line := range strings.Split(text, "\n") {
			if n := utf8.RuneCountInString(line); n > maxColumns && !free[i+1] && !unbreakable.MatchString(line) {
				t.Errorf("%s:%d has %d columns; want %d at most", name, i+1, n, maxColumns)
			}
		}
	}
}

// TestLineLengthExceptions checks which lines TestLineLength ignores.
func TestLineLengthExceptions(t *testing.T) {
	t.Parallel()
	source := "package a\n\nvar a = `\nraw\n`\nvar b = 1 //nolint:x // why\nvar c = \"`\"\n"
	if got := rawLines(source); len(got) != 4 || !got[3] || !got[4] || !got[5] || !got[6] {
		t.Errorf("rawLines() = %v; want lines 3 to 6", got)
	}
	page := "text\n| a |\n```\ncode\n```\n# head\n"
	if got := fixedLines(page); len(got) != 5 || got[1] {
		t.Errorf("fixedLines() = %v; want lines 2 to 6", got)
	}
}

// rawLines returns the lines of a Go file that contain part of a raw string or a nolint directive.
func rawLines(text string) map[int]bool {
	found := map[int]bool{}
	file := token.NewFileSet().AddFile("", -1, len(text))
	var s scanner.Scanner
	s.Init(file, []byte(text), nil, scanner.ScanComments)
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return found
		}
		raw := tok == token.STRING && lit[0] == '`'
		if !raw && (tok != token.COMMENT || !strings.HasPrefix(lit, "//nolint")) {
			continue
		}
		first := file.Line(pos)
		for i := range strings.Count(lit, "\n") + 1 {
			found[first+i] = true
		}
	}
}

// fixedLines returns the lines of a Markdown file that cannot be broken: code blocks, tables and headings.
func fixedLines(text string) map[int]bool {
	found := map[int]bool{}
	code := false
	for i, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		fence := strings.HasPrefix(trimmed, "```")
		if fence || code || strings.HasPrefix(trimmed, "|") || strings.HasPrefix(trimmed, "#") {
			found[i+1] = true
		}
		if fence {
			code = !code
		}
	}
	return found
}
