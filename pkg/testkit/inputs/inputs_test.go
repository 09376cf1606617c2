package inputs_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// files are the files of a module whose test runs a program and a script that Go's cache does not notice. %s is this
// repository.
var files = map[string]string{
	"go.mod": "module example.com/m\n\ngo 1.26\n\nrequire github.com/prebake/prebake v0.0.0\n\n" +
		"replace github.com/prebake/prebake => %s\n",
	"tool/main.go":      "package main\n\nimport \"example.com/m/lib\"\n\nfunc main() { print(lib.Word) }\n",
	"lib/lib.go":        "package lib\n\nconst Word = \"one\"\n",
	"script.sh":         "#!/bin/sh\necho one\n",
	"apart/apart.go":    "package apart\n",
	"tested/m_test.go":  testFile,
	"unnamed/m_test.go": strings.ReplaceAll(testFile, "name(t)", "_ = name"),
}

const testFile = `package m

import (
	"os"
	"os/exec"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

func name(t *testing.T) {
	if err := inputs.Sources(t.Context(), os.Environ(), "example.com/m/tool"); err != nil {
		t.Fatal(err)
	}
	if err := inputs.Files("../script.sh"); err != nil {
		t.Fatal(err)
	}
}

func Test(t *testing.T) {
	name(t)
	for _, argv := range [][]string{{"go", "run", "example.com/m/tool"}, {"sh", "../script.sh"}} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}
`

// TestCache runs the test of a small module again after a change, with the real go command. The test of package unnamed
// does not name its inputs, and shows that the cache does not notice them otherwise.
func TestCache(t *testing.T) {
	t.Parallel()
	repo, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		// The cache takes no result of a test that opened a file younger than two seconds.
		old := time.Now().Add(-time.Hour)
		if err := os.Chtimes(file, old, old); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		if name == "go.mod" {
			text = fmt.Sprintf(text, repo)
		}
		write(name, text)
	}
	// cached returns whether the results of the two packages came from the cache.
	cached := func() (named, unnamed bool) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "go", "test", "./tested", "./unnamed")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off", "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("go test: %v\n%s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			named = named || strings.Contains(line, "/tested") && strings.Contains(line, "(cached)")
			unnamed = unnamed || strings.Contains(line, "/unnamed") && strings.Contains(line, "(cached)")
		}
		return named, unnamed
	}
	got := map[string][2]bool{}
	run := func(change string) {
		named, unnamed := cached()
		got[change] = [2]bool{named, unnamed}
	}
	run("first run")
	run("no change")
	write("apart/apart.go", "package apart\n\nconst Longer = 1\n")
	run("a package that the program does not use")
	write("lib/lib.go", "package lib\n\nconst Word = \"other\"\n")
	run("a package of the program")
	write("script.sh", "#!/bin/sh\necho another\n")
	run("the script")
	want := map[string][2]bool{
		"first run": {}, "no change": {true, true}, "a package that the program does not use": {true, true},
		"a package of the program": {false, true}, "the script": {false, true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results from the cache, of a test that names its inputs and of one that does not (-want +got):\n%s", diff)
	}
}
