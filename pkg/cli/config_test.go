package cli_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

// configuredProgram returns a program whose command work reads a configuration file and prints its settings.
func configuredProgram() *ucli.Command {
	url := cli.String("url", "", "`URL` of things")
	url.Validator = func(s string) error {
		if !strings.HasPrefix(s, "http") {
			return fmt.Errorf("url: want one that begins with http")
		}
		return nil
	}
	work := func() *ucli.Command {
		return cli.WithConfig(&ucli.Command{
			Name: "work",
			Flags: append([]ucli.Flag{
				url, cli.String("name", "none", "`NAME`"), cli.String("token", "", "`TOKEN`"), cli.Strings("to", "`PLACE`"),
				cli.WasCalled(cli.String("data-dir", "", "`FOLDER`"), "data"),
				cli.Bool("quick", ""), cli.Duration("wait", time.Minute, "`TIME`"), cli.Range("count", 3, 1, 9, "`COUNT`"),
				cli.Choice("mode", "on", "`MODE`", "on", "off"),
			}, cli.LogFlags()...),
			Action: func(_ context.Context, cmd *ucli.Command) error {
				_, err := fmt.Fprintf(cmd.Root().Writer, "%s %q %t %s %d %s\n", cmd.String("name"), cmd.StringSlice("to"),
					cmd.Bool("quick"), cmd.Duration("wait"), cmd.Int("count"), cmd.String("mode"))
				return err
			},
		}, cli.Config{
			Secrets: map[string]string{"token": "token-file"},
			Check: func(cmd *ucli.Command) error {
				var one, two error
				if cmd.Bool("quick") && cmd.IsSet("wait") {
					one = cli.About(fault.New(fault.Usage, "quick does not wait", "leave wait out"), "wait", "quick")
				}
				if cmd.String("mode") == "off" && cmd.IsSet("count") {
					two = cli.About(errors.New("nothing is counted"), "count")
				}
				return fault.Wrap(fault.Usage, errors.Join(one, two), "see tool work --help")
			},
		})
	}
	return &ucli.Command{Name: "tool", Commands: []*ucli.Command{work(), cli.ConfigCommand(work)}}
}

func runConfigured(t *testing.T, text string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "work.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "FILE", file)
	}
	var out, errs strings.Builder
	code = cli.Run(t.Context(), configuredProgram(), append([]string{"tool"}, args...), &out, &errs)
	clean := strings.NewReplacer(file, "work.yaml").Replace
	return code, clean(out.String()), clean(errs.String())
}

// TestConfig checks which setting wins: a flag, then an environment variable, then the file, then the default.
func TestConfig(t *testing.T) {
	t.Setenv("PREBAKE_COUNT", "5")
	const text = "name: 535.10\nto: [a, \"b,c\"]\nquick: true\ncount: 7\n"
	for _, row := range []struct{ args, want string }{
		{"work", "none [] false 1m0s 5 on\n"},
		{"work --config FILE", "535.10 [\"a\" \"b,c\"] true 1m0s 5 on\n"},
		{"work --config FILE --name x --quick=false --count 2 --to z", "x [\"z\"] false 1m0s 2 on\n"},
		{"config check FILE", "work.yaml: no mistake\n"},
		{"config check FILE -- --name x", "work.yaml: no mistake\n"},
	} {
		if code, out, errs := runConfigured(t, text, strings.Fields(row.args)...); code != 0 || out != row.want {
			t.Errorf("tool %s = %d, %q, %s; want %q", row.args, code, out, errs, row.want)
		}
	}
	_, out, _ := runConfigured(t, text, "config", "show", "FILE", "--", "--name", "x")
	want := `url                            (default)
name                         x  (flag)
token                          (default)
to                           a, b,c  (work.yaml:2)
data-dir                       (default)
quick                        true  (work.yaml:3)
wait                         1m0s  (default)
count                        5  (PREBAKE_COUNT)
mode                         on  (default)
log-level                    info  (default)
log-format                   text  (default)
`
	if diff := cmp.Diff(want, out); diff != "" {
		t.Errorf("tool config show (-want +got):\n%s", diff)
	}
}

// TestConfigMistakes checks that each mistake in a file is reported with its line and column.
func TestConfigMistakes(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, text, want string }{
		{"unknown key", "name: x\ncuont: 2\n",
			`work.yaml:2:1: found setting "cuont", which tool work does not have; the nearest is count`},
		{"earlier name", "data: /x\n",
			`work.yaml:1:1: found setting "data", which tool work does not have; the nearest is data-dir`},
		{"the file itself", "config: x.yaml\n", `work.yaml:1:1: found setting "config"`},
		{"help", "help: true\n", `work.yaml:1:1: found setting "help"`},
		{"twice", "count: 2\ncount: 3\n", `work.yaml:2:1: found field "count" twice; want it once`},
		{"text for a number", "count: two\n", `work.yaml:1:8: count: found "two"; want a number`},
		{"quoted number", "count: \"2\"\n", `work.yaml:1:8: count: found "2"; want a number`},
		{"out of range", "count: 10\n", "work.yaml:1:8: count: count 10: want a number from 1 to 9"},
		{"not one of few", "mode: maybe\n", `work.yaml:1:7: mode: mode "maybe": want on or off`},
		{"its own parser", "url: ftp://x\n", "work.yaml:1:6: url: url: want one that begins with http"},
		{"number for a time", "wait: 5\n", `work.yaml:1:7: wait: found "5"; want a time, such as 90s, 15m or 2h`},
		{"not a time", "wait: soon\n", `work.yaml:1:7: wait: found "soon"; want a time`},
		{"text for a boolean", "quick: yes\n", `work.yaml:1:8: quick: found "yes"; want true or false`},
		{"boolean for a text", "name: true\n", `work.yaml:1:7: name: found "true"; want a text`},
		{"list for a text", "name: [a]\n", "work.yaml:1:7: name: found a list; want a text"},
		{"text for a list", "to: a\n", `work.yaml:1:5: to: found "a"; want a list of texts`},
		{"mapping in a list", "to:\n- a\n- {b: c}\n", "work.yaml:3:3: to[1]: found a mapping; want a text"},
		{"nothing", "name:\n", "work.yaml:1:6: name: found nothing; want a text"},
		{"secret", "token: abc\n", "work.yaml:1:8: token: found a secret in a file that many may read; want token-file"},
		{"password in a URL", "url: http://u:secret@h/\n",
			"work.yaml:1:6: url: found a password in a URL; want it in the environment"},
		{"password in a list", "to: [\"https://u:secret@h/\"]\n",
			"work.yaml:1:6: to[0]: found a password in a URL; want it in the environment: PGPASSFILE for a database, or " +
				"PREBAKE_TO"},
		{"private key", "name: |\n  -----BEGIN PRIVATE KEY-----\n",
			"work.yaml:1:7: name: found a private key; want the path of a file that contains the key"},
		{"password in a query", "url: https://h/?SSLpassword=secret\n", "work.yaml:1:6: url: found a password in a URL"},
		{"signed URL", "to: [\"https://h/o?X-Goog-Signature=abc\"]\n", "work.yaml:1:6: to[0]: found a password in a URL"},
		{"presigned URL", "to: [\"https://h/o?X-Amz-Date=20261129T000000Z&X-Amz-Signature=abc\"]\n",
			"work.yaml:1:6: to[0]: found a password in a URL"},
		{"session token", "url: https://h/o?X-Amz-Security-Token=abc\n", "work.yaml:1:6: url: found a password in a URL"},
		{"older signed URL", "url: https://h/o?Expires=1&Signature=abc\n", "work.yaml:1:6: url: found a password in a URL"},
		{"access token", "url: https://h/o?access_token=abc\n", "work.yaml:1:6: url: found a password in a URL"},
		{"password in what is no URL", "url: \"http://u:%secret@h\"\n", "work.yaml:1:6: url: found a password in a URL"},
		{"negative time", "wait: -5m\n", `work.yaml:1:7: wait: found "-5m"; want a time`},
		{"do not go together", "quick: true\nwait: 2m\n", "work.yaml:2:1: wait: quick does not wait; leave wait out"},
		{"alias", "name: &a x\n", "work.yaml:1:7: name: found an anchor or alias"},
		{"not a mapping", "- a\n", "work.yaml:1:1: found a list; want a mapping of settings"},
		{"all at once", "count: 2\nmode: off\nquick: true\nwait: 2m\nx: 1\n",
			"3 mistakes\n       work.yaml:1:1: count: nothing is counted\n       work.yaml:4:1: wait: quick"},
	} {
		for _, args := range [][]string{{"config", "check", "FILE"}, {"work", "--config", "FILE"}} {
			code, out, errs := runConfigured(t, row.text, args...)
			if code != 2 || out != "" || !strings.Contains(errs, row.want) {
				t.Errorf("%s: tool %v = %d, %q, %s; want %q", row.name, args, code, out, errs, row.want)
			}
			if strings.Contains(errs, "secret@") || strings.Contains(errs, "abc") {
				t.Errorf("%s: tool %v prints the secret: %s", row.name, args, errs)
			}
		}
	}
	code, _, errs := runConfigured(t, "", "config", "check", "/does/not/exist")
	if code != 2 || !strings.Contains(errs, "no such file") {
		t.Errorf("config check of no file = %d, %s; want 2 and the cause", code, errs)
	}
	code, _, errs = runConfigured(t, "count: 2\n", "config", "check", "FILE", "extra")
	if code != 2 || !strings.Contains(errs, "put -- before the flags of work") {
		t.Errorf("config check with an argument = %d, %s; want 2 and a hint", code, errs)
	}
}

// TestConfigRest checks that an error that no line of the file causes keeps its kind and its hint.
func TestConfigRest(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ text, args string }{
		{"count: 2\n", "work --config FILE --count 3 --mode off"},
		{"count: 2\n", "config check FILE -- --count 3 --mode off"},
		{"name: x\n", "config check FILE -- --count 3 --mode off"},
	} {
		code, _, errs := runConfigured(t, row.text, strings.Fields(row.args)...)
		if want := "error: nothing is counted\nhint:  see tool work --help\n"; code != 2 || errs != want {
			t.Errorf("tool %s = %d, %q; want 2, %q", row.args, code, errs, want)
		}
	}
}

// TestConfigEmptyVariable checks that an empty environment variable does not override the file, and that an empty flag
// does.
func TestConfigEmptyVariable(t *testing.T) {
	t.Setenv("PREBAKE_NAME", "")
	for args, want := range map[string]string{
		"work --config FILE":         "x [] false 1m0s 3 on\n",
		"work --config FILE --name=": " [] false 1m0s 3 on\n",
		"work":                       " [] false 1m0s 3 on\n",
	} {
		if code, out, errs := runConfigured(t, "name: x\n", strings.Fields(args)...); code != 0 || out != want {
			t.Errorf("tool %s with PREBAKE_NAME= = %d, %q, %s; want %q", args, code, out, errs, want)
		}
	}
}

// TestEarlierVariable checks an environment variable under its earlier name. If the variables with the new and the
// earlier name are both set and differ, the command must refuse them.
func TestEarlierVariable(t *testing.T) {
	t.Setenv("PREBAKE_DATA", "/old")
	if code, _, errs := runConfigured(t, "", "work"); code != 0 {
		t.Errorf("tool work with the earlier variable = %d, %s; want 0", code, errs)
	}
	t.Setenv("PREBAKE_DATA_DIR", "/new")
	want := "error: set --data-dir: PREBAKE_DATA_DIR and its earlier name PREBAKE_DATA are both set, and differ\n" +
		"hint:  unset PREBAKE_DATA\n"
	if code, _, errs := runConfigured(t, "", "work"); code != 2 || errs != want {
		t.Errorf("tool work with two variables = %d, %q; want 2, %q", code, errs, want)
	}
	if code, _, errs := runConfigured(t, "", "work", "--data-dir", "/x"); code != 0 {
		t.Errorf("tool work --data-dir with two variables = %d, %s; want 0", code, errs)
	}
	t.Setenv("PREBAKE_DATA", "/new")
	if code, _, errs := runConfigured(t, "", "work"); code != 0 {
		t.Errorf("tool work with two variables of one value = %d, %s; want 0", code, errs)
	}
}

// TestConfigShowSecrets checks that "config show" prints no secret, not even one inside a list.
func TestConfigShowSecrets(t *testing.T) {
	t.Parallel()
	_, out, errs := runConfigured(t, "name: x\n", "config", "show", "FILE", "--", "--token", "pw",
		"--to", "https://h/a?sig=pw", "--to", "oci://h/r@sha256:0", "--url", "http://u:%pw@h")
	if strings.Contains(out, "pw") || !strings.Contains(out, "(not shown), oci://h/r@sha256:0") {
		t.Errorf("tool config show = %s, %s; want no secret, and the rest of the list", out, errs)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("name: x\nto: [a]\ncount: 2\n")
	f.Add("wait: 2m\nquick: true\n? [a]\n: b\n")
	f.Fuzz(func(t *testing.T, text string) {
		if code, _, errs := runConfigured(t, text, "config", "check", "FILE"); code != 0 && code != 2 {
			t.Errorf("config check of %q = %d, %s; want 0 or 2", text, code, errs)
		}
	})
}
