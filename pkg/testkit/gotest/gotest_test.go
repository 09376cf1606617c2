package gotest_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/gotest"
)

// lack is an environment variable. If it is set, the test TestPart is skipped.
const lack = "PREBAKE_TEST_LACK"

// TestCheck runs this program's own tests.
func TestCheck(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ name, run, lack, verbose, want string }{
		{"passed", "^TestPart$", "", "-test.v", ""},
		{"skipped", "^TestPart$", "a kernel", "-test.v", "a test was skipped"},
		{"one of two skipped", "^(TestPart|TestOther)$", "a kernel", "-test.v", "a test was skipped"},
		{"no such test", "^TestParts$", "", "-test.v", "no test of a package has such a name"},
		{"failed", "(", "", "-test.v", "exit status"},
		{"without -v", "^TestPart$", "a kernel", "-test.v=false", "no test passed"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), self, "-test.run="+row.run, row.verbose)
			cmd.Env = append(os.Environ(), lack+"="+row.lack)
			out, err := cmd.CombinedOutput()
			err = gotest.Check(out, err)
			if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
				t.Errorf("Check = %v; want %q, for\n%s", err, row.want, out)
			}
		})
	}
}

// TestPart is a test that TestCheck runs.
func TestPart(t *testing.T) {
	if what := os.Getenv(lack); what != "" {
		t.Skip("there is no " + what)
	}
}

// TestOther is a test that TestCheck runs.
func TestOther(*testing.T) {}
