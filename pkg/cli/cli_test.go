package cli_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

func program() *ucli.Command {
	return &ucli.Command{
		Name: "tool",
		Commands: []*ucli.Command{
			{Name: "show", Flags: []ucli.Flag{cli.OutputFlag()}, Action: func(_ context.Context, cmd *ucli.Command) error {
				return cli.Print(cmd, map[string]int{"n": 1},
					func(w io.Writer) error { _, err := io.WriteString(w, "one\n"); return err })
			}},
			{Name: "fail", Action: func(context.Context, *ucli.Command) error {
				return fault.New(fault.Busy, "lock held", "wait for the other one")
			}},
			{Name: "crash", Action: func(context.Context, *ucli.Command) error { return errors.New("boom") }},
			{Name: "twice", Action: func(context.Context, *ucli.Command) error {
				return errors.Join(errors.New("one"),
					errors.New("two"))
			}},
			{Name: "group", Commands: []*ucli.Command{{Name: "inner",
				Action: func(context.Context, *ucli.Command) error { return nil }}}},
		},
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	rows := []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"show", 0, "one\n", ""},
		{"show --output json", 0, "{\n  \"n\": 1\n}\n", ""},
		{"show --output yaml", 0, "\"n\": 1\n", ""}, // in YAML 1.1, n without quotes is a boolean
		{"show --output xml", 2, "", `error: `},
		{"show --nonsense", 2, "", "hint:  see tool show --help"},
		{"fail", 7, "", "error: lock held\nhint:  wait for the other one\n"},
		{"crash", 1, "", "error: boom\n"},
		{"twice", 1, "", "error: one\n       two\n"},
		{"nonsense", 2, "", `tool has no command "nonsense"`},
		{"group nonsense", 2, "", `tool group has no command "nonsense"`},
		{"group inner", 0, "", ""},
	}
	for _, row := range rows {
		var out, errs strings.Builder
		code := cli.Run(t.Context(), program(), append([]string{"tool"}, strings.Fields(row.args)...), &out, &errs)
		if code != row.code || out.String() != row.stdout || !strings.Contains(errs.String(), row.stderr) {
			t.Errorf("tool %s: exit %d, stdout %q, stderr %q; want %d, %q, %q", row.args, code, out.String(), errs.String(),
				row.code, row.stdout, row.stderr)
		}
	}
}

func TestProgressPlain(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	r := &timeline.Run{Watch: cli.Progress(&out)}
	_ = r.Do("fetch", func() (string, error) { r.Progress("fetch", "1/2"); return "done", nil })
	if got := out.String(); strings.Count(got, "\n") != 2 || !strings.Contains(got, "fetch") ||
		!strings.Contains(got, "done") {
		t.Errorf("plain progress = %q; want one line for begin and one for end", got)
	}
}
