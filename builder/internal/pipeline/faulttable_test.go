package pipeline_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

const tableFile = "../../../docs/faults.md"

// checkTable compares what was seen with a table in the documentation.
func checkTable(t *testing.T, name, head string, rows []string, seen map[string]string) {
	t.Helper()
	start, end := "<!-- "+name+"table: begin -->\n", "<!-- "+name+"table: end -->\n"
	var table strings.Builder
	fmt.Fprintf(&table, "| %s | %s |\n|---|%s\n", head, strings.Join(faults, " | "), strings.Repeat("---|", len(faults)))
	for _, row := range rows {
		cells := []string{row}
		for _, kind := range faults {
			cells = append(cells, seen[row+" "+kind])
		}
		fmt.Fprintf(&table, "| %s |\n", strings.Join(cells, " | "))
	}
	text, err := os.ReadFile(tableFile)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), start)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", tableFile)
	}
	switch {
	case old == table.String():
	case *update:
		if err := os.WriteFile(tableFile, slices.Concat([]byte(before), []byte(start), []byte(table.String()), []byte(end), []byte(after)), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s says\n%s\nand this run saw\n%s\nrun: go test ./builder/internal/pipeline -run %s -update", tableFile, old, table.String(), t.Name())
	}
}
