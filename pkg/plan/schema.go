package plan

import _ "embed" // for the schema

//go:embed wish-list.schema.json
var schema []byte

// Schema returns the JSON Schema of wish lists, for editors. It is generated from the types and their comments: go test
// -run TestSchema -update.
func Schema() []byte { return append([]byte(nil), schema...) }
