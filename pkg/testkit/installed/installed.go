// Package installed gives tests the programs and the database that deploy/setup.sh installs. Without them, a test
// fails, so that no run of the suite leaves it out unnoticed. A run with -short, as make unit and make race are, needs
// no set-up, and skips such a test. The package installs nothing, and only tests import it.
package installed

import (
	"os"
	"os/exec"
	"testing"
)

// PostgresEnv is the environment variable with the URL of the PostgreSQL database for tests.
const PostgresEnv = "PREBAKE_TEST_POSTGRES"

// Program returns the path of a program that one of the Debian packages in deploy/setup.sh contains.
func Program(t testing.TB, name string) (path string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name+" is not on PATH: make setup installs it (deploy/setup.sh)")
	}
	return path
}

// Programs checks that all of these programs are there. See [Program].
func Programs(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		Program(t, name)
	}
}

// Postgres returns the URL of the PostgreSQL database for tests. Other tests use the database at the same time.
func Postgres(t testing.TB) (url string) {
	t.Helper()
	if url = os.Getenv(PostgresEnv); url == "" {
		missing(t, PostgresEnv+" is not set: deploy/postgres.sh sets it, as in deploy/postgres.sh go test ./server/...")
	}
	return url
}

// missing ends a test that cannot run.
func missing(t testing.TB, what string) {
	t.Helper()
	if testing.Short() {
		t.Skip(what)
	}
	t.Fatal(what + "; with -short, this test is skipped")
}
