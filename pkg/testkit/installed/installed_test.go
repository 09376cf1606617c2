package installed_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/installed"
)

// needs is an environment variable. It tells this program that TestMissing runs it, and what to look for.
const needs = "PREBAKE_TEST_NEEDS"

// TestMissing runs a test that needs a program or the database, on a machine that lacks it and on one that has it.
func TestMissing(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	here := t.TempDir()
	if err := os.WriteFile(here+"/zstd", nil, 0o755); err != nil { // nothing runs it, so it may be empty
		t.Fatal(err)
	}
	for _, row := range []struct {
		name, what, path, url string
		short                 bool
		want                  []string
	}{
		{"no program", "zstd", "/nonexistent", "", false,
			[]string{"--- FAIL: TestNeeds", "zstd is not on PATH", "make setup"}},
		{"no program, short", "zstd", "/nonexistent", "", true, []string{"--- SKIP: TestNeeds", "zstd is not on PATH"}},
		{"program", "zstd", here, "", false, []string{"found " + here + "/zstd", "--- PASS: TestNeeds"}},
		{"no database", "postgres", "", "", false,
			[]string{"--- FAIL: TestNeeds", "PREBAKE_TEST_POSTGRES is not set", "deploy/postgres.sh"}},
		{"no database, short", "postgres", "", "", true, []string{"--- SKIP: TestNeeds", "PREBAKE_TEST_POSTGRES is not set"}},
		{"database", "postgres", "", "postgres:///x", true, []string{"found postgres:///x", "--- PASS: TestNeeds"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			args := []string{"-test.v", "-test.run=^TestNeeds$"}
			if row.short {
				args = append(args, "-test.short")
			}
			cmd := exec.CommandContext(t.Context(), self, args...)
			cmd.Env = []string{needs + "=" + row.what, "PATH=" + row.path, installed.PostgresEnv + "=" + row.url}
			out, err := cmd.CombinedOutput()
			text := string(out)
			if (err != nil) != strings.HasPrefix(row.want[0], "--- FAIL") {
				t.Errorf("%v\n%s", err, text)
			}
			for _, want := range row.want {
				if !strings.Contains(text, want) {
					t.Errorf("the test printed no %q:\n%s", want, text)
				}
			}
		})
	}
}

// TestNeeds is the test that TestMissing runs.
func TestNeeds(t *testing.T) {
	switch what := os.Getenv(needs); what {
	case "":
	case "postgres":
		t.Logf("found %s", installed.Postgres(t))
	default:
		installed.Programs(t, what)
		t.Logf("found %s", installed.Program(t, what))
	}
}
