package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
)

// oneArg returns the only argument of a command.
func oneArg(cmd *ucli.Command, what, hint string) (string, error) {
	if cmd.Args().Len() != 1 || cmd.Args().First() == "" {
		return "", fault.New(fault.Usage, cmd.FullName()+" needs one "+what, hint)
	}
	return cmd.Args().First(), nil
}

// answerCommand returns a command that calls the API with its only argument, and prints the response. If the argument
// is missing, the command's error has the given hint.
func answerCommand[T any](name, usage, what, hint string, flags []ucli.Flag,
	call func(context.Context, *api.Client, string) (T, error), show func(io.Writer, T) error) *ucli.Command {
	return &ucli.Command{
		Name: name, Usage: usage, ArgsUsage: what, Flags: flags,
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			arg, err := oneArg(cmd, what, hint)
			if err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			answer, err := call(ctx, c, arg)
			if err != nil {
				return err
			}
			return cli.Print(cmd, answer, func(w io.Writer) error { return show(w, answer) })
		},
	}
}

// quietCommand is like [answerCommand], but its command prints nothing.
func quietCommand(name, usage, what, hint string, call func(context.Context, *api.Client, string) error) *ucli.Command {
	return &ucli.Command{
		Name: name, Usage: usage, ArgsUsage: what, Flags: writeFlags(),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			arg, err := oneArg(cmd, what, hint)
			if err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			return call(ctx, c, arg)
		},
	}
}

const hintBuildID = "give a COS build such as 17800.66.78; to list the COS builds, run: server kernels"

func releaseCommand() *ucli.Command {
	return answerCommand("release", "show the states of a COS build's cells", "BUILD_ID", hintBuildID, clientFlags(),
		func(ctx context.Context, c *api.Client, id string) (api.Release, error) { return c.Release(ctx, id) }, printRelease)
}

func announceCommand() *ucli.Command {
	return answerCommand(
		"announce",
		"announce a COS build: the server looks it up and queues builds for it at once",
		"BUILD_ID",
		hintBuildID,
		writeFlags(),
		func(ctx context.Context, c *api.Client, id string) (api.Release, error) { return c.Announce(ctx, id) },
		printRelease,
	)
}

func printRelease(w io.Writer, r api.Release) error {
	fields := [][2]string{
		{"COS build", r.BuildID}, {"seen", r.SeenAt.Format(time.RFC3339)},
		{"ready", fmt.Sprintf("%d of %d cells, %d open", r.Ready, len(r.Cells), r.Open)},
	}
	if r.Times.Count > 0 {
		fields = append(
			fields,
			[2]string{"seen to ready", fmt.Sprintf("half within %s, all within %s", seconds(r.Times.P50), seconds(r.Times.Max))},
		)
	}
	if err := printFields(w, fields); err != nil || len(r.Cells) == 0 {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	rows := [][]string{}
	for _, cell := range r.Cells {
		note := cell.Reason
		if cell.ReadyAt != nil {
			note = "ready " + cell.ReadyAt.Format(time.RFC3339)
		}
		rows = append(rows, []string{cell.Kernel.Board, cell.Driver.String(), string(cell.State), note})
	}
	return printTable(w, []string{"BOARD", "DRIVER", "STATE", "NOTE"}, rows, "no cell of this COS build was requested yet")
}

func seconds(s float64) string {
	return (time.Duration(s * float64(time.Second))).Round(time.Second).String()
}

func wishListsCommand() *ucli.Command {
	cmd := list("wish-lists", "list or change wish lists, which say what the server queues by itself", clientFlags(),
		func(ctx context.Context, c *api.Client, _ *ucli.Command) ([]api.WishList, error) {
			return c.WishLists(ctx)
		}, printWishLists)
	cmd.Commands = []*ucli.Command{showWishListCommand(), putWishListCommand(), dropWishListCommand()}
	return cmd
}

func printWishLists(w io.Writer, all []api.WishList) error {
	rows := [][]string{}
	for _, l := range all {
		planned, note := "not yet", ""
		if l.PlannedAt != nil {
			planned = l.PlannedAt.Format(time.RFC3339)
		}
		if n := len(l.Problems); n > 0 {
			note = fmt.Sprintf("%d problems: server wish-lists show %s", n, l.Name)
		}
		rows = append(rows, []string{l.Name, strconv.FormatInt(l.Version, 10), strconv.Itoa(l.Cells), planned, note})
	}
	return printTable(
		w,
		[]string{"NAME", "VERSION", "CELLS", "PLANNED", "NOTE"},
		rows,
		"no wish list is stored yet; store one: server wish-lists put NAME FILE",
	)
}

func printWishList(w io.Writer, l api.WishList) error {
	for _, problem := range l.Problems {
		if _, err := fmt.Fprintln(w, "# problem:", problem); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, strings.TrimRight(l.Text, "\n")+"\n")
	return err
}

const hintWishLists = "take the name from the list of wish lists: server wish-lists"

func showWishListCommand() *ucli.Command {
	return answerCommand("show", "print a wish list, with its problems as comments", "NAME", hintWishLists, clientFlags(),
		func(ctx context.Context, c *api.Client, name string) (api.WishList, error) {
			return c.WishList(ctx, name)
		}, printWishList)
}

func putWishListCommand() *ucli.Command {
	return &ucli.Command{
		Name: "put", Usage: "store a wish list, as \"builder build --wish FILE\" takes it", ArgsUsage: "NAME FILE",
		Flags: writeFlags(
			&ucli.Int64Flag{Name: "if-version", Aliases: []string{"version"},
				Usage: "replace the stored wish list only if it has version `NUMBER`; 0 means any version"},
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if cmd.Args().Len() != 2 {
				return fault.New(fault.Usage, cmd.FullName()+" needs a name and a file",
					"give a name for the wish list, and its file: "+cmd.FullName()+" production wish.yaml")
			}
			name, file := cmd.Args().Get(0), cmd.Args().Get(1)
			text, err := os.ReadFile(file)
			if err != nil {
				return fault.Wrap(fault.Usage, fmt.Errorf("read wish list: %w", err), "")
			}
			if _, err := plan.Parse(file, text); err != nil { // the error shows the file's name on this machine
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			l, err := c.PutWishList(ctx, name, api.NewWishList{Text: string(text), Version: cmd.Int64("if-version")})
			if err != nil {
				return err
			}
			return cli.Print(cmd, l, func(w io.Writer) error { return printWishLists(w, []api.WishList{l}) })
		},
	}
}

func dropWishListCommand() *ucli.Command {
	return quietCommand("remove", "remove a wish list; artifacts that were built for it stay", "NAME", hintWishLists,
		func(ctx context.Context, c *api.Client, name string) error { return c.DropWishList(ctx, name) })
}
