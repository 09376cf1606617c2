package mirror

import (
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

func TestUndo(t *testing.T) {
	t.Parallel()
	const own, edited = "one of NVIDIA's lines\ntwo of NVIDIA's lines\n",
		"one of NVIDIA's lines\nthree, which is Debian's\ntwo of NVIDIA's lines\n"
	pair := edition{own: tree{}, debian: tree{}}
	for name, texts := range map[string][2]string{"equal.c": {own, edited}, "other.c": {own, edited},
		"same.c": {own, own}} {
		pair.own.addFile(name, texts[0])
		pair.debian.addFile(name, texts[1])
	}
	at := func(changed int64, text string) node { return node{changed: changed, data: []byte(text)} }
	in := tree{"equal.c": at(2, edited), "other.c": at(2, "a line of another release\n"+edited), "same.c": at(1, own),
		"core.o_binary": at(2, "core")}
	got, edits, err := undo(t.Context(), t.TempDir(), in, pair)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"equal.c: as in NVIDIA's own", "other.c: backwards"}; !slices.Equal(edits, want) {
		t.Errorf("undo tells %q; want %q", edits, want)
	}
	for name, want := range map[string]string{"equal.c": own, "other.c": "a line of another release\n" + own,
		"same.c": own, "core.o_binary": "core"} {
		if string(got[name].data) != want {
			t.Errorf("%s = %q; want %q", name, got[name].data, want)
		}
	}
	for name, change := range map[string]func(tree){
		"edited in this release alone": func(in tree) { in["same.c"] = at(2, own+"a line of Debian's own\n") },
		"in no other edition":          func(in tree) { in["new.c"] = at(2, own) },
		"Debian's line stays":          func(in tree) { in["other.c"] = at(2, "three, which is Debian's\n") },
	} {
		bad := tree{}
		for file, n := range in {
			bad[file] = n
		}
		change(bad)
		if _, _, err := undo(t.Context(), t.TempDir(), bad, pair); !fault.Is(err, fault.Unsupported) ||
			!strings.Contains(err.Error(), ".c") {
			t.Errorf("%s: undo = %v; want unsupported, with the file's name", name, err)
		}
	}
}
