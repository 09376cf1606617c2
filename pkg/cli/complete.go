package cli

import (
	"context"
	"embed"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	ucli "github.com/urfave/cli/v3"
)

// Candidate is a possible completion.
type Candidate struct {
	Value string
	About string // a short description; may be empty
}

// Place is the place on a command line where a value is completed.
type Place struct {
	// Command is the path of the command without the program's name, such as "wish-lists show".
	Command string
	// Flag is the flag whose value is completed; "" means that an argument is completed.
	Flag string
	// Args are the arguments before the completed one.
	Args []string
	// Value returns a flag's value on the command line, or else its environment variable, or else its default.
	Value func(flag string) string
}

// Completer returns the possible values at a place, the most likely first. ctx ends after completeTime, because a user
// waits for the result.
type Completer func(ctx context.Context, at Place) []Candidate

const (
	completerKey = "completer"
	completeTime = 2 * time.Second
)

// Complete sets the callback that completes the values of a program's flags and arguments.
func Complete(root *ucli.Command, f Completer) *ucli.Command {
	root.Metadata = map[string]any{completerKey: f}
	return root
}

// scripts has the shell scripts that ask the program for completions. The library has such scripts too, but those pass
// the user's input to eval.
//
//go:embed completion
var scripts embed.FS

// completionCommands returns the command "completion", and the hidden command that its scripts call.
func completionCommands(root *ucli.Command) []*ucli.Command {
	show := &ucli.Command{
		Name: "completion", Usage: "print a completion script for bash, zsh or fish",
		Description: fmt.Sprintf(`The script completes commands, flags, and known values. Load the script with
  bash   source <(%[1]s completion bash)     in ~/.bashrc
  zsh    source <(%[1]s completion zsh)      in ~/.zshrc, after compinit
  fish   %[1]s completion fish >~/.config/fish/completions/%[1]s.fish`, root.Name),
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		show.Commands = append(show.Commands, &ucli.Command{
			Name: shell, Usage: "print the script for " + shell,
			Action: func(_ context.Context, cmd *ucli.Command) error {
				script, err := scripts.ReadFile("completion/" + shell)
				if err != nil {
					return err
				}
				_, err = fmt.Fprint(cmd.Root().Writer, strings.ReplaceAll(string(script), "PROGRAM", root.Name))
				return err
			},
		})
	}
	ask := &ucli.Command{
		Name: "__complete", Hidden: true, SkipFlagParsing: true,
		Usage: "print the candidates for the last word",
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			ctx, cancel := context.WithTimeout(ctx, completeTime)
			defer cancel()
			words := cmd.Args().Slice()
			if len(words) > 0 && words[0] == "--" {
				words = words[1:]
			}
			for _, c := range candidates(ctx, cmd.Root(), words) {
				if _, err := fmt.Fprintf(cmd.Root().Writer, "%s\t%s\n", c.Value, c.About); err != nil {
					return err
				}
			}
			return nil
		},
	}
	return []*ucli.Command{show, ask}
}

// parsedLine is the parsed command line before the word that is being completed.
type parsedLine struct {
	cmd     *ucli.Command
	path    []string
	flags   []ucli.Flag
	given   map[string]string // key: the flag's first name
	pending ucli.Flag         // the flag whose value is missing
	args    []string
	ended   bool // "--" has ended the flags
}

// candidates returns the possible completions of the last word.
func candidates(ctx context.Context, root *ucli.Command, words []string) []Candidate {
	current := ""
	if n := len(words); n > 0 {
		current, words = words[n-1], words[:n-1]
	}
	t := &parsedLine{cmd: root, flags: root.VisibleFlags(), given: map[string]string{}}
	for _, word := range words {
		t.readWord(word)
	}
	name, value, assigned := strings.Cut(current, "=")
	switch {
	case t.pending != nil:
		return withPrefix(current, "", t.values(ctx, t.pending.Names()[0]))
	case !t.ended && assigned && strings.HasPrefix(name, "-"):
		if f := t.flag(name); f != nil {
			return withPrefix(value, name+"=", t.values(ctx, f.Names()[0]))
		}
		return nil
	case !t.ended && strings.HasPrefix(current, "-"):
		return withPrefix(current, "", t.flagNames())
	}
	var all []Candidate
	if len(t.args) == 0 {
		for _, c := range t.cmd.Commands {
			if !c.Hidden && c.Name != "help" {
				all = append(all, Candidate{c.Name, c.Usage})
			}
		}
	}
	return withPrefix(current, "", append(all, t.values(ctx, "")...))
}

// plainValue matches values that need no quotes in a shell, because bash inserts completions without quotes.
var plainValue = regexp.MustCompile(`^[A-Za-z0-9._:/@=+,~-]*$`)

// withPrefix returns the candidates that begin with the typed text, except those with characters that a shell or a
// terminal would interpret. It puts the prefix before each value.
func withPrefix(typed, prefix string, all []Candidate) []Candidate {
	var out []Candidate
	for _, c := range all {
		// A terminal prints the value and the description, so neither may contain a control character.
		if strings.HasPrefix(c.Value, typed) && plainValue.MatchString(c.Value) &&
			!strings.ContainsFunc(c.About, unicode.IsControl) {
			out = append(out, Candidate{prefix + c.Value, c.About})
		}
	}
	return out
}

// readWord parses one word of the command line.
func (t *parsedLine) readWord(word string) {
	switch {
	case t.pending != nil:
		t.given[t.pending.Names()[0]], t.pending = word, nil
	case t.ended:
		t.args = append(t.args, word)
	case word == "--":
		t.ended = true
	case strings.HasPrefix(word, "-") && word != "-":
		name, value, assigned := strings.Cut(word, "=")
		f := t.flag(name)
		switch {
		case f == nil:
		case takesValue(f) && !assigned:
			t.pending = f
		default:
			t.given[f.Names()[0]] = value
		}
	default:
		at := slices.IndexFunc(t.cmd.Commands, func(c *ucli.Command) bool { return c.HasName(word) })
		if at < 0 || len(t.args) > 0 {
			t.args = append(t.args, word)
			return
		}
		t.cmd = t.cmd.Commands[at]
		t.path = append(t.path, t.cmd.Name)
		t.flags = append(t.flags, t.cmd.VisibleFlags()...)
	}
}

func takesValue(f ucli.Flag) bool {
	doc, ok := f.(ucli.DocGenerationFlag)
	return ok && doc.TakesValue()
}

// flag returns the flag with a name, with or without dashes. A flag of an inner command wins.
func (t *parsedLine) flag(name string) ucli.Flag {
	name = strings.TrimLeft(name, "-")
	for _, f := range slices.Backward(t.flags) {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// flagNames returns the flags that are not on the command line yet, or that may be repeated.
func (t *parsedLine) flagNames() []Candidate {
	all, seen := []Candidate{}, map[string]bool{"help": true} // each command has --help, so it comes last
	for _, f := range t.flags {
		name := f.Names()[0]
		_, given := t.given[name]
		multi, ok := f.(ucli.DocGenerationMultiValueFlag)
		if seen[name] || given && !(ok && multi.IsMultiValueFlag()) {
			continue
		}
		seen[name] = true
		about := ""
		if doc, ok := f.(ucli.DocGenerationFlag); ok {
			about = strings.ReplaceAll(doc.GetUsage(), "`", "")
		}
		all = append(all, Candidate{"--" + name, about})
	}
	return append(all, Candidate{"--help", "show help"})
}

// values returns the possible values of a flag, or of the next argument if flag is "".
func (t *parsedLine) values(ctx context.Context, flag string) []Candidate {
	if flag == "output" {
		return words(formats[:]...)
	}
	if f, ok := t.flag(flag).(*choiceFlag); ok {
		return words(f.choices...)
	}
	f, ok := t.cmd.Root().Metadata[completerKey].(Completer)
	if !ok {
		return nil
	}
	return f(ctx, Place{Command: strings.Join(t.path, " "), Flag: flag, Args: t.args, Value: t.value})
}

func words(all ...string) []Candidate {
	var out []Candidate
	for _, w := range all {
		out = append(out, Candidate{Value: w})
	}
	return out
}

func (t *parsedLine) value(flag string) string {
	f := t.flag(flag)
	if f == nil {
		return ""
	}
	if v, ok := t.given[f.Names()[0]]; ok {
		return v
	}
	doc, ok := f.(ucli.DocGenerationFlag)
	if !ok {
		return ""
	}
	for _, env := range doc.GetEnvVars() {
		if v := os.Getenv(env); v != "" {
			return v
		}
	}
	return strings.Trim(doc.GetValue(), `"`)
}
