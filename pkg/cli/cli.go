// Package cli is the manners of every Prebake program at the terminal:
// signals, logging, errors with their next move, exit codes, and the output
// format. Only mains and their command files import it. It refuses to know
// what a command does.
//
// The rules that it keeps for all programs:
//   - stdout is the result, stderr is everything else.
//   - An error is one "error:" line (what else is wrong stands indented below)
//     and, where somebody knows it, one "hint:" line.
//   - The exit code is the error's kind's; package fault holds the list.
//   - Flag beats environment beats default; environment names are PREBAKE_ and
//     the flag's name.
//   - Progress and colour appear on a terminal only; elsewhere plain lines.
//   - Every read command has --output text|json.
package cli

import (
	"context"
	"encoding/json"
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
	root.Writer, root.ErrWriter = stdout, stderr
	root.EnableShellCompletion = true
	root.ExitErrHandler = func(context.Context, *ucli.Command, error) {}
	// The library prints the whole help behind a usage error; ours is one line
	// and a hint, like every other error.
	usage := func(_ context.Context, cmd *ucli.Command, err error, _ bool) error {
		return fault.Wrap(fault.Usage, err, "see "+cmd.FullName()+" --help")
	}
	walk(root, func(c *ucli.Command) {
		c.OnUsageError = usage
		if c.Action == nil && len(c.Commands) > 0 {
			c.Action = needSubcommand
		}
	})
	err := root.Run(ctx, args)
	if err == nil {
		return 0
	}
	PrintError(stderr, err)
	return fault.Of(err).ExitCode()
}

func needSubcommand(_ context.Context, cmd *ucli.Command) error {
	if name := cmd.Args().First(); name != "" {
		return fault.New(fault.Usage, fmt.Sprintf("%s has no command %q", cmd.FullName(), name), "see "+cmd.FullName()+" --help")
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

// Env names the environment variable behind a flag: PREBAKE_ and the flag's
// name in upper case.
func Env(flag string) ucli.ValueSourceChain {
	return ucli.EnvVars("PREBAKE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_")))
}

// OutputFlag is --output text|json, for read commands.
func OutputFlag() ucli.Flag {
	return &ucli.StringFlag{
		Name: "output", Aliases: []string{"o"}, Value: "text", Usage: "`FORMAT` of the result: text or json",
		Validator: func(s string) error {
			if s != "text" && s != "json" {
				return fmt.Errorf("output %q: want text or json", s)
			}
			return nil
		},
	}
}

// Print writes a result to stdout: v as indented JSON, or what text writes.
func Print(cmd *ucli.Command, v any, text func(io.Writer) error) error {
	if cmd.String("output") != "json" {
		return text(cmd.Root().Writer)
	}
	enc := json.NewEncoder(cmd.Root().Writer)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// TrustedRootFlag is --trusted-root, for whoever deals with certificates.
func TrustedRootFlag() ucli.Flag {
	return &ucli.StringFlag{Name: "trusted-root", Usage: "`FILE` with the Sigstore root (trusted_root.json) that certificates and time stamps are judged by", Sources: Env("trusted-root")}
}

// TrustFlags are --trusted-root and whom its certificates have to name, for
// commands that verify; the words are cosign's.
func TrustFlags() []ucli.Flag {
	return []ucli.Flag{
		TrustedRootFlag(),
		&ucli.StringFlag{Name: "certificate-identity", Usage: "trust statements signed by `NAME`, a URL or mail address, as a certificate of --trusted-root says", Sources: Env("certificate-identity")},
		&ucli.StringFlag{Name: "certificate-identity-regexp", Usage: "in place of the name, a `PATTERN` for the whole of it", Sources: Env("certificate-identity-regexp")},
		&ucli.StringFlag{Name: "certificate-oidc-issuer", Usage: "`URL` of the OpenID Connect issuer that vouches for the name", Sources: Env("certificate-oidc-issuer")},
	}
}

// LogFlags are --log-level and --log-format, for programs that run long.
func LogFlags() []ucli.Flag {
	return []ucli.Flag{
		&ucli.StringFlag{Name: "log-level", Value: "info", Usage: "least `LEVEL` to log: debug, info, warn or error", Sources: Env("log-level")},
		&ucli.StringFlag{Name: "log-format", Value: "text", Usage: "`FORMAT` of log lines: text or json", Sources: Env("log-format")},
	}
}

// Logger returns the logger that LogFlags ask for; it writes to stderr.
func Logger(cmd *ucli.Command) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cmd.String("log-level"))); err != nil {
		return nil, fault.Wrap(fault.Usage, err, "use --log-level debug, info, warn or error")
	}
	opts := &slog.HandlerOptions{Level: level}
	switch cmd.String("log-format") {
	case "json":
		return slog.New(slog.NewJSONHandler(cmd.Root().ErrWriter, opts)), nil
	case "text":
		return slog.New(slog.NewTextHandler(cmd.Root().ErrWriter, opts)), nil
	}
	return nil, fault.New(fault.Usage, fmt.Sprintf("log format %q", cmd.String("log-format")), "use --log-format text or json")
}
