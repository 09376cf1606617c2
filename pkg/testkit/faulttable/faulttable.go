// Package faulttable is for tests that inject faults into phases and write what happened to
// them into a table in docs. Only test files import it. It refuses to know any fault but a
// full disk.
package faulttable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Fill writes files until not one byte more goes onto the disk that dir is on.
func Fill(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	chunk := make([]byte, 1<<20)
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), chunk, 0o644)
		if errors.Is(err, syscall.ENOSPC) {
			if len(chunk) == 1 {
				return nil
			}
			chunk = chunk[:len(chunk)/16+1]
			continue
		}
		if err != nil {
			return err
		}
	}
}

// Table is a table in a document, between the marks "NAMEtable: begin" and "NAMEtable: end".
type Table struct {
	File, Name string
	// Head is over the rows, Columns are the faults.
	Head    string
	Columns []string
	Rows    []string
	// Seen has what was seen, by row, a blank, and column.
	Seen map[string]string
	// Hint is how to write it anew; Update does that.
	Hint   string
	Update bool
}

// Check compares what was seen with what the document says.
func (tab Table) Check(t *testing.T) {
	t.Helper()
	start, end := "<!-- "+tab.Name+"table: begin -->\n", "<!-- "+tab.Name+"table: end -->\n"
	var table strings.Builder
	fmt.Fprintf(&table, "| %s | %s |\n|---|%s\n", tab.Head, strings.Join(tab.Columns, " | "),
		strings.Repeat("---|", len(tab.Columns)))
	for _, row := range tab.Rows {
		cells := []string{row}
		for _, column := range tab.Columns {
			cells = append(cells, tab.Seen[row+" "+column])
		}
		fmt.Fprintf(&table, "| %s |\n", strings.Join(cells, " | "))
	}
	text, err := os.ReadFile(tab.File)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), start)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table", tab.File)
	}
	switch {
	case old == table.String():
	case tab.Update:
		if err := os.WriteFile(tab.File,
			slices.Concat([]byte(before), []byte(start), []byte(table.String()), []byte(end), []byte(after)),
			0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s says\n%s\nand this run saw\n%s\nrun: %s", tab.File, old, table.String(), tab.Hint)
	}
}
