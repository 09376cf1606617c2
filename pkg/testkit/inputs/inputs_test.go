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

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// files are the files of a small module. Its test runs a program and a script, which Go's cache of test results does
// not notice. %s is the path of this repository.
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
	inputs.Sources(t, os.Environ(), "example.com/m/tool")
	inputs.Files(t, "../script.sh")
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

// TestCache runs the tests of a small module after each change, with the real go command. Package tested names its
// inputs, so its test must run again. Package unnamed does not, and its test shows that the cache then returns an old
// result.
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
		aged(t, file)
	}
	for name, text := range files {
		if name == "go.mod" {
			text = fmt.Sprintf(text, repo)
		}
		write(name, text)
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off", "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
		return string(out)
	}
	run("list", "-deps", "-test", "./...") // adds requirements to go.mod
	aged(t, filepath.Join(dir, "go.mod"))
	got := map[string][2]bool{}
	// test runs the tests of both packages after a change. It records for each package whether the result came from the
	// cache.
	test := func(change string) {
		t.Helper()
		var named, unnamed bool
		for line := range strings.Lines(run("test", "./tested", "./unnamed")) {
			named = named || strings.Contains(line, "/tested") && strings.Contains(line, "(cached)")
			unnamed = unnamed || strings.Contains(line, "/unnamed") && strings.Contains(line, "(cached)")
		}
		got[change] = [2]bool{named, unnamed}
	}
	test("first run")
	test("no change")
	write("apart/apart.go", "package apart\n\nconst Longer = 1\n")
	test("a package that the program does not use")
	write("lib/lib.go", "package lib\n\nconst Word = \"other\"\n")
	test("a package of the program")
	write("lib/more.go", "package lib\n\nconst More = \"more\"\n")
	test("a new file in a package of the program")
	write("script.sh", "#!/bin/sh\necho another\n")
	test("the script")
	want := map[string][2]bool{
		"first run": {}, "no change": {true, true}, "a package that the program does not use": {true, true},
		"a package of the program": {false, true}, "a new file in a package of the program": {false, true},
		"the script": {false, true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results from the cache, of a test that names its inputs and of one that does not (-want +got):\n%s", diff)
	}
}

// aged gives a file an old time. Go's cache keeps no result of a test that opened a file younger than two seconds.
func aged(t *testing.T, file string) {
	t.Helper()
	old := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := os.Chtimes(file, old, old); err != nil {
		t.Fatal(err)
	}
}

// TestUnchanged checks that Unchanged notices each kind of change to a file in a folder.
func TestUnchanged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "sub", "file")
	for name, change := range map[string]func() error{
		"nothing": func() error { return nil },
		"longer":  func() error { return os.WriteFile(file, []byte("longer"), 0o600) },
		"newer":   func() error { return os.Chtimes(file, time.Now(), time.Now().Add(-time.Minute)) },
		"mode":    func() error { return os.Chmod(file, 0o400) },
		"removed": func() error { return os.Remove(file) },
		"another": func() error { return os.WriteFile(file+"2", nil, 0o600) },
	} {
		if err := os.RemoveAll(filepath.Dir(file)); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := inputs.Look(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if err := s.Unchanged(); (err == nil) != (name == "nothing") {
			t.Errorf("after the change %q: Unchanged() = %v", name, err)
		}
	}
}
