// Package inputs tells Go's cache of test results on which files a test depends. The cache notices the environment
// variables that a test reads, and the files of this module that the test opens. It does not notice what a child
// process reads: the sources of a program that the test compiles, a script, a program in bin/. A test with such files
// must name them here. Otherwise the cache would return an old result after they have changed. See `go help test`. Only
// test files import the package.
//
// The cache looks at the files after the run. So a file that somebody edits during the run would count as tested.
// Therefore the functions here fail the test if a file has changed at its end.
package inputs

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Files names files to the cache. A folder stands for everything in it, except folders named .git. Files fails the test
// if a file cannot be read, or has changed when the test ends.
//
// Call it while a test runs. Before m.Run, as at the start of TestMain, the testing package records nothing.
func Files(t testing.TB, names ...string) {
	t.Helper()
	s, err := Look(names...)
	if err != nil {
		t.Fatal(err)
	}
	s.watch(t)
}

// watch fails the test if a file has changed when the test ends.
func (s State) watch(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		if err := s.Unchanged(); err != nil {
			t.Error(err)
		}
	})
}

// State is the state of files and folders at one time. The time of a folder changes when a file is added or removed.
type State map[string]fs.FileInfo

// Look returns the state of the named files. A folder stands for everything in it, except folders named .git.
func Look(names ...string) (State, error) {
	s := State{}
	for _, name := range names {
		err := filepath.WalkDir(name, func(name string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && d.Name() == ".git":
				return fs.SkipDir
			}
			return s.add(name)
		})
		if err != nil {
			return nil, fmt.Errorf("name the inputs of a test: %w", err)
		}
	}
	return s, nil
}

// add adds a file or folder to the state. It opens a file: the cache keeps no result of a test that opened a file
// younger than two seconds, because such a file may change again unnoticed. If a test only asks for a file's metadata,
// the cache keeps the result.
func (s State) add(name string) error {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	s[name] = info
	if info.IsDir() {
		return nil
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return f.Close()
}

// Unchanged returns an error with the name of a file that has changed since Look.
func (s State) Unchanged() error {
	for name, was := range s {
		now, err := os.Stat(name)
		if err != nil {
			return fmt.Errorf("an input of the test has changed during the test: %w", err)
		}
		if !now.IsDir() && now.Size() != was.Size() || now.Mode() != was.Mode() || !now.ModTime().Equal(was.ModTime()) {
			return fmt.Errorf("an input of the test has changed during the test: %s; run the test again", name)
		}
	}
	return nil
}

// sources is a template for go list. It prints go.mod, and the source files and embedded files of each package in this
// module.
const sources = `{{if .Module}}{{if .Module.Main}}{{$dir := .Dir}}{{.Module.GoMod}}
{{range .GoFiles}}{{$dir}}/{{.}}
{{end}}{{range .CgoFiles}}{{$dir}}/{{.}}
{{end}}{{range .EmbedFiles}}{{$dir}}/{{.}}
{{end}}{{end}}{{end}}`

// Sources names the files of this module from which packages are compiled, for the architecture of the environment env.
// The patterns and env have the meaning that they have for `go list`. Sources fails the test in the same cases as
// [Files].
func Sources(t testing.TB, env []string, patterns ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-deps", "-f", sources}, patterns...)...)
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("list the sources of %s: %v", strings.Join(patterns, " "), err)
	}
	s := State{}
	for name := range strings.Lines(string(out)) {
		if name = strings.TrimSuffix(name, "\n"); name == "" {
			continue
		}
		err := s.add(name)
		if err == nil && filepath.Base(name) != "go.mod" {
			err = s.add(filepath.Dir(name)) // the folder's time changes if a source or embedded file is added
		}
		if err != nil {
			t.Fatalf("name the inputs of a test: %v", err)
		}
	}
	s.watch(t)
}
