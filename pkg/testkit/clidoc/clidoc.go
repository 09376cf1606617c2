// Package clidoc is for tests of programs. It checks that a page of docs/reference equals the program's --help output.
// Only test files import it.
package clidoc

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

// Check compares the file with the help of all commands of a program. If update is true, it writes the file instead.
// program must return a new command tree at each call.
func Check(t *testing.T, file string, update bool, program func() *ucli.Command) {
	t.Helper()
	want, err := page(program)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil && !update {
		t.Fatal(err)
	}
	if string(got) == want {
		return
	}
	if !update {
		t.Fatalf("%s (-want +got); run make generate:\n%s", file, cmp.Diff(want, string(got)))
	}
	if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// page returns Markdown with a section for each command that is not hidden.
func page(program func() *ucli.Command) (string, error) {
	var b strings.Builder
	root := program()
	fmt.Fprintf(&b, "# %s\n\n<!-- Generated from the program by make generate. -->\n", root.Name)
	var add func(path []string, cmd *ucli.Command) error
	add = func(path []string, cmd *ucli.Command) error {
		var out, errs strings.Builder
		if code := cli.Run(context.Background(), program(), slices.Concat(path, []string{"--help"}), &out, &errs); code != 0 {
			return fmt.Errorf("run %s --help: exit status %d: %s", strings.Join(path, " "), code, errs.String())
		}
		if len(path) > 1 {
			fmt.Fprintf(&b, "\n## %s\n", strings.Join(path, " "))
		}
		fmt.Fprintf(&b, "\n```text\n%s```\n", out.String())
		for _, sub := range cmd.Commands {
			if sub.Hidden || sub.Name == "help" {
				continue
			}
			if err := add(slices.Concat(path, []string{sub.Name}), sub); err != nil {
				return err
			}
		}
		return nil
	}
	err := add([]string{root.Name}, root)
	return b.String(), err
}
