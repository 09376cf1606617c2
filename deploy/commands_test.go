package deploy_test

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pb33f/jsonschema/v6"
	"go.yaml.in/yaml/v3"
)

var commandPrograms = []string{"builder", "server", "fetcher"}

// otherValues has the flags whose value has several names in help, with the common meaning of the names.
var otherValues = map[string]string{
	"--to": "where the result goes: a REF, or the FOLDER of a snapshot, which is published as files",
}

// TestFlagsAgree checks, on the generated pages, that a flag takes the same kind of value in every command.
func TestFlagsAgree(t *testing.T) {
	t.Parallel()
	type place struct{ value, where string }
	flags := map[string][]place{}
	for _, program := range commandPrograms {
		for line := range strings.Lines(read(t, "docs/reference/flags-"+program+".md")) {
			cells := strings.Split(strings.ReplaceAll(line, `\|`, ""), " | ")
			if name, ok := strings.CutPrefix(cells[0], "| `"); ok && len(cells) == 5 {
				name, _, _ = strings.Cut(strings.TrimSuffix(name, "`"), ",")
				flags[name] = append(flags[name], place{cells[1], program + " " + strings.Trim(cells[4], " |\n")})
			}
		}
	}
	if len(flags) < 100 {
		t.Fatalf("the pages have %d flags; want more than 100", len(flags))
	}
	for name, places := range flags {
		for _, p := range places[1:] {
			if p.value != places[0].value && otherValues[name] == "" {
				t.Errorf("%s takes %q in %s, and %q in %s; want one name for one thing", name, places[0].value, places[0].where,
					p.value, p.where)
			}
		}
	}
}

// TestManPages checks that mandoc reads the manual pages without a warning. Only a missing date is permitted: the pages
// have the program's version instead.
func TestManPages(t *testing.T) {
	t.Parallel()
	pages, err := filepath.Glob(filepath.Join(root, "docs", "man", "*.1"))
	if err != nil || len(pages) < len(commandPrograms) {
		t.Fatalf("find manual pages: %v, %d of them", err, len(pages))
	}
	out, err := exec.CommandContext(t.Context(), "mandoc",
		append([]string{"-T", "lint", "-W", "warning"}, pages...)...).CombinedOutput()
	if len(out) == 0 && err != nil {
		t.Fatalf("run mandoc: %v; make setup installs it", err)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "missing date") {
			t.Error(strings.TrimSpace(line))
		}
	}
}

// TestConfigSchemas checks the schemas of the configuration files with an independent validator. Each schema must
// accept the example, and refuse the mistakes that the program refuses.
func TestConfigSchemas(t *testing.T) {
	t.Parallel()
	for program, command := range map[string]string{"builder": "work", "server": "serve", "fetcher": "run"} {
		doc, err := jsonschema.UnmarshalJSON(strings.NewReader(read(t, "docs/"+program+"-"+command+".schema.json")))
		if err != nil {
			t.Fatal(err)
		}
		compiler := jsonschema.NewCompiler()
		if err := compiler.AddResource("config.json", doc); err != nil {
			t.Fatal(err)
		}
		schema, err := compiler.Compile("config.json")
		if err != nil {
			t.Fatalf("%s: compile schema: %v", program, err)
		}
		example := read(t, "docs/examples/"+program+".yaml")
		for _, row := range []struct {
			add  string
			want bool
		}{
			{"", true}, {"log-level: debug\n", true}, {"log-level: loud\n", false}, {"nonsense: 1\n", false},
			{"grace: 15\n", false}, {"token: x\n", false}, {"config: x\n", false}, {"kernel-mirror: [x]\n", false},
		} {
			if program == "fetcher" && strings.HasPrefix(row.add, "grace") {
				row.add = "interval: 15\n"
			}
			text := example
			if row.add != "" { // the example may have the setting already
				lines := slices.DeleteFunc(strings.SplitAfter(example, "\n"), func(line string) bool {
					return strings.HasPrefix(line, row.add[:strings.Index(row.add, ":")+1])
				})
				text = strings.Join(lines, "") + row.add
			}
			var value any
			if err := yaml.Unmarshal([]byte(text), &value); err != nil {
				t.Fatal(err)
			}
			raw, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
			if err != nil {
				t.Fatal(err)
			}
			if err := schema.Validate(instance); (err == nil) != row.want {
				t.Errorf("%s: schema takes the example with %q: %v; want %t", program, row.add, err, row.want)
			}
		}
	}
}
