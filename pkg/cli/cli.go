// Package cli is the terminal behaviour of every Prebake program:
// signals, logging, errors with their next move, exit codes, and the output
// format. Only mains and their command files import it. It refuses to know
// what a command does.
//
// The rules that it keeps for all programs:
//   - stdout is the result, stderr is everything else.
//   - An error is one "error:" line (what else is wrong stands indented below)
//     and, where somebody knows it, one "hint:" line.
//   - The exit code is the error's kind's; package fault holds the list.
//   - Flag beats environment beats configuration file beats default; environment names are
//     PREBAKE_ and the flag's name, keys of the file are the flags' names.
//   - Progress and colour appear on a terminal only; elsewhere plain lines.
//   - Every read command has --output text|json|yaml, with the same keys in both.
//   - "completion SHELL" prints a script that completes commands, flags and values.
//   - Help has a command's flags in groups, in 80 columns, and an example.
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

// Main runs the program and exits with the status that its error maps to.
// SIGINT and SIGTERM cancel the context; a second one kills the program.
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

// prepare has every command of a program tell its errors as one line and a hint. The library
// prints the whole help behind a usage error.
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

// PrintError writes an error and its hint the way every program does.
func PrintError(w io.Writer, err error) {
	fmt.Fprintf(w, "error: %s\n", strings.ReplaceAll(err.Error(), "\n", "\n       "))
	if hint := fault.Hint(err); hint != "" {
		fmt.Fprintf(w, "hint:  %s\n", hint)
	}
}

// Logger returns the logger that LogFlags ask for; it writes to stderr.
func Logger(cmd *ucli.Command) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cmd.String("log-level"))); err != nil {
		return nil, fault.Wrap(fault.Usage, err, "use --log-level debug, info, warn or error")
	}
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: readable}
	switch cmd.String("log-format") {
	case "json":
		return slog.New(slog.NewJSONHandler(cmd.Root().ErrWriter, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(cmd.Root().ErrWriter, opts)), nil
	}
	return nil, fault.New(fault.Usage, fmt.Sprintf("log format %q", cmd.String("log-format")),
		"use --log-format text or json")
}

// readable writes durations as text: in JSON they are bare nanoseconds otherwise.
func readable(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}
