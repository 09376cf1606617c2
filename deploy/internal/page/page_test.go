package page

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The first four rows are the examples on GitHub's own page about section links. The others are from the fixtures of
// github-slugger (github.com/Flet/github-slugger, test/fixtures.json).
func TestAnchor(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	for _, row := range []struct{ heading, want string }{
		{"Sample Section", "sample-section"},
		{"This'll  be a Helpful Section About the Greek Letter!", "thisll--be-a-helpful-section-about-the-greek-letter"},
		{"This heading is not unique in the file", "this-heading-is-not-unique-in-the-file"},
		{"This heading is not unique in the file", "this-heading-is-not-unique-in-the-file-1"},
		{"echo", "echo"},
		{"echo", "echo-1"},
		{"echo 1", "echo-1-1"},
		{"echo-1", "echo-1-2"},
		{"echo", "echo-2"},
		{"heading with a - dash", "heading-with-a---dash"},
		{"heading with an _ underscore", "heading-with-an-_-underscore"},
		{"exchange.bind_headers(exchange, routing [, bindCallback])", "exchangebind_headersexchange-routing--bindcallback"},
		{"I ♥ unicode", "i--unicode"},
		{"en–dash", "endash"},
		{"Профили пользователей", "профили-пользователей"},
	} {
		if got := anchor(row.heading, seen); got != row.want {
			t.Errorf("anchor(%q) = %q; want %q", row.heading, got, row.want)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	got := Parse([]byte("# A `b` _c_\n\nsee [one\ntwo](x.md#y) and `in\nline`, ![p](p.png)\n\n| [t](t.md) |\n|---|\n| " +
		"`c` |\n\n" +
		"- item\n\n  ```sh run\n  ls\n  ```\n\n```\n[no](link.md)\n```\n"))
	want := &Page{
		Anchors: map[string]bool{"a-b-c": true},
		Links:   []Text{{"x.md#y", 3}, {"p.png", 3}, {"t.md", 7}},
		Spans:   []Text{{"b", 1}, {"in line", 4}, {"c", 9}},
		Blocks: []Block{
			{Language: "sh", Run: true, Section: "a-b-c", Text: "ls\n", Line: 14},
			{Section: "a-b-c", Text: "[no](link.md)\n", Line: 18},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Parse (-want +got):\n%s", diff)
	}
}
