package plan

import (
	"bytes"
	"encoding/json"
	"flag"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/invopop/jsonschema"

	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/golden"
)

var update = flag.Bool("update", false, "rewrite the generated schema")

// versionPattern matches a driver version. Unlike [target.ValidVersion], it accepts a flavour's name as a suffix.
const versionPattern = `[0-9]{1,5}(\.[0-9]{1,5}){1,3}(-[a-z][a-z0-9]{0,15}){0,2}`

func TestVersionPattern(t *testing.T) {
	t.Parallel()
	pattern := regexp.MustCompile("^" + versionPattern + "$")
	for _, v := range []string{"535.261.03", "535.54", "535.129.03-grid", "550.54.15-grid-gcp", "535", "535.261.03-",
		"535.261.03-Grid", "535.1-a-b-c", "535.1-" + strings.Repeat("a", 17), "1.2.3.4.5", ""} {
		if got, want := pattern.MatchString(v), target.ValidVersion(v); got != want {
			t.Errorf("the schema takes %q: %t; the parser: %t", v, got, want)
		}
	}
}

// generate makes the JSON schema of wish lists from the types, their tags and their comments.
func generate(t *testing.T) []byte {
	t.Helper()
	r := &jsonschema.Reflector{Anonymous: true, ExpandedStruct: true, DoNotReference: true}
	if err := r.AddGoComments("github.com/prebake/prebake/pkg/plan", ".", jsonschema.WithFullComment()); err != nil {
		t.Fatal(err)
	}
	words := func(values ...any) *jsonschema.Schema { return &jsonschema.Schema{Type: "string", Enum: values} }
	r.Mapper = func(typ reflect.Type) *jsonschema.Schema {
		switch typ {
		case reflect.TypeFor[target.Flavour]():
			return words(string(target.Proprietary), string(target.Open))
		case reflect.TypeFor[target.Arch]():
			return words(string(target.AMD64), string(target.ARM64))
		case reflect.TypeFor[Driver]():
			form := r.Reflect(DriverForm{})
			form.Version = ""
			// YAML reads 535.54 as a number, so the schema accepts numbers as versions.
			version, _ := form.Properties.Get("version")
			*version = jsonschema.Schema{Description: version.Description, OneOf: []*jsonschema.Schema{
				{Type: "string", Pattern: `^` + versionPattern + `$`}, {Type: "number"},
			}}
			labels, _ := form.Properties.Get("labels")
			labels.Items.Pattern = `^(DEFAULT|LATEST|R[0-9]{3,4})$`
			form.OneOf = []*jsonschema.Schema{{Required: []string{"version"}}, {Required: []string{"branch"}}}
			return &jsonschema.Schema{OneOf: []*jsonschema.Schema{
				{Type: "string", Pattern: `^((default|latest|R[0-9]{3,4})(@[A-Z0-9][A-Z0-9_]{0,63})?|` + versionPattern + `)$`},
				{Type: "number"}, form,
			}}
		}
		return nil
	}
	s := r.Reflect(&Wish{})
	kernels, _ := s.Properties.Get("kernels")
	kernels.Items.OneOf = []*jsonschema.Schema{{Required: []string{"build"}}, {Required: []string{"latest"}}}
	s.ID = "https://prebake.dev/schema/wish-list.json"
	s.Title = "Prebake wish list"
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(out, '\n')
}

// TestSchema checks that the embedded schema and the schema in docs are those that generate makes.
func TestSchema(t *testing.T) {
	t.Parallel()
	want := generate(t)
	golden.Check(t, *update, want, "wish-list.schema.json", filepath.Join("..", "..", "docs", "wish-list.schema.json"))
	if !*update && !bytes.Equal(Schema(), want) {
		t.Error("Schema() is not the generated one")
	}
}

// TestSchemaFields checks that the parser knows each property of the schema.
func TestSchemaFields(t *testing.T) {
	t.Parallel()
	for where, typ := range map[string]reflect.Type{
		"": reflect.TypeFor[Wish](), "kernels": reflect.TypeFor[Kernel](), "drivers": reflect.TypeFor[DriverForm](),
		"exclude": reflect.TypeFor[Exclude](),
	} {
		for i := range typ.NumField() {
			f := typ.Field(i)
			if !f.IsExported() {
				continue
			}
			name, _, _ := bytes.Cut([]byte(f.Tag.Get("json")), []byte(","))
			text := string(name) + ": [[]]\n" // no field accepts a list of lists, so the error for a known field is another one
			if where != "" {
				text = where + ":\n- " + text
			}
			_, err := Parse("w.yaml", []byte(text))
			if err == nil || bytes.Contains([]byte(err.Error()), []byte("found field")) {
				t.Errorf("Parse(%q) = %v; want the field known", text, err)
			}
		}
	}
}
