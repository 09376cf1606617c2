package deploy_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

var update = flag.Bool("update", false, "write the generated parts of documents again")

// TestGeneratedExitCodes checks that the table on the page equals the table of package fault.
func TestGeneratedExitCodes(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	table.WriteString("| code | name | meaning | worth a retry |\n|---:|---|---|---|\n| 0 | | done | |\n")
	for _, k := range fault.Kinds() {
		retry := ""
		if k.Retryable() {
			retry = "yes"
		}
		fmt.Fprintf(&table, "| %d | %s | %s | %s |\n", k.ExitCode(), k, k.What(), retry)
	}
	checkPart(t, "docs/reference/exit-codes.md", "exit codes", table.String())
}

// checkPart compares one part of a page with want. Two marker comments enclose the part. With -update, it writes the
// part.
func checkPart(t *testing.T, name, part, want string) {
	t.Helper()
	begin := fmt.Sprintf("<!-- begin generated: %s (make generate) -->\n", part)
	end := fmt.Sprintf("<!-- end generated: %s -->", part)
	text := read(t, name)
	head, rest, ok := strings.Cut(text, begin)
	got, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no markers for %q", name, part)
	}
	if got == want {
		return
	}
	if !*update {
		t.Fatalf("%s, %s (-want +got); run make generate:\n%s", name, part, cmp.Diff(want, got))
	}
	if err := os.WriteFile(filepath.Join(root, name), []byte(head+begin+want+end+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}
