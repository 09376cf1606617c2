package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	ucli "github.com/urfave/cli/v3"
)

// helpLines is the number of lines of two screens.
const helpLines = 80

// CheckHelp is for the tests of programs. It returns an error for each of these mistakes:
//   - a help page is longer than two screens, or wider than a terminal
//   - a command has no example
//   - an example has a flag that its command does not have
//   - a flag has no heading, but other flags of its command have one
func CheckHelp(program func() *ucli.Command) error {
	var problems []error
	eachCommand(program(), func(path []string, cmd *ucli.Command) {
		name := strings.Join(path, " ")
		var page, errs strings.Builder
		if code := Run(context.Background(), program(), slices.Concat(path, []string{"--help"}), &page, &errs); code != 0 {
			problems = append(problems, fmt.Errorf("run %s --help: exit status %d: %s", name, code, errs.String()))
		}
		if n := strings.Count(page.String(), "\n"); n > helpLines {
			problems = append(problems, fmt.Errorf("%s --help prints %d lines; want at most %d lines", name, n, helpLines))
		}
		for line := range strings.Lines(page.String()) {
			// A single long word, such as the path of a folder, cannot be broken.
			if n := utf8.RuneCountInString(line) - 1; n > helpWidth && len(strings.Fields(line)) > 1 {
				problems = append(problems, fmt.Errorf("%s --help prints a line of %d columns; want at most %d columns: %s", name,
					n, helpWidth, line))
			}
		}
		problems = append(problems, checkGroups(name, cmd)...)
		problems = append(problems, checkExamples(program(), name, cmd)...)
	})
	return errors.Join(problems...)
}

// eachCommand visits each command that is not hidden. path has the names of the command's parents, from the root down,
// and then the command's own name.
func eachCommand(root *ucli.Command, f func(path []string, cmd *ucli.Command)) {
	var look func(path []string, cmd *ucli.Command)
	look = func(path []string, cmd *ucli.Command) {
		if cmd.Hidden {
			return
		}
		f(path, cmd)
		for _, sub := range cmd.Commands {
			look(slices.Concat(path, []string{sub.Name}), sub)
		}
	}
	look([]string{root.Name}, root)
}

func checkGroups(name string, cmd *ucli.Command) (problems []error) {
	headings, groups := groupFlags(cmd.Flags)
	if len(cmd.Flags) == 0 || headings[0] == "Flags" {
		return nil
	}
	for _, heading := range headings {
		if !slices.Contains(order, heading) {
			problems = append(problems, fmt.Errorf("%s --help has the heading %q; want one of %q", name, heading, order))
		}
		for _, f := range groups[heading] {
			if c, ok := f.(ucli.CategorizableFlag); ok && c.GetCategory() == "" {
				problems = append(problems, fmt.Errorf("%s: the flag --%s is in no group", name, f.Names()[0]))
			}
		}
	}
	return problems
}

// checkExamples parses each example of a command as the program would.
func checkExamples(root *ucli.Command, name string, cmd *ucli.Command) (problems []error) {
	root.Commands = append(root.Commands, completionCommands(root)...)
	prepare(root)
	description := strings.ReplaceAll(strings.ReplaceAll(cmd.Description, "PROGRAM", root.Name), "\\\n", " ")
	found := false
	for line := range strings.Lines(description) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != root.Name || !strings.HasPrefix(line, " ") {
			continue
		}
		found = found || strings.HasPrefix(strings.Join(words, " ")+" ", name+" ")
		t := &parsedLine{cmd: root, flags: root.VisibleFlags(), given: map[string]string{}}
		for _, word := range words[1:] {
			if strings.ContainsAny(word[:1], "|>&") {
				break // the shell interprets the rest of the line
			}
			isFlag := t.pending == nil && !t.ended && strings.HasPrefix(word, "--") && word != "--"
			if flag, _, _ := strings.Cut(word, "="); isFlag && t.flag(flag) == nil {
				problems = append(problems,
					fmt.Errorf("%s: example %q has a flag that the command lacks: %s", name, strings.TrimSpace(line), word))
			}
			t.readWord(word)
		}
		if t.pending != nil {
			problems = append(problems,
				fmt.Errorf("%s: example %q ends with a flag without its value", name, strings.TrimSpace(line)))
		}
	}
	leaf := len(cmd.Commands) == 0 && cmd.Name != "version"
	if leaf && !found {
		problems = append(problems, fmt.Errorf("%s: the description has no example", name))
	}
	return problems
}

// CompareDocs is for the tests of programs. It compares generated documentation with the files below a folder: manual
// pages, a page with all flags, and the schema of the configuration file. It returns an error for each file that
// differs. If write is true, it replaces these files.
func CompareDocs(folder string, program func() *ucli.Command, write bool) error {
	root := program()
	files := manual(program())
	files["reference/flags-"+root.Name+".md"] = flagTable(root)
	for _, cmd := range root.Commands {
		if _, ok := cmd.Metadata[configFlag].(*Config); ok {
			var schema, errs strings.Builder
			Run(context.Background(), program(), []string{root.Name, "config", "schema"}, &schema, &errs)
			files[root.Name+"-"+cmd.Name+".schema.json"] = schema.String()
		}
	}
	var problems []error
	for name, want := range files {
		name = filepath.Join(folder, filepath.FromSlash(name))
		got, err := os.ReadFile(name)
		switch {
		case err == nil && string(got) == want:
		case write:
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(name, []byte(want), 0o644); err != nil {
				return err
			}
		default:
			problems = append(problems, fmt.Errorf("%s differs from what the commands generate; run: make generate", name))
		}
	}
	pages, err := filepath.Glob(filepath.Join(folder, "man", root.Name+"*.1"))
	for _, page := range pages {
		if _, ok := files["man/"+filepath.Base(page)]; !ok {
			problems = append(problems, fmt.Errorf("the manual page %s belongs to no command: remove it", page))
		}
	}
	return errors.Join(append(problems, err)...)
}

// flagUse is one row of the page with all flags: a flag and its commands.
type flagUse struct {
	names, value, text, def, kind string
	commands                      []string
}

// flagUses returns the flags of a program, sorted by name. A flag that differs between commands has several entries.
func flagUses(root *ucli.Command) []flagUse {
	var all []flagUse
	eachCommand(root, func(path []string, cmd *ucli.Command) {
		for _, f := range cmd.VisibleFlags() {
			doc, ok := f.(ucli.DocGenerationFlag)
			if !ok || slices.Contains([]string{"help", "version"}, f.Names()[0]) {
				continue
			}
			row := flagRow(f)
			text, def, _ := strings.Cut(row[1], " (default: ")
			names, value, _ := strings.Cut(strings.ReplaceAll(row[0], ", ", ","), " ")
			u := flagUse{names: strings.ReplaceAll(names, ",", ", "), value: value, text: text,
				def: strings.TrimSuffix(def, ")"), kind: strings.Trim(schemaType(doc.(ucli.Flag)), "[]")}
			at := slices.IndexFunc(all, func(have flagUse) bool {
				return have.names == u.names && have.value == u.value && have.text == u.text && have.def == u.def
			})
			if at < 0 {
				at, all = len(all), append(all, u)
			}
			all[at].commands = append(all[at].commands, strings.Join(path[1:], " "))
		}
	})
	slices.SortStableFunc(all, func(a, b flagUse) int { return strings.Compare(a.names, b.names) })
	return all
}

// flagTable returns the documentation page with all flags of a program.
func flagTable(root *ucli.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Flags of %s\n\n", root.Name)
	b.WriteString("Generated from the commands: `make generate`. A flag's environment variable is `PREBAKE_` and its " +
		"name in\n" +
		"upper case, with `_` for `-`. A flag overrides its variable, the variable overrides `--config FILE`, and the\n" +
		"file overrides the default.\n\n")
	b.WriteString("| flag | value | meaning | default | commands |\n|---|---|---|---|---|\n")
	cell := strings.NewReplacer("|", "\\|", "<", "&lt;", "\n", " ").Replace
	for _, u := range flagUses(root) {
		commands := strings.Join(u.commands, ", ")
		if len(u.commands) > 8 {
			commands = fmt.Sprintf("%d commands", len(u.commands))
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", u.names, cell(u.value), cell(u.text), cell(u.def), commands)
	}
	return b.String()
}
