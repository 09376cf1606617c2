package page

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestScript(t *testing.T) {
	t.Parallel()
	const text = "```sh\nnot this\n```\n\n```sh run\na=1\nb=2\n```\n\n```console run\n$ one \\\n  more\nprinted\n$ " +
		"two\n```\n"
	want := []Command{
		{Text: "a=1\nb=2\n", Line: 6},
		{Text: "one \\\n  more", Want: []string{"printed"}, Line: 11},
		{Text: "two", Line: 14},
	}
	if diff := cmp.Diff(want, Parse([]byte(text)).Script()); diff != "" {
		t.Errorf("Script (-want +got):\n%s", diff)
	}
}

func TestPlay(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct{ text, err string }{
		"output":         {"$ echo a; echo b >&2; echo c\na\nb\nc\n", ""},
		"any text":       {"$ echo digest sha256:12 is there\ndigest sha256:… is there\n", ""},
		"any lines":      {"$ seq 9\n1\n…\n9\n", ""},
		"no lines":       {"$ seq 2\n1\n…\n2\n", ""},
		"state":          {"$ a=7\n$ echo $a\n7\n", ""},
		"without output": {"$ echo whatever\n", ""},
		"background":     {"$ sleep 100 &\n$ jobs -r | wc -l\n1\n", ""},
		"other output":   {"$ true\n$ echo a\nb\n", "line 3"},
		"too much":       {"$ seq 2\n1\n", "line 2"},
		"dot is a dot":   {"$ echo axb\na.b\n", "line 2"},
		"status":         {"$ echo; (exit 3)\n", "exit status 3"},
		"shell ends":     {"$ exit 0\n", "did not end"},
		"stops there":    {"$ false\n$ touch after\n", "line 2"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			err := Play(t.Context(), dir, os.Environ(), Parse([]byte("```console run\n"+row.text+"```\n")).Script())
			if got := err != nil; got != (row.err != "") || got && !strings.Contains(err.Error(), row.err) {
				t.Errorf("Play(%q) = %v; want %q", row.text, err, row.err)
			}
			if _, err := os.Stat(dir + "/after"); err == nil {
				t.Error("the command after the failed one ran; want Play to stop")
			}
		})
	}
}
