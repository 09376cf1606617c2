package cli_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

func helpOf(t *testing.T, command *ucli.Command, args ...string) string {
	t.Helper()
	command.Action = func(context.Context, *ucli.Command) error { t.Error("help ran the command"); return nil }
	root := &ucli.Command{Name: "tool", Usage: "do things", Commands: []*ucli.Command{command}}
	var out, errs strings.Builder
	if code := cli.Run(t.Context(), root, append([]string{"tool"}, args...), &out, &errs); code != 0 || errs.Len() > 0 {
		t.Fatalf("tool %v = %d, %s", args, code, errs.String())
	}
	return out.String()
}

func TestHelp(t *testing.T) {
	t.Parallel()
	make := func() *ucli.Command {
		return &ucli.Command{
			Name: "make", Usage: "make one thing, or many of them if there is a list of such things to make",
			ArgsUsage:   "NAME",
			Description: "Example:\n  tool make --size 3 x",
			Flags: slices.Concat(
				cli.Group("What", cli.Int("size", 0,
					"`COUNT` of parts; 0 is as many as there are, which a long text says that goes on")),
				cli.Group("Where to", cli.Strings("to", "`FOLDER` for things")),
				cli.Group("What",
					cli.Bool("blue", "make it blue"),
					cli.Duration("longest-time-for-one-thing", 90*time.Minute, "give up after `TIME`"),
				),
				cli.Group("Where to", &ucli.StringFlag{Name: "url", Required: true, Usage: "`URL`"}, cli.OutputFlag()),
			),
		}
	}
	want := `tool make - make one thing, or many of them if there is a list of such things to
make

Usage: tool make [flags] NAME

Example:
  tool make --size 3 x

What:
  --size COUNT              COUNT of parts; 0 is as many as there are, which a
                            long text says that goes on
  --blue                    make it blue
  --longest-time-for-one-thing TIME
                            give up after TIME (default: 1h30m)

Where to:
  --to FOLDER          FOLDER for things; may be repeated
  --url URL            URL (required)
  --output, -o FORMAT  FORMAT of the result: text, json or yaml (default: text)
  --help, -h           show help

All flags but --url and --output can be set by environment variables: PREBAKE_
and the flag's name, as in PREBAKE_LONGEST_TIME_FOR_ONE_THING. A flag overrides
its variable.
`
	for _, args := range [][]string{{"make", "--help"}, {"help", "make"}} {
		if diff := cmp.Diff(want, helpOf(t, make(), args...)); diff != "" {
			t.Errorf("tool %v (-want +got):\n%s", args, diff)
		}
	}
	want = "tool - do things\n\nUsage: tool COMMAND [flags]\n\nCommands:\n  show        show it\n" +
		"  completion  print a completion script for bash, zsh or fish\n\nFlags:\n  --help, -h  show help\n\ntool COMMAND " +
		"--help says more about one command.\n"
	if diff := cmp.Diff(want, helpOf(t, &ucli.Command{Name: "show", Usage: "show it"}, "--help")); diff != "" {
		t.Errorf("tool --help (-want +got):\n%s", diff)
	}
}

// TestHelpEnvironment checks that the help names an environment variable for exactly those flags that have one.
func TestHelpEnvironment(t *testing.T) {
	t.Parallel()
	plain := func(name string) ucli.Flag { return &ucli.BoolFlag{Name: name} }
	odd := &ucli.StringFlag{Name: "cache", Sources: cli.Env("mirror-cache")}
	for _, row := range []struct {
		name  string
		flags []ucli.Flag
		want  string // "" means no text about variables
	}{
		{"none", []ucli.Flag{plain("a")}, ""},
		{"all", []ucli.Flag{cli.Bool("c", ""), cli.Bool("a-b", ""), cli.Bool("d-e", "")},
			"All flags can be set by environment variables: PREBAKE_ and the flag's name, as in PREBAKE_A_B. A flag"},
		{"few", []ucli.Flag{cli.Bool("a", ""), cli.Bool("b", ""), plain("c"), plain("d"), plain("e")},
			"--a and --b can be set by environment variables: PREBAKE_ and the flag's name, as in PREBAKE_A. A flag"},
		{"one", []ucli.Flag{cli.Bool("a", ""), plain("c"), plain("d")},
			"--a can be set by the environment variable PREBAKE_A. A flag"},
		{"another name", []ucli.Flag{odd, plain("c")},
			"--cache can be set by the environment variable PREBAKE_MIRROR_CACHE. A flag"},
	} {
		got := strings.Join(strings.Fields(helpOf(t, &ucli.Command{Name: "x", Flags: row.flags}, "x", "--help")), " ")
		if !strings.Contains(got, row.want) || row.want == "" && strings.Contains(got, "variable") {
			t.Errorf("%s: help is\n%s\nwant %q in it", row.name, got, row.want)
		}
	}
}
