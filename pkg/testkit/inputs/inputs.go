// Package inputs tells Go's cache of test results which files a test depends on. The cache notices the environment
// variables that a test reads, and the files of this module that it opens. It does not notice what a child process
// reads: the sources of a program that the test compiles, a script, a program in bin/. A test that uses such files
// names them here, or else it counts as passed after they have changed. See `go help test`. Only test files import it.
package inputs

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Files reads the metadata of files, and of folders with all that is in them, except folders named .git. That is
// enough: of a file that a test opens, Go's cache compares only size, mode and time.
func Files(names ...string) error {
	for _, name := range names {
		err := filepath.WalkDir(name, func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == ".git" {
				return fs.SkipDir
			}
			_, err = os.Stat(name)
			return err
		})
		if err != nil {
			return fmt.Errorf("name the inputs of a test: %w", err)
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
// The patterns and env have the meaning that they have for `go list`.
func Sources(ctx context.Context, env []string, patterns ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"list", "-deps", "-f", sources}, patterns...)...)
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("list the sources of %s: %w", strings.Join(patterns, " "), err)
	}
	for name := range strings.Lines(string(out)) {
		if name = strings.TrimSuffix(name, "\n"); name == "" {
			continue
		}
		_, err := os.Stat(name)
		if err == nil && filepath.Base(name) != "go.mod" {
			_, err = os.Stat(filepath.Dir(name)) // its time changes with a new source or embedded file
		}
		if err != nil {
			return fmt.Errorf("name the inputs of a test: %w", err)
		}
	}
	return nil
}
