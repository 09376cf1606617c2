package main

import (
	"strings"
	"testing"
)

// TestTableFits checks that every table fits a terminal, and still shows the beginning of the last column.
func TestTableFits(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("lakitu-", 12)
	for _, rows := range [][][]string{
		{{"1", "17800.66.78/" + long, "535.261.03-open", "queued"}},
		{{long, long, long, long}},
		{{"1", "2", "3", long}},
		{{long, "2", "3", ""}},
	} {
		var out strings.Builder
		if err := printTable(&out, []string{"ID", "KERNEL", "DRIVER", "NOTE"}, rows, ""); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			if n := len(strings.TrimRight(line, "\n")); n > columns {
				t.Errorf("printTable(%q) has a line of %d columns: %s", rows, n, line)
			}
		}
		if last := rows[0][3]; last != "" && !strings.Contains(out.String(), "  "+last[:min(len(last), minLastColumn-3)]) {
			t.Errorf("printTable(%q) = %s; want %d columns of the last entry at least", rows, out.String(), minLastColumn)
		}
	}
}
