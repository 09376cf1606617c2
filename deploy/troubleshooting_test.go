package deploy_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestTroubleshootingPage checks that the page about troubleshooting has a row for each exit code.
func TestTroubleshootingPage(t *testing.T) {
	t.Parallel()
	text := read(t, "docs/how-to/troubleshooting.md")
	for _, k := range fault.Kinds() {
		if row := fmt.Sprintf("\n| %d %s | ", k.ExitCode(), k); strings.Count(text, row) != 1 {
			t.Errorf("docs/how-to/troubleshooting.md has %d rows for %q; want 1", strings.Count(text, row), row[3:])
		}
	}
}
