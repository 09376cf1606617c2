package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/yamlfile"
)

// maxConfig is the maximum size of a configuration file in bytes.
const maxConfig = 1 << 20

// configFlag is the flag with the path of the configuration file. The file itself cannot set this flag.
const configFlag = "config"

// Config describes how a command reads its settings from a file.
type Config struct {
	// Secrets are the flags that the file must not set, because many people may read it. Each value says what to use
	// instead, such as "token-file".
	Secrets map[string]string
	// Check returns errors about settings that do not fit together, each made by [About]. If Check is nil, nothing is
	// checked. Check must not open files or connections, because "config check" also runs on other machines.
	Check func(*ucli.Command) error

	// places maps each setting whose value comes from the file to its place there, as FILE:LINE.
	places map[string]string
}

// WithConfig adds the flag --config FILE to a command. The keys of the YAML file are the long names of the command's
// flags. The command runs only if the file has no mistake and c.Check returns no error.
func WithConfig(cmd *ucli.Command, c Config) *ucli.Command {
	cmd.Flags = append(cmd.Flags, Group(Advanced,
		String(configFlag, "", "YAML `FILE` with settings, each named like its flag"))...)
	cmd.Before = func(ctx context.Context, cmd *ucli.Command) (context.Context, error) {
		return ctx, c.load(cmd)
	}
	if cmd.Metadata == nil {
		cmd.Metadata = map[string]any{}
	}
	cmd.Metadata[configFlag] = &c
	return cmd
}

// flagsError is an error about the values of flags.
type flagsError struct {
	error
	flags []string
}

// Unwrap returns the error without the names of the flags.
func (e *flagsError) Unwrap() error { return e.error }

// About marks an error with the flags that it is about. If the configuration file sets one of them, the report shows
// the line in the file. A nil err stays nil.
func About(err error, flags ...string) error {
	if err == nil {
		return nil
	}
	return &flagsError{err, flags}
}

// configFile is a configuration file while it is being read.
type configFile struct {
	yamlfile.Reader
	config *Config
	cmd    *ucli.Command
	keys   map[string]yamlfile.At
}

// load sets the flags from the file, except those that are set already. Then it checks all settings.
func (c *Config) load(cmd *ucli.Command) error {
	name := cmd.String(configFlag)
	if name == "" {
		return c.check(cmd)
	}
	data, err := readBounded(name)
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("read configuration: %w", err),
			"give --config a file that this user may read")
	}
	c.places = map[string]string{}
	f := &configFile{Reader: yamlfile.Reader{Name: name}, config: c, cmd: cmd, keys: map[string]yamlfile.At{}}
	const want = "settings, such as log-level: info"
	if top, ok := f.Document(data, maxConfig, want); ok {
		f.Fields(top, "a mapping of "+want, f.checkKey, f.setFlag)
	}
	rest := f.addErrors(c.check(cmd))
	hint := fmt.Sprintf("correct the file; print its schema with: %s config schema", cmd.Root().Name)
	return errors.Join(append([]error{f.Err("read configuration", hint)}, rest...)...)
}

// check checks all settings, independent of their source.
func (c *Config) check(cmd *ucli.Command) error {
	if c.Check == nil {
		return nil
	}
	return c.Check(cmd)
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxConfig+1)) // if the file is longer, Document reports that as a mistake
}

// fileFlags returns the flags that may be in the file.
func fileFlags(flags []ucli.Flag) []ucli.Flag {
	return slices.DeleteFunc(slices.Clone(flags), func(f ucli.Flag) bool {
		return slices.Contains([]string{"help", "version", configFlag}, f.Names()[0])
	})
}

// checkKey reports whether a key is the name of a flag. For any other key, it records a mistake and suggests the
// nearest flag.
func (f *configFile) checkKey(key yamlfile.At) bool {
	name, flags := key.Node.Value, fileFlags(f.cmd.Flags)
	if slices.ContainsFunc(flags, func(flag ucli.Flag) bool { return flag.Names()[0] == name }) {
		if _, twice := f.keys[name]; !twice {
			f.keys[name] = yamlfile.At{Node: key.Node, Path: name}
		}
		return true
	}
	near := strings.TrimLeft(ucli.SuggestFlag(flags, name, true), "-")
	for _, flag := range flags {
		if slices.Contains(flag.Names(), near) {
			near = flag.Names()[0] // suggests the current name in place of an earlier one
		}
	}
	if near == "" {
		near = "log-level"
	}
	f.Say(key, "found setting %s, which %s does not have; the nearest is %s", yamlfile.Found(key.Node), f.cmd.FullName(),
		near)
	return false
}

// setFlag checks a setting. It sets the flag unless the command line or the environment has a value.
func (f *configFile) setFlag(name string, value yamlfile.At) {
	at := slices.IndexFunc(f.cmd.Flags, func(flag ucli.Flag) bool { return flag.Names()[0] == name })
	flag := f.cmd.Flags[at]
	if instead, ok := f.config.Secrets[name]; ok {
		f.Say(value, "found a secret in a file that many may read; want %s", instead)
		return
	}
	text, ok := f.text(flag, value)
	if !ok || f.cmd.IsSet(name) && !fromEmptyVariable(flag) {
		return
	}
	if err := f.cmd.Set(name, text); err != nil {
		f.Say(value, "%v", err)
		return
	}
	f.config.places[name] = fmt.Sprintf("%s:%d", f.Name, value.Node.Line)
}

// schemaType returns boolean, integer, duration, array or string, or "" for a flag of another type.
func schemaType(flag ucli.Flag) string {
	if f, ok := flag.(interface{ SchemaType() string }); ok {
		return f.SchemaType()
	}
	return ""
}

// text returns the value of a setting, as the text to which the flag is to be set. It records a mistake if the value's
// type is wrong or the flag's parser refuses it.
func (f *configFile) text(flag ucli.Flag, value yamlfile.At) (string, bool) {
	before := f.Mistakes()
	text := value.Node.Value
	switch schemaType(flag) {
	case "boolean":
		text = fmt.Sprint(f.Bool(value))
	case "integer":
		if value.Node.Tag != "!!int" {
			f.Want(value, "a number")
		}
	case "duration":
		if d, err := time.ParseDuration(text); err != nil || d < 0 || value.Node.Tag != "!!str" {
			f.Want(value, "a time, such as 90s, 15m or 2h")
		}
	case "array":
		var items []string
		f.List(value, "texts", func(item yamlfile.At) { items = append(items, f.readText(item)) })
		text = ucli.NewStringSlice(items...).Serialize() // keeps an item with a comma together
	default:
		text = f.readText(value)
	}
	if f.Mistakes() > before {
		return "", false
	}
	if err := tryValue(flag, text); err != nil {
		f.Say(value, "%v", err)
	}
	return text, f.Mistakes() == before
}

// readText reads a text, and records a mistake if it contains a secret.
func (f *configFile) readText(value yamlfile.At) string {
	if value.Node.Tag == "!!bool" {
		f.Want(value, "a text; if the value is meant as a text, put it in quotes")
		return ""
	}
	text, ok := f.Word(value, "a text")
	if !ok {
		return ""
	}
	if secretURL(text) {
		f.Say(value, "found a password in a URL; want it in the environment: PGPASSFILE for a database, or %s for the "+
			"whole setting",
			envName(strings.SplitN(value.Path, "[", 2)[0]))
	}
	if strings.Contains(text, "PRIVATE KEY-----") {
		f.Say(value, "found a private key; want the path of a file that contains the key")
	}
	return text
}

// tryValue checks a value with the flag's own parser, and does not change the flag.
func tryValue(flag ucli.Flag, text string) error {
	switch f := flag.(type) {
	case *choiceFlag:
		return trySet(f.StringFlag, text)
	case *rangeFlag:
		return trySet(f.IntFlag, text)
	case *ucli.StringFlag:
		return trySet(f, text)
	case *ucli.StringSliceFlag:
		return trySet(f, text)
	case *ucli.IntFlag:
		return trySet(f, text)
	case *ucli.DurationFlag:
		return trySet(f, text)
	}
	return nil
}

func trySet[T, C any, V ucli.ValueCreator[T, C]](flag *ucli.FlagBase[T, C, V], text string) error {
	f := *flag
	f.Destination = nil
	if err := f.PreParse(); err != nil {
		return err
	}
	return f.Set(f.Name, text)
}

// addErrors records each error of [About] at the line that sets one of its flags. It returns the errors without a line.
func (f *configFile) addErrors(err error) (rest []error) {
	for _, part := range splitError(err) {
		var about *flagsError
		if !errors.As(part, &about) {
			rest = append(rest, part)
			continue
		}
		at := slices.IndexFunc(about.flags, func(name string) bool { return f.config.places[name] != "" })
		if at < 0 {
			at = slices.IndexFunc(about.flags, func(name string) bool {
				_, ok := f.keys[name]
				return ok && !f.cmd.IsSet(name)
			})
		}
		if at < 0 {
			rest = append(rest, part)
			continue
		}
		text := about.Error()
		if hint := fault.Hint(about); hint != "" {
			text += "; " + hint
		}
		f.Say(f.keys[about.flags[at]], "%s", text)
	}
	return rest
}

// splitError splits an error into the errors of [About] and all others. If a fault.Error wraps several parts, each part
// gets the kind and hint of that fault.Error.
func splitError(err error) []error {
	switch e := err.(type) { //nolint:errorlint // each layer by itself
	case nil:
		return nil
	case *flagsError:
		return []error{e}
	case interface{ Unwrap() []error }:
		var all []error
		for _, part := range e.Unwrap() {
			all = append(all, splitError(part)...)
		}
		return all
	}
	var about *flagsError
	if !errors.As(err, &about) {
		return []error{err}
	}
	all := splitError(errors.Unwrap(err))
	if e, ok := err.(*fault.Error); ok { //nolint:errorlint // this layer, not one below
		for i := range all {
			all[i] = fault.Wrap(e.Kind, all[i], e.Hint)
		}
	}
	return all
}
