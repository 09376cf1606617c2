// Package configcheck is for tests of programs. It writes mistakes into the example of a configuration file, and checks
// that "config check" reports each mistake with its line and column. Only test files import it.
package configcheck

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
)

// Row is one mistake. Check writes the text Put in place of the text Instead, or at the end if Instead is "". The error
// must have Want directly after "FILE:", where FILE is the path of the checked file. If Want is "", there must be no
// error. In Want, LAST means the number of the first line after the example, and LAST+1 the number of the next line.
type Row = struct{ Name, Put, Instead, Want string }

// Check runs the program's "config check" on the example, once with each mistake. program must return a new command
// tree at each call.
func Check(t *testing.T, example string, program func() *ucli.Command, rows []Row) {
	t.Helper()
	raw, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Count(string(raw), "\n")
	numbers := strings.NewReplacer("LAST+1", strconv.Itoa(lines+2), "LAST", strconv.Itoa(lines+1))
	for _, row := range rows {
		text, want := string(raw)+row.Put, numbers.Replace(row.Want)
		if row.Instead != "" {
			if !strings.Contains(string(raw), row.Instead) {
				t.Fatalf("%s: the example has no %q", row.Name, row.Instead)
			}
			text = strings.Replace(string(raw), row.Instead, row.Put, 1)
		}
		file := filepath.Join(t.TempDir(), "x.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, errs strings.Builder
		root := program()
		code := cli.Run(t.Context(), root, []string{root.Name, "config", "check", file}, &out, &errs)
		if want == "" {
			if code != 0 || !strings.HasSuffix(out.String(), ": no mistake\n") {
				t.Errorf("%s: config check = %d, %s; want no mistake", row.Name, code, errs.String())
			}
			continue
		}
		if code != 2 || !strings.Contains(errs.String(), "\n       "+file+":"+want) {
			t.Errorf("%s: config check = %d, %s; want 2 and %q", row.Name, code, errs.String(), want)
		}
	}
}
