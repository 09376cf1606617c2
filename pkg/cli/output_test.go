package cli_test

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ucli "github.com/urfave/cli/v3"
	"go.yaml.in/yaml/v3"

	"github.com/prebake/prebake/pkg/cli"
)

// printOutput runs a command that prints the value v, and returns the output.
func printOutput(t *testing.T, v any, args ...string) string {
	t.Helper()
	root := &ucli.Command{Name: "tool", Commands: []*ucli.Command{
		{Name: "show", Flags: []ucli.Flag{cli.OutputFlag()}, Action: func(_ context.Context, cmd *ucli.Command) error {
			return cli.Print(cmd, v, func(io.Writer) error { return nil })
		}},
		{Name: "follow", Flags: []ucli.Flag{cli.OutputFlag()}, Action: func(_ context.Context, cmd *ucli.Command) error {
			for range 2 {
				if err := cli.PrintOne(cmd, v, func(io.Writer) error { return nil }); err != nil {
					return err
				}
			}
			return nil
		}},
	}}
	var out, errs strings.Builder
	if code := cli.Run(t.Context(), root, append([]string{"tool"}, args...), &out, &errs); code != 0 {
		t.Fatalf("tool %v = %d, %s", args, code, errs.String())
	}
	return out.String()
}

// TestYAML checks that YAML output has the keys of JSON output in the same order. A string that looks like a number
// must stay a string.
func TestYAML(t *testing.T) {
	t.Parallel()
	type inner struct {
		Version string `json:"version"`
		Empty   string `json:"empty,omitempty"`
	}
	v := struct {
		Zone  inner    `json:"zone"`
		Alpha []inner  `json:"alpha"`
		None  []string `json:"none"`
		No    any      `json:"no"`
		Big   int64    `json:"big"`
		Share float64  `json:"share"`
		Texts []string `json:"texts"`
	}{
		Zone: inner{Version: "535.10"}, Alpha: []inner{{Version: "1e3"}}, None: []string{}, Big: 1 << 60, Share: 1e21,
		Texts: []string{"yes", "0x1f", "1:30", "null", "~", "", " lead", "tail ", "a: b", "- x", "line 1\nline 2\n",
			"\x7f\x1b[0m", "ü <b> \u2028", "#no"},
	}
	got := printOutput(t, v, "show", "--output", "yaml")
	if !strings.HasPrefix(got, "zone:\n  version: \"535.10\"\nalpha:\n  - version: \"1e3\"\nnone: []\n") {
		t.Errorf("YAML = %s; want the keys in the order of JSON", got)
	}
	var fromYAML, fromJSON any
	if err := yaml.Unmarshal([]byte(got), &fromYAML); err != nil {
		t.Fatalf("Unmarshal(%s) = %v", got, err)
	}
	if err := json.Unmarshal([]byte(printOutput(t, v, "show", "-o", "json")), &fromJSON); err != nil {
		t.Fatal(err)
	}
	// Go decodes JSON's numbers into floats here. So the test encodes both values again and compares the texts.
	a, err := json.Marshal(fromYAML)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(fromJSON)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(string(b), "1152921504606847000", "1152921504606846976", 1)
	if diff := cmp.Diff(want, string(a)); diff != "" {
		t.Errorf("YAML says something else than JSON (-json +yaml):\n%s\n%s", diff, got)
	}
}

// TestPrintOne checks a command that prints several results: each is one line of JSON, or one document of YAML.
func TestPrintOne(t *testing.T) {
	t.Parallel()
	v := map[string]int{"n": 1}
	for format, want := range map[string]string{"json": "{\"n\":1}\n{\"n\":1}\n", "yaml": "---\n\"n\": 1\n---\n\"n\": 1\n",
		"text": ""} {
		if got := printOutput(t, v, "follow", "--output", format); got != want {
			t.Errorf("PrintOne() as %s = %q; want %q", format, got, want)
		}
	}
}
