package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// The constants groupWhat, groupServer and groupOutput are headings in the output of --help.
const (
	groupWhat   = cli.What
	groupServer = cli.From
	groupOutput = cli.Advanced
)

// clientFlags returns a command's own flags and the flags of all client commands, such as the server's URL.
func clientFlags(own ...ucli.Flag) []ucli.Flag {
	return slices.Concat(
		cli.Group(groupWhat, own...),
		cli.Group(groupServer, cli.String("server", "http://127.0.0.1:8440", "`URL` of the server")),
		cli.Group(groupOutput, cli.OutputFlag()),
	)
}

// writeFlags returns the flags of [clientFlags], and two flags for the caller's token.
func writeFlags(own ...ucli.Flag) []ucli.Flag {
	return append(clientFlags(own...), cli.Group(cli.Trust,
		cli.String("token", "", "`TOKEN` for the server; prefer --token-file"),
		cli.String("token-file", "", "`FILE` with the token for the server"),
	)...)
}

func client(cmd *ucli.Command) (*api.Client, error) {
	token := cmd.String("token")
	if file := cmd.String("token-file"); token == "" && file != "" {
		var err error
		if token, err = readToken(file); err != nil {
			return nil, err
		}
	}
	return api.NewClient(cmd.String("server"), token, nil), nil
}

// noArgs returns an error if a command without arguments gets one.
func noArgs(cmd *ucli.Command) error {
	if first := cmd.Args().First(); first != "" {
		return fault.New(
			fault.Usage,
			fmt.Sprintf("%s takes no argument, got %q", cmd.FullName(), first),
			"see "+cmd.FullName()+" --help",
		)
	}
	return nil
}

// list returns a command that prints one of the API's lists as a table.
func list[T any](
	name, usage string,
	flags []ucli.Flag,
	get func(context.Context, *api.Client, *ucli.Command) ([]T, error),
	table func(io.Writer, []T) error,
) *ucli.Command {
	return &ucli.Command{
		Name: name, Usage: usage, Flags: flags,
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			all, err := get(ctx, c, cmd)
			if err != nil {
				return err
			}
			return cli.Print(cmd, all, func(w io.Writer) error { return table(w, all) })
		},
	}
}

func buildCommand() *ucli.Command {
	return &ucli.Command{
		Name: "build", Usage: "show one build, or its log", ArgsUsage: "ID",
		Flags: clientFlags(
			&ucli.BoolFlag{Name: "log", Usage: "print the build's log so far"},
			&ucli.BoolFlag{Name: "follow", Usage: "print the build's log as it grows, until the build has ended"},
		),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			id, err := strconv.ParseInt(cmd.Args().First(), 10, 64)
			if err != nil || cmd.Args().Len() != 1 {
				return fault.New(fault.Usage, cmd.FullName()+" needs the number of one build",
					"take the number from the list of builds: server builds")
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			if cmd.Bool("follow") {
				return api.FollowLog(ctx, c, id, followEvery, cmd.Root().Writer)
			}
			if cmd.Bool("log") {
				log, err := c.BuildLog(ctx, id)
				if err != nil {
					return err
				}
				_, err = io.Copy(cmd.Root().Writer, log)
				if cerr := log.Close(); err == nil {
					err = cerr
				}
				return err
			}
			b, err := c.Build(ctx, id)
			if err != nil {
				return err
			}
			return cli.Print(cmd, b, func(w io.Writer) error { return printBuild(w, b) })
		},
	}
}

// followEvery is the pause between two reads of a growing log. Builders send their logs at the same interval.
const followEvery = 2 * time.Second

func requestCommand() *ucli.Command {
	flags := append(
		cellFlags(true),
		&ucli.BoolFlag{Name: "wait", Usage: "wait until the build has ended"},
	)
	return &ucli.Command{
		Name: "request", Usage: "request a build of a cell",
		Description: `If the cell is already queued or being built, the answer is the build of that
cell. With --wait, stderr shows the build's place in the queue, when the build
may be ready, and each phase. If the build fails, the exit status is the one of
the failure's class (docs/reference/exit-codes.md).

Example:
  server request --build-id 17800.66.78 --driver R535 --wait --token-file token`,
		Flags: writeFlags(flags...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			b, err := c.RequestBuild(ctx, api.BuildRequest(cellOf(cmd)))
			if err != nil {
				return err
			}
			if cmd.Bool("wait") {
				if b, err = waitForBuild(ctx, c, b, cmd.Root().ErrWriter); err != nil {
					return err
				}
			}
			if err := cli.Print(cmd, b, func(w io.Writer) error { return printBuild(w, b) }); err != nil {
				return err
			}
			return errUnlessPublished(cmd.Bool("wait"), b)
		},
	}
}

// errUnlessPublished returns an error if the caller waited for a build that was not published. A build without a class
// was cancelled. A class that this program does not know counts as internal, and is in the text.
func errUnlessPublished(waited bool, b api.Build) error {
	if !waited || b.State == api.Published {
		return nil
	}
	kind, err := fault.Parse(b.Class)
	text := b.Error
	switch {
	case b.Class == "":
		kind = fault.Cancelled
	case err != nil:
		text = b.Class + ": " + text
	}
	return fault.New(kind, fmt.Sprintf("build %d %s: %s", b.ID, b.State, text), b.Hint)
}

func cancelCommand() *ucli.Command {
	return &ucli.Command{
		Name: "cancel", Usage: "cancel a build that is queued or running", ArgsUsage: "ID", Flags: writeFlags(),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			id, err := strconv.ParseInt(cmd.Args().First(), 10, 64)
			if err != nil || cmd.Args().Len() != 1 {
				return fault.New(fault.Usage, cmd.FullName()+" needs the number of one build",
					"take the number from the list of builds: server builds")
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			b, err := c.Cancel(ctx, id)
			if err != nil {
				return err
			}
			return cli.Print(cmd, b, func(w io.Writer) error { return printBuild(w, b) })
		},
	}
}

func yankCommand() *ucli.Command {
	return &ucli.Command{
		Name: "yank", Usage: "withdraw an artifact: no node gets it any more", ArgsUsage: "DIGEST",
		Flags: writeFlags(
			&ucli.StringFlag{Name: "reason", Required: true, Usage: "`WHY` no node may use the artifact; nodes show this text"},
			&ucli.StringFlag{Name: "replacement",
				Usage: "`DIGEST` of the artifact that nodes use instead; it must have the same kernels, " +
					"and the same or a newer driver"},
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			return markArtifact(cmd, func(c *api.Client, digest string) (api.Artifact, error) {
				return c.Yank(ctx, digest, api.YankRequest{Reason: cmd.String("reason"), Replacement: cmd.String("replacement")})
			})
		},
	}
}

func unyankCommand() *ucli.Command {
	return &ucli.Command{
		Name: "unyank", Usage: "allow a yanked artifact again", ArgsUsage: "DIGEST", Flags: writeFlags(),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			return markArtifact(cmd, func(c *api.Client, digest string) (api.Artifact, error) { return c.Unyank(ctx, digest) })
		},
	}
}

func freeTagsCommand() *ucli.Command {
	c := answerCommand(
		"free-tags",
		"let another artifact take the tags of a deleted one",
		"DIGEST",
		"take the digest from the message of the refused push",
		writeFlags(),
		func(ctx context.Context, c *api.Client, digest string) (api.FreedTags, error) {
			return c.FreeTags(ctx, digest)
		},
		func(w io.Writer, f api.FreedTags) error {
			_, err := fmt.Fprintln(w, strings.Join(f.Tags, "\n"))
			return err
		},
	)
	c.Description = `In repositories that match --create-only of "server serve", the tags of an
artifact that was deleted from the server's registry accept only the same
artifact. Run this when another one must replace it, for example after the
mirror's kernel headers were corrected.
Nodes verify signatures, not tags. But whoever pulls by tag gets other content.`
	return c
}

func markArtifact(cmd *ucli.Command, call func(*api.Client, string) (api.Artifact, error)) error {
	if cmd.Args().Len() != 1 {
		return fault.New(fault.Usage, cmd.FullName()+" needs one digest",
			"take the digest from the list of artifacts: server artifacts")
	}
	c, err := client(cmd)
	if err != nil {
		return err
	}
	a, err := call(c, cmd.Args().First())
	if err != nil {
		return err
	}
	return cli.Print(cmd, a, func(w io.Writer) error { return printArtifacts(w, []api.Artifact{a}) })
}

func printBuild(w io.Writer, b api.Build) error {
	lines := [][2]string{
		{"build", strconv.FormatInt(b.ID, 10)}, {"kernel", b.Kernel.String()}, {"driver", b.Driver.String()},
		{"state", string(b.State)}, {"phase", b.Phase}, {"worker", b.Worker}, {"class", b.Class}, {"error", b.Error},
		{"hint", b.Hint}, {"digest", b.Digest}, {"log", logState(b)},
	}
	if err := printFields(w, lines); err != nil || len(b.Phases) == 0 {
		return err
	}
	return timeline.Print(w, "timeline", b.Phases)
}

// logState says when the server removed the build's log. It returns "" if the server has removed no log.
func logState(b api.Build) string {
	if b.LogRemovedAt == nil {
		return ""
	}
	return "removed on " + b.LogRemovedAt.UTC().Format(time.DateOnly) + " to save space (server serve --keep-logs)"
}
