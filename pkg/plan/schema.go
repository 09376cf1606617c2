package plan

import _ "embed" // for the schema

//go:embed wish-list.schema.json
var schema []byte

// Schema returns the JSON Schema of wish lists, for editors. A test generates it from the types and their comments (go
// test -run TestSchema -update), and checks that docs/wish-list.schema.json is the same.
func Schema() []byte { return append([]byte(nil), schema...) }
