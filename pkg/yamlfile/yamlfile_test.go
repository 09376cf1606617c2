package yamlfile_test

import (
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/yamlfile"
)

// read reads a YAML file that may have a number, a boolean and a list of words.
func read(text string) error {
	r := yamlfile.Reader{Name: "f.yaml"}
	if top, ok := r.Document([]byte(text), 1000, "count"); ok {
		r.Mapping(top, "a mapping with count", map[string]func(yamlfile.At){
			"count": func(a yamlfile.At) { r.Number(a, 1, 9, "3") },
			"on":    func(a yamlfile.At) { r.Bool(a) },
			"words": func(a yamlfile.At) { r.List(a, "words", func(e yamlfile.At) { r.Word(e, "a word") }) },
		})
	}
	return r.Err("read file", "")
}

// TestMistakes checks that one error lists all mistakes in a file, each with its line and column.
func TestMistakes(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, text, want string }{
		{"none", "count: 3\non: true\nwords: [a, 1.10]\n", ""},
		{"empty", "", "f.yaml:1:1: found an empty file; want count"},
		{"only a comment", "# nothing\n", "f.yaml:1:1: found an empty file; want count"},
		{"no YAML", "count: 1\n\ton: 2\n", "f.yaml:2:1: the file is not YAML: "},
		{"a list", "- 1\n", "f.yaml:1:1: found a list; want a mapping with count"},
		{"two documents", "count: 1\n---\ncount: 2\n", "f.yaml:2:1: found a second document; want one in a file"},
		{"unknown", "count: 1\nsize: 2\n", `f.yaml:2:1: found field "size"; want count, on or words`},
		{"a list for a key", "? [a]\n: 1\n", "f.yaml:1:3: found a list; want the name of a field"},
		{"anchor of a key", "&a count: 1\n", "f.yaml:1:1: found an anchor or alias; want the value itself"},
		{"alias of a key", "words: [&a x]\n*a : 1\n", "f.yaml:2:1: found an anchor or alias; want the value itself"},
		{"twice", "count: 1\ncount: 2\n", `f.yaml:2:1: found field "count" twice; want it once`},
		{"alias", "count: &a 1\n", "f.yaml:1:8: count: found an anchor or alias; want the value itself"},
		{"alias in a list", "words: [&a x, *a]\n", "f.yaml:1:15: words[1]: found an anchor or alias"},
		{"not a number", "count: many\n", `f.yaml:1:8: count: found "many"; want a number from 1 to 9, such as 3`},
		{"out of range", "count: 10\n", `f.yaml:1:8: count: found "10"; want a number from 1 to 9`},
		{"no value", "count:\n", "f.yaml:1:7: count: found nothing; want a number"},
		{"old word for true", "on: yes\n", `f.yaml:1:5: on: found "yes"; want true or false`},
		{"empty list", "words: []\n", "f.yaml:1:8: words: found a list; want a list of words"},
		{"mapping in a list", "words:\n- {a: b}\n", "f.yaml:2:3: words[0]: found a mapping; want a word"},
		{"too large", strings.Repeat("#", 1001), "f.yaml:1:1: the file has more than 1000 bytes"},
		{"two mistakes, in order", "words: []\ncount: x\n", "2 mistakes\nf.yaml:1:8: words"},
	} {
		err := read(row.text)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if row.want == "" && got != "" || !strings.Contains(got, row.want) {
			t.Errorf("%s: read(%q) = %q; want %q", row.name, row.text, got, row.want)
		}
	}
	if err := read(strings.Repeat("x: 1\n", 150)); err == nil || !strings.HasSuffix(err.Error(), "\nand 50 more") {
		t.Errorf("read(150 mistakes) = %v; want 100 of them, and 50 more", err)
	}
}

func FuzzDocument(f *testing.F) {
	f.Add([]byte("count: 3\nwords: [a]\n"))
	f.Add([]byte("a: &x [*x]\n---\nb"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := read(string(data)); err != nil && !strings.Contains(err.Error(), "f.yaml:") {
			t.Errorf("read(%q) = %v; want a place", data, err)
		}
	})
}
