package target_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

func TestLabel(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		label string
		wish  target.Wish
		fits  string // a version that may have the label
		not   string // a version that must not have the label
	}{
		{"DEFAULT", target.Default, "535.261.03", ""},
		{"LATEST", target.Latest, "580.1.1", ""},
		{"R535", "R535", "535.261.03", "580.1.1"},
		{"R1000", "R1000", "1000.1", "100.1"},
		{"default", "", "", "535.261.03"},
		{"Latest", "", "", "535.261.03"},
		{"r535", "", "", "535.261.03"},
		{"535.261.03", "", "", "535.261.03"},
		{"", "", "", "535.261.03"},
	} {
		wish, err := target.ParseLabel(row.label)
		if wish != row.wish || (err == nil) != (row.wish != "") {
			t.Errorf("ParseLabel(%q) = %q, %v; want %q", row.label, wish, err, row.wish)
		}
		if row.fits != "" {
			if err := target.CheckLabel(row.label, row.fits); err != nil {
				t.Errorf("CheckLabel(%q, %q) = %v; want nil", row.label, row.fits, err)
			}
		}
		if row.not != "" {
			if err := target.CheckLabel(row.label, row.not); err == nil {
				t.Errorf("CheckLabel(%q, %q) = nil; want an error", row.label, row.not)
			}
		}
	}
}
