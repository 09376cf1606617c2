package importrule

import "testing"

func TestWithin(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		pkg, folder string
		want        bool
	}{
		{"github.com/x/y", "github.com/x/y", true}, {"github.com/x/y/z", "github.com/x/y", true},
		{"github.com/x/yz", "github.com/x/y", false}, {"testing", "testing", true}, {"testing/fstest", "testing", false},
	} {
		if got := belongsTo(row.pkg, row.folder); got != row.want {
			t.Errorf("within(%s, %s) = %v; want %v", row.pkg, row.folder, got, row.want)
		}
	}
}
