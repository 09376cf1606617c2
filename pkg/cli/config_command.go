package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/fault"
)

// ConfigCommand returns the command "config", which checks a configuration file, shows the resulting settings, and
// prints the file's schema. Each call of the callback returns a new copy of the command that reads the file.
// [WithConfig] must have made that command.
func ConfigCommand(of func() *ucli.Command) *ucli.Command {
	name := of().Name
	return &ucli.Command{
		Name: "config", Usage: "check the file that " + name + " --config takes",
		Commands: []*ucli.Command{
			{
				Name: "check", Usage: "print every mistake in a file, with its line and column",
				ArgsUsage: "FILE [-- FLAGS]",
				Description: fmt.Sprintf(`The command checks FILE in the same way as "%[1]s" does when it starts:
together with the environment variables and the flags after --. A password in
FILE is a mistake.

Example:
  %[2]s config check FILE`, name, "PROGRAM"),
				Action: func(ctx context.Context, cmd *ucli.Command) error {
					return readSettings(ctx, cmd, of(), func(run *ucli.Command) error {
						_, err := fmt.Fprintf(cmd.Root().Writer, "%s: no mistake\n", run.String(configFlag))
						return err
					})
				},
			},
			{
				Name: "show", Usage: "print each setting, and its source: file, variable, flag or default",
				ArgsUsage: "FILE [-- FLAGS]",
				Description: `Secret settings are not printed.

Example:
  PROGRAM config show FILE`,
				Flags: Group(Advanced, OutputFlag()),
				Action: func(ctx context.Context, cmd *ucli.Command) error {
					return readSettings(ctx, cmd, of(), func(run *ucli.Command) error {
						all := settings(run, cmd.Args().Slice()[1:])
						return Print(cmd, all, func(w io.Writer) error { return printSettings(w, all) })
					})
				},
			},
			{
				Name: "schema", Usage: "print the JSON schema of the file, for editors",
				Description: `Example:
  PROGRAM config schema >PROGRAM.schema.json`,
				Action: func(_ context.Context, cmd *ucli.Command) error {
					text, err := json.MarshalIndent(configSchema(cmd.Root().Name, of()), "", "  ")
					if err != nil {
						return err
					}
					_, err = cmd.Root().Writer.Write(append(text, '\n'))
					return err
				},
			},
		},
	}
}

// readSettings runs the command in the argument of, with the file and the flags in cmd's arguments. In place of the
// command's action, it calls the callback then, which can read the settings.
func readSettings(ctx context.Context, cmd, of *ucli.Command, then func(run *ucli.Command) error) error {
	if cmd.Args().Len() == 0 {
		return fault.New(fault.Usage, "read configuration: no file is given", "give the file: "+cmd.FullName()+" FILE")
	}
	args := []string{cmd.Root().Name, of.Name, "--" + configFlag, cmd.Args().First()}
	of.Action = func(_ context.Context, run *ucli.Command) error {
		if extra := run.Args().First(); extra != "" {
			return fault.New(fault.Usage, fmt.Sprintf("read configuration: unexpected argument %q after the file", extra),
				"put -- before the flags of "+of.Name)
		}
		return then(run)
	}
	root := &ucli.Command{Name: cmd.Root().Name, Commands: []*ucli.Command{of}}
	root.Writer, root.ErrWriter = cmd.Root().Writer, cmd.Root().ErrWriter
	prepare(root)
	// The library would find the running command "config" in the values of the original context.
	return root.Run(detachedContext{ctx}, slices.Concat(args, cmd.Args().Tail()))
}

// detachedContext is a context without the values of its parent.
type detachedContext struct{ context.Context }

// Value returns nil for every key.
func (detachedContext) Value(any) any { return nil }

// setting is one line of "config show".
type setting struct {
	Name  string `json:"name"`
	Value any    `json:"value"`
	// From is "flag", the name of an environment variable, FILE:LINE, or "default".
	From string `json:"from"`
}

// settings returns the settings with which the command would run. args are its flags on the command line.
func settings(cmd *ucli.Command, args []string) []setting {
	c, _ := cmd.Metadata[configFlag].(*Config) // never nil, because WithConfig made the command
	var all []setting
	for _, f := range fileFlags(cmd.Flags) {
		s := setting{Name: f.Names()[0], Value: f.Get(), From: "default"}
		if d, ok := s.Value.(fmt.Stringer); ok { // in JSON, a duration would otherwise be a number of nanoseconds
			s.Value = d.String()
		}
		_, secret := c.Secrets[s.Name]
		switch value := s.Value.(type) {
		case string:
			s.Value = displayText(value, secret)
		case []string:
			texts := make([]string, len(value)) // a copy, since the flag keeps the original
			for i := range value {
				texts[i] = displayText(value[i], secret)
			}
			s.Value = texts
		}
		switch {
		case c.places[s.Name] != "":
			s.From = c.places[s.Name]
		case !f.IsSet():
		case slices.ContainsFunc(args, func(arg string) bool {
			name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			return strings.HasPrefix(arg, "-") && slices.Contains(f.Names(), name)
		}):
			s.From = "flag"
		default:
			doc, _ := f.(ucli.DocGenerationFlag)
			for _, env := range doc.GetEnvVars() {
				if os.Getenv(env) != "" {
					s.From = env
					break
				}
			}
		}
		all = append(all, s)
	}
	return all
}

// displayText returns the text of a setting, or a placeholder if the text is a secret.
func displayText(text string, secret bool) string {
	if text != "" && (secret || secretURL(text)) {
		return "(not shown)"
	}
	return text
}

func printSettings(w io.Writer, all []setting) error {
	for _, s := range all {
		value := fmt.Sprint(s.Value)
		if list, ok := s.Value.([]string); ok {
			value = strings.Join(list, ", ")
		}
		if _, err := fmt.Fprintf(w, "%-28s %s  (%s)\n", s.Name, value, s.From); err != nil {
			return err
		}
	}
	return nil
}

// durationPattern matches a duration without a sign, as Go's time.ParseDuration reads it.
const durationPattern = `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`

// configSchema returns the JSON schema of a command's configuration file.
func configSchema(program string, cmd *ucli.Command) map[string]any {
	c, _ := cmd.Metadata[configFlag].(*Config) // never nil, because WithConfig made the command
	text := map[string]any{"type": []string{"string", "number"}}
	properties := map[string]any{}
	for _, f := range fileFlags(cmd.Flags) {
		name := f.Names()[0]
		if _, secret := c.Secrets[name]; secret {
			continue
		}
		doc, ok := f.(ucli.DocGenerationFlag)
		if !ok {
			continue
		}
		p := map[string]any{"description": strings.ReplaceAll(doc.GetUsage(), "`", "")}
		switch kind := schemaType(f); kind {
		case "boolean":
			p["type"] = kind
		case "integer":
			p["type"] = kind
			if r, ok := f.(*rangeFlag); ok {
				p["minimum"], p["maximum"] = r.least, r.most
			}
		case "duration":
			p["type"], p["pattern"] = "string", durationPattern
		case "array":
			p["type"], p["items"], p["minItems"] = "array", text, 1
		default:
			p["type"] = text["type"]
			if choice, ok := f.(*choiceFlag); ok {
				p["type"], p["enum"] = "string", choice.choices
			}
		}
		properties[name] = p
	}
	return map[string]any{
		"$schema": "https://json-schema.org/draft/2020-12/schema",
		"$id":     fmt.Sprintf("https://prebake.dev/schema/%s-%s.json", program, cmd.Name),
		"title":   fmt.Sprintf("Configuration of %s %s", program, cmd.Name),
		"type":    "object", "additionalProperties": false, "properties": properties,
	}
}
