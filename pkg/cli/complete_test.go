package cli_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

// completions returns what the program offers as completions of the last word.
func completions(t *testing.T, words ...string) []string {
	t.Helper()
	nothing := func(context.Context, *ucli.Command) error { t.Error("completion ran the command"); return nil }
	root := cli.Complete(&ucli.Command{Name: "tool", Commands: []*ucli.Command{
		{
			Name: "make", Usage: "make a thing", Action: nothing, Flags: slices.Concat(
				cli.Group("What", cli.String("colour", "red", "`COLOUR` of it"), cli.Strings("part", "`NAME` of a part"),
					cli.Bool("blue", "make it blue"), cli.Choice("finish", "matt", "its `FINISH`", "matt", "gloss")),
				cli.Group("Output", cli.OutputFlag()),
			),
		},
		{Name: "lists", Usage: "keep lists", Action: nothing,
			Commands: []*ucli.Command{{Name: "show", Usage: "show one", Action: nothing}}},
		{Name: "secret", Hidden: true, Action: nothing},
	}}, func(_ context.Context, at cli.Place) []cli.Candidate {
		if at.Flag == "part" {
			return []cli.Candidate{{Value: "wheel"}, {Value: "window", About: "of " + at.Value("colour")}, {Value: "bad\nvalue"},
				{Value: "w$(id)"}, {Value: "w`id`"}}
		}
		return []cli.Candidate{{Value: fmt.Sprintf("value-%s-%s-%d", at.Command, at.Flag, len(at.Args))}}
	})
	var out, errs strings.Builder
	if code := cli.Run(t.Context(), root, append([]string{"tool", "__complete", "--"}, words...), &out, &errs); code != 0 {
		t.Fatalf("completion of %q = %d, %s", words, code, errs.String())
	}
	return strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
}

func TestComplete(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		words []string
		want  []string // each has a value, a tab, and the description
	}{
		{"commands", []string{""}, []string{"make\tmake a thing", "lists\tkeep lists",
			"completion\tprint a completion script for bash, zsh or fish", "value---0\t"}},
		{"nothing typed", nil, []string{"make\tmake a thing", "lists\tkeep lists",
			"completion\tprint a completion script for bash, zsh or fish", "value---0\t"}},
		{"a command begun", []string{"ma"}, []string{"make\tmake a thing"}},
		{"commands of a command", []string{"lists", ""}, []string{"show\tshow one", "value-lists--0\t"}},
		{"shells", []string{"completion", "f"}, []string{"fish\tprint the script for fish"}},
		{"flags", []string{"make", "--"}, []string{"--colour\tCOLOUR of it", "--part\tNAME of a part", "--blue\tmake it blue",
			"--finish\tits FINISH", "--output\tFORMAT of the result: text, json or yaml", "--help\tshow help"}},
		{"a flag is given once", []string{"make", "--blue", "--colour", "x", "--part=a", "-o", "json", "-"},
			[]string{"--part\tNAME of a part", "--finish\tits FINISH", "--help\tshow help"}},
		{"values of a flag", []string{"make", "--part", "w"}, []string{"wheel\t", "window\tof red"}},
		{"a flag given before", []string{"make", "--colour=green", "--part", "wi"}, []string{"window\tof green"}},
		{"a value behind =", []string{"make", "--part=wi"}, []string{"--part=window\tof red"}},
		{"the package's own values", []string{"make", "-o", ""}, []string{"text\t", "json\t", "yaml\t"}},
		{"one of a few words", []string{"make", "--finish", "g"}, []string{"gloss\t"}},
		{"no such value", []string{"make", "--output", "x"}, []string{""}},
		{"no such flag", []string{"make", "--odd=x"}, []string{""}},
		{"an argument", []string{"make", "--blue", "one", "v"}, []string{"value-make--1\t"}},
		{"after --", []string{"make", "--", "-x", "value"}, []string{"value-make--1\t"}},
		{"an argument of a name that a command has", []string{"lists", "x", "show", ""}, []string{"value-lists--2\t"}},
	} {
		if diff := cmp.Diff(row.want, completions(t, row.words...)); diff != "" {
			t.Errorf("%s: completion of %q (-want +got):\n%s", row.name, row.words, diff)
		}
	}
}
