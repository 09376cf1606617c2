// Package cli is the terminal behaviour of every Prebake program: signals, logging, errors with hints, exit codes, and
// the output format. Only main packages import it.
//
// It enforces these rules for all programs:
//   - stdout is the result, and stderr is everything else.
//   - An error is one "error:" line. Further errors follow as indented lines, then a "hint:" line.
//   - The kind of the error decides the exit code; package fault has the list.
//   - A flag overrides the environment, which overrides the configuration file, which overrides the default.
//   - An environment variable is named PREBAKE_ and the flag's name; a key in the file has the flag's name.
//   - Progress and colour appear only on a terminal; elsewhere the output has plain lines.
//   - Every command that reads has --output text|json|yaml. JSON and YAML have the same keys.
//   - "completion SHELL" prints a script that completes commands, flags and values.
//   - Help shows a command's flags in groups, with an example, in 80 columns.
package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/fault"
)

// Main runs the program, and exits with the exit code of its error. SIGINT and SIGTERM cancel the context; a second
// signal kills the program.
func Main(root *ucli.Command) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	code := Run(ctx, root, os.Args, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Run runs the program with these arguments and returns its exit status.
func Run(ctx context.Context, root *ucli.Command, args []string, stdout, stderr io.Writer) int {
	useHelp()
	root.Writer, root.ErrWriter = stdout, stderr
	root.Commands = append(root.Commands, completionCommands(root)...)
	prepare(root)
	err := root.Run(ctx, args)
	if err == nil {
		return 0
	}
	PrintError(stderr, err)
	return fault.Of(err).ExitCode()
}

// prepare makes every command report a usage error as one line and a hint, not as the library's whole help text. It
// also adds the checks of [oneVariable], and sets the program's name in descriptions.
func prepare(root *ucli.Command) {
	root.ExitErrHandler = func(context.Context, *ucli.Command, error) {}
	usage := func(_ context.Context, cmd *ucli.Command, err error, _ bool) error {
		return fault.Wrap(fault.Usage, err, "see "+cmd.FullName()+" --help")
	}
	walk(root, func(c *ucli.Command) {
		c.OnUsageError = usage
		c.Before = oneVariable(c.Before)
		c.Description = strings.ReplaceAll(c.Description, "PROGRAM", root.Name)
		if c.Action == nil && len(c.Commands) > 0 {
			c.Action = needSubcommand
		}
	})
}

func needSubcommand(_ context.Context, cmd *ucli.Command) error {
	if name := cmd.Args().First(); name != "" {
		return fault.New(fault.Usage, fmt.Sprintf("%s has no command %q", cmd.FullName(), name),
			"see "+cmd.FullName()+" --help")
	}
	return ucli.ShowSubcommandHelp(cmd)
}

func walk(cmd *ucli.Command, f func(*ucli.Command)) {
	f(cmd)
	for _, sub := range cmd.Commands {
		walk(sub, f)
	}
}

// PrintError writes an error and its hint, in the same format for all programs.
func PrintError(w io.Writer, err error) {
	fmt.Fprintf(w, "error: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n       "))
	if hint := fault.Hint(err); hint != "" {
		fmt.Fprintf(w, "hint:  %s\n", hint)
	}
}

// Logger returns a logger for stderr with the level and format of the flags of [LogFlags].
func Logger(cmd *ucli.Command) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cmd.String("log-level"))); err != nil {
		return nil, fault.Wrap(fault.Usage, err, "use --log-level debug, info, warn or error")
	}
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: durationText}
	switch cmd.String("log-format") {
	case "json":
		return slog.New(slog.NewJSONHandler(cmd.Root().ErrWriter, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(cmd.Root().ErrWriter, opts)), nil
	}
	return nil, fault.New(fault.Usage, fmt.Sprintf("read --log-format: format %q: want text or json",
		cmd.String("log-format")),
		"use --log-format text or json")
}

// durationText replaces durations by text, such as 1.5s. JSON would show a number of nanoseconds.
func durationText(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}
