package pipeline_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/testkit/faulttable"
)

// checkTable compares the results that a test saw with a table in the documentation.
func checkTable(t *testing.T, name, head string, rows []string, seen map[string]string) {
	t.Helper()
	faulttable.Table{
		File: "../../../docs/reference/faults.md", Name: name, Head: head, Columns: faults, Rows: rows, Seen: seen,
		Hint: "go test ./builder/internal/pipeline -run " + t.Name() + " -update", Update: *update,
	}.Check(t)
}
