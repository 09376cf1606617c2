package deploy_test

import (
	"path"
	"slices"
	"strings"
	"testing"

	"mvdan.cc/sh/v3/syntax"
)

// untrusting returns the calls of fetcher verify and fetcher rollback in a script that do not know the keys with which
// fetcher install was called before: the keys are in a flag of that call only. Both commands read /etc/prebake/keys.pem
// unless a flag or PREBAKE_PUBLIC_KEY names another file.
func untrusting(script string) (calls []string) {
	file, err := syntax.NewParser().Parse(strings.NewReader(script), "")
	if err != nil || strings.Contains(script, "PREBAKE_PUBLIC_KEY=") {
		return nil // TestPageCommands reports the error
	}
	trust := func(w string) bool {
		flag, _, _ := strings.Cut(w, "=")
		return slices.Contains([]string{"--public-key", "--policy", "--trusted-root"}, flag)
	}
	elsewhere := false
	syntax.Walk(file, func(n syntax.Node) bool {
		call, ok := n.(*syntax.CallExpr)
		if !ok {
			return true
		}
		var words []string
		for _, w := range call.Args {
			words = append(words, literal(w))
		}
		if len(words) < 2 || path.Base(words[0]) != "fetcher" {
			return true
		}
		named := slices.ContainsFunc(words, trust) && !slices.Contains(words, "/etc/prebake/keys.pem")
		switch words[1] {
		case "install", "run":
			elsewhere = elsewhere || named
		case "verify", "rollback":
			if elsewhere && !slices.ContainsFunc(words, trust) {
				calls = append(calls, strings.Join(words, " "))
			}
		}
		return true
	})
	return calls
}

// TestPagesKeepTrust checks the fetcher's commands in each block of all pages.
func TestPagesKeepTrust(t *testing.T) {
	t.Parallel()
	for name, p := range pages(t) {
		for _, b := range p.Blocks {
			if b.Language != "sh" && b.Language != "console" {
				continue
			}
			var script strings.Builder
			for _, c := range b.Commands() {
				script.WriteString(c.Text + "\n")
			}
			for _, call := range untrusting(script.String()) {
				t.Errorf("%s:%d: %q does not know the keys that fetcher install got by a flag", name, b.Line, call)
			}
		}
	}
}

func TestUntrusting(t *testing.T) {
	t.Parallel()
	const install = "fetcher install --server https://s --public-key k.pub\n"
	for script, want := range map[string]string{
		install + "fetcher status\nfetcher verify":                       "fetcher verify",
		install + "bin/fetcher rollback":                                 "bin/fetcher rollback",
		install + "fetcher verify --public-key k.pub":                    "",
		"export PREBAKE_PUBLIC_KEY=k.pub\n" + install + "fetcher verify": "",
		"fetcher install --server https://s\nfetcher verify":             "",
		"fetcher install --public-key /etc/prebake/keys.pem\n" +
			"fetcher verify": "",
		"fetcher verify\n" + install: "",
	} {
		if got := strings.Join(untrusting(script), "; "); got != want {
			t.Errorf("untrusting(%q) = %q; want %q", script, got, want)
		}
	}
}
