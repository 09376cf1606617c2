package deploy_test

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"mvdan.cc/sh/v3/syntax"

	"github.com/prebake/prebake/deploy/internal/page"
)

// programsOfPages are the programs whose help is in docs/reference.
var programsOfPages = []string{"builder", "server", "fetcher", "mirror"}

// flagsOf returns the flags of each command, such as "builder build", from the pages in docs/reference.
func flagsOf(t *testing.T) map[string]map[string]bool {
	t.Helper()
	flagNames := regexp.MustCompile(`(?m)^ +(--?[a-z0-9-]+(?:, --?[a-z0-9-]+)*)\b`)
	all := map[string]map[string]bool{}
	for _, program := range programsOfPages {
		p := page.Parse([]byte(read(t, "docs/reference/"+program+".md")))
		for _, b := range p.Blocks {
			name, _, _ := strings.Cut(b.Text, " - ")
			all[name] = map[string]bool{}
			for _, m := range flagNames.FindAllStringSubmatch(b.Text, -1) {
				for f := range strings.SplitSeq(m[1], ", ") {
					all[name][f] = true
				}
			}
		}
		if !all[program]["--help"] {
			t.Fatalf("docs/reference/%s.md has no flags of %s: %v", program, program, all[program])
		}
	}
	return all
}

// checkShell parses a script and checks the calls of Prebake's programs in it. "…", which stands for omitted arguments,
// counts as a word.
func checkShell(script string, flags map[string]map[string]bool) (problems []string) {
	file, err := syntax.NewParser().Parse(strings.NewReader(script), "")
	if err != nil {
		return []string{err.Error()}
	}
	syntax.Walk(file, func(n syntax.Node) bool {
		if call, ok := n.(*syntax.CallExpr); ok {
			var words []string
			for _, w := range call.Args {
				words = append(words, literal(w))
			}
			problems = append(problems, checkCall(words, flags)...)
		}
		return true
	})
	return problems
}

// literal returns the text of a word up to the first expansion in it.
func literal(w *syntax.Word) string {
	var b strings.Builder
	for _, part := range w.Parts {
		switch part := part.(type) {
		case *syntax.Lit:
			b.WriteString(part.Value)
		case *syntax.SglQuoted:
			b.WriteString(part.Value)
		default:
			return b.String() + "\x00"
		}
	}
	return b.String()
}

// checkCall checks the flags in a call of one of the programs. Another program may run it: "kubectl exec POD -- fetcher
// status".
func checkCall(words []string, flags map[string]map[string]bool) (problems []string) {
	if len(words) == 0 {
		return nil
	}
	at := 0
	if first := path.Base(words[0]); first == "kubectl" || first == "docker" || first == "sudo" {
		at = max(0, slices.IndexFunc(words, func(w string) bool { return slices.Contains(programsOfPages, w) }))
	}
	name := path.Base(words[at])
	if !slices.Contains(programsOfPages, name) {
		return nil
	}
	words = words[at+1:]
	for len(words) > 0 && flags[name+" "+words[0]] != nil {
		name, words = name+" "+words[0], words[1:]
	}
	if len(words) > 0 && !slices.Contains(programsOfPages, name) {
		// If a command has subcommands, its next word must be one of the subcommands or a flag.
	} else if len(words) > 0 && !strings.HasPrefix(words[0], "-") && words[0] != "…" && words[0] != "completion" {
		problems = append(problems, name+" has no command "+words[0])
	}
	if len(words) > 0 && words[0] == "…" {
		return problems // "…" may stand for any command
	}
	for _, w := range words {
		f, _, _ := strings.Cut(w, "=")
		if w == "--" {
			break
		}
		if strings.HasPrefix(f, "-") && f != "-" && !flags[name][f] {
			problems = append(problems, name+" has no flag "+f)
		}
	}
	return problems
}

// TestPageCommands checks that commands in blocks and between backquotes are valid bash. Calls of Prebake's programs
// must use existing flags.
func TestPageCommands(t *testing.T) {
	t.Parallel()
	flags := flagsOf(t)
	checked := 0
	for name, p := range pages(t) {
		for _, b := range p.Blocks {
			if b.Language != "sh" && b.Language != "console" {
				continue
			}
			for _, c := range b.Commands() {
				checked++
				for _, problem := range checkShell(c.Text, flags) {
					t.Errorf("%s:%d: %s: %s", name, c.Line, strings.TrimSpace(c.Text), problem)
				}
			}
		}
		if name == "CHANGELOG.md" {
			continue // it describes former versions
		}
		for _, span := range p.Spans {
			program, _, _ := strings.Cut(span.Text, " ")
			if program != span.Text && slices.Contains(programsOfPages, path.Base(program)) {
				checked++
				for _, problem := range checkShell(span.Text, flags) {
					t.Errorf("%s:%d: %s: %s", name, span.Line, span.Text, problem)
				}
			}
		}
	}
	if checked < 100 {
		t.Errorf("%d commands of pages were checked; want more than 100: does the test read all pages?", checked)
	}
}

// TestReadmeCommandsAreRun checks that CI runs the commands that the README gives to a newcomer.
func TestReadmeCommandsAreRun(t *testing.T) {
	t.Parallel()
	ci, commands := read(t, ".ci/run"), 0
	for _, b := range page.Parse([]byte(read(t, "README.md"))).Blocks {
		for line := range strings.Lines(b.Text) {
			if command, _, _ := strings.Cut(line, " #"); b.Language == "sh" && strings.TrimSpace(command) != "" {
				commands++
				if step := "\nstep " + strings.TrimSpace(command) + "\n"; !strings.Contains(ci, step) {
					t.Errorf("README.md:%d: .ci/run has no step %q", b.Line, strings.TrimSpace(command))
				}
			}
		}
	}
	if commands != 2 {
		t.Errorf("README.md has %d commands to run; want 2", commands)
	}
}

// TestReadmeLength checks that the README is at most two screens long: 100 lines of 116 columns.
func TestReadmeLength(t *testing.T) {
	t.Parallel()
	lines := strings.Split(strings.TrimSuffix(read(t, "README.md"), "\n"), "\n")
	if len(lines) > 100 {
		t.Errorf("README.md has %d lines; want at most 100", len(lines))
	}
	for i, line := range lines {
		if n := utf8.RuneCountInString(line); n > 116 {
			t.Errorf("README.md:%d has %d columns; want at most 116", i+1, n)
		}
	}
}

func TestCheckShell(t *testing.T) {
	t.Parallel()
	flags := map[string]map[string]bool{
		"server": {"--help": true}, "server build": {"--log": true, "-o": true}, "server tokens": {},
		"server tokens list": {"--output": true},
	}
	for script, want := range map[string]string{
		"server build 12 --log -o json":                 "",
		"bin/server tokens list --output=json | x":      "",
		"x=$(server build --log) || server build":       "",
		"kubectl -n a exec POD -- server build":         "",
		"serving --any":                                 "",
		"server build --lag":                            "server build has no flag --lag",
		"for i in 1; do server tokens list --x=1; done": "server tokens list has no flag --x",
		"server bild 12":                                "server has no command bild",
		"kubectl exec POD -- server bild":               "server has no command bild",
		"if true":                                       "if",
	} {
		got := strings.Join(checkShell(script, flags), "; ")
		if (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("checkShell(%q) = %q; want %q", script, got, want)
		}
	}
}
