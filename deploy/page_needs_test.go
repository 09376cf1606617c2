package deploy_test

import (
	"path"
	"slices"
	"strings"
	"testing"

	"mvdan.cc/sh/v3/syntax"
)

// missingFlags returns the flags that a call of the builder lacks, so that it does not do what the page says. Without
// --private, a destination counts as public, and the builder refuses to publish there. With --max-age, the builder
// compiles everything anew, so without --cache-size its caches fill the disk. variables has the environment variables
// that the page sets before the call.
func missingFlags(words []string, variables string) (missing []string) {
	if len(words) < 2 || path.Base(words[0]) != "builder" || words[1] != "build" && words[1] != "work" ||
		slices.Contains(words, "…") { // the reader adds flags
		return nil
	}
	has := func(flag string) bool {
		return strings.Contains(variables, "PREBAKE_"+strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))+"=") ||
			slices.ContainsFunc(words, func(w string) bool { return w == "--"+flag || strings.HasPrefix(w, "--"+flag+"=") })
	}
	to := ""
	if i := slices.Index(words, "--to"); i >= 0 && i+1 < len(words) {
		to = words[i+1]
	}
	private := strings.HasPrefix(to, "oci:") || strings.HasPrefix(to, "127.0.0.1:") || strings.HasPrefix(to, "\x00")
	if to != "" && !private && !has("private") {
		missing = append(missing, "--private")
	}
	if has("max-age") && !has("cache-size") {
		missing = append(missing, "--cache-size")
	}
	return missing
}

// TestPagesGiveNeededFlags checks the builder's commands in the blocks of all pages.
func TestPagesGiveNeededFlags(t *testing.T) {
	t.Parallel()
	checked := 0
	for name, p := range pages(t) {
		var variables strings.Builder
		for _, b := range p.Blocks {
			if b.Language != "sh" && b.Language != "console" {
				continue
			}
			for _, c := range b.Commands() {
				if strings.Contains(c.Text, "export ") {
					variables.WriteString(c.Text)
				}
				file, err := syntax.NewParser().Parse(strings.NewReader(c.Text), "")
				if err != nil {
					continue // TestPageCommands reports it
				}
				syntax.Walk(file, func(n syntax.Node) bool {
					call, ok := n.(*syntax.CallExpr)
					if !ok {
						return true
					}
					var words []string
					for _, w := range call.Args {
						words = append(words, literal(w))
					}
					if slices.Contains(words, "--to") {
						checked++
					}
					if missing := missingFlags(words, variables.String()); len(missing) > 0 {
						t.Errorf("%s:%d: %s lacks %v", name, c.Line, strings.Join(words, " "), missing)
					}
					return true
				})
			}
		}
	}
	if checked < 10 {
		t.Errorf("%d commands with --to were checked; want more than 10: does the test read all pages?", checked)
	}
}

func TestMissingFlags(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ call, variables, want string }{
		{"builder build --to r.example/a --private r.example", "", ""},
		{"bin/builder build --to r.example/a", "", "--private"},
		{"builder build --to r.example/a", "export PREBAKE_PRIVATE=r.example", ""},
		{"builder build --to oci:folder", "", ""},
		{"builder work --to 127.0.0.1:8440/prebake/driver", "", ""},
		{"builder build --wish w --max-age 30 --to oci:folder", "", "--cache-size"},
		{"builder build --wish w --max-age 30 --cache-size 30GiB --to r.example/a", "", "--private"},
		{"builder build --max-age 30 …", "", ""},
		{"builder plan --max-age 30 --to r.example/a", "", ""},
		{"server serve", "", ""},
	} {
		got := strings.Join(missingFlags(strings.Fields(row.call), row.variables), " ")
		if got != row.want {
			t.Errorf("missingFlags(%q, %q) = %q; want %q", row.call, row.variables, got, row.want)
		}
	}
}
