// Package inputs tells Go's cache of test results which files a test depends on. The cache notices the environment
// variables that a test reads, and the files of this module that it opens. It does not notice what a child process
// reads: the sources of a program that the test compiles, a script, a program in bin/. A test that uses such files
// names them here, or else it counts as passed after they have changed. See `go help test`. Only test files import it.
//
// The cache looks at the files after the run. So a file that somebody edits during the run would count as tested, and
// the functions here fail the test then.
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

// Files names files, and folders with all that is in them, except folders named .git. It fails the test if a file
// cannot be read, or has changed when the test ends.
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

// Look returns the state of files, and of folders with all that is in them, except folders named .git.
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

// add adds a file or folder. It opens a file, since the cache takes no result of a test that opened a file younger than
// two seconds. It takes one of a test that only asked for the metadata.
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

// Unchanged returns an error that names a file which has changed since.
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
// The patterns and env have the meaning that they have for `go list`. It fails the test as [Files] does.
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
			err = s.add(filepath.Dir(name)) // its time changes with a new source or embedded file
		}
		if err != nil {
			t.Fatalf("name the inputs of a test: %v", err)
		}
	}
	s.watch(t)
}
