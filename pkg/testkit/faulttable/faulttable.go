// Package faulttable is for tests that cause faults in phases of a program. It compares the results of a test with a
// table in docs, or writes that table. Fill causes the fault "full disk"; the tests cause other faults themselves. Only
// test files import the package.
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

// Fill writes files until the disk of dir has no space for one more byte.
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

// Table is a table in a document. It is between the comments "NAMEtable: begin" and "NAMEtable: end".
type Table struct {
	File, Name string
	// Head is the heading of the first column, which has the rows' names. Columns are the faults, and Rows are the phases.
	Head    string
	Columns []string
	Rows    []string
	// Seen has the results. Its key is the row, a space, and the column.
	Seen map[string]string
	// Hint is the command that writes the table again. If Update is true, Check writes the table instead of comparing it.
	Hint   string
	Update bool
}

// Check compares the results with the table in the document.
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
		t.Fatalf("%s lacks a mark of the table: want %q and %q", tab.File, start, end)
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
