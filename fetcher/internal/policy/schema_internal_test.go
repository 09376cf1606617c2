package policy

import (
	"bytes"
	"encoding/json"
	"flag"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/invopop/jsonschema"

	"github.com/prebake/prebake/pkg/testkit/golden"
)

var update = flag.Bool("update", false, "rewrite the generated schema")

// generate makes the JSON schema of a policy from the Go types, their tags and their comments.
func generate(t *testing.T) []byte {
	t.Helper()
	r := &jsonschema.Reflector{Anonymous: true, ExpandedStruct: true, DoNotReference: true}
	if err := r.AddGoComments("github.com/prebake/prebake/fetcher/internal/policy", ".",
		jsonschema.WithFullComment()); err != nil {
		t.Fatal(err)
	}
	s := r.Reflect(&File{})
	revoked, _ := s.Properties.Get("revoked")
	revoked.Items.Pattern = "^sha256:[0-9a-f]{64}$"
	s.ID = "https://prebake.dev/schema/policy.json"
	s.Title = "Prebake policy"
	out, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(out, '\n')
}

// TestSchema checks that the embedded JSON schema, and its copy in docs, match the Go types.
func TestSchema(t *testing.T) {
	t.Parallel()
	want := generate(t)
	docs := filepath.Join("..", "..", "..", "docs", "policy.schema.json")
	golden.Check(t, *update, want, "policy.schema.json", docs)
	if !*update && !bytes.Equal(Schema(), want) {
		t.Error("Schema() is not the generated one")
	}
}

// TestSchemaFields checks that the schema and the parser use the same name for each field, and that the parser refuses
// a field that the schema does not have.
func TestSchemaFields(t *testing.T) {
	t.Parallel()
	typ := reflect.TypeFor[File]()
	for i := range typ.NumField() {
		name, _, _ := bytes.Cut([]byte(typ.Field(i).Tag.Get("json")), []byte(","))
		if yaml := typ.Field(i).Tag.Get("yaml"); yaml != string(name) {
			t.Errorf("%s is %q in the schema and %q to the parser", typ.Field(i).Name, name, yaml)
		}
	}
	if _, err := Parse([]byte("version: 1\nrevoke: [x]\n")); err == nil {
		t.Error("a field that nobody knows is passed over")
	}
}
