package main

import (
	"database/sql"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/installed"
)

// TestBackupPostgres backs up databases of PostgreSQL with PostgreSQL's own programs, as docs/how-to/back-up.md says.
func TestBackupPostgres(t *testing.T) {
	t.Parallel()
	raw := installed.Postgres(t)
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	// The test makes a database for itself, because it will drop it.
	name := "prebake_lost_" + strconv.Itoa(os.Getpid())
	admin, err := sql.Open("pgx", raw)
	if err != nil {
		t.Fatal(err)
	}
	do := func(statement string) {
		t.Helper()
		if _, err := admin.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	do("CREATE DATABASE " + name)
	t.Cleanup(func() {
		if _, err := admin.Exec("DROP DATABASE " + name + " WITH (FORCE)"); err != nil {
			t.Error(err)
		}
		if err := admin.Close(); err != nil {
			t.Error(err)
		}
	})
	u.Path = "/" + name
	backUpAndRestore(t, []string{"--database", u.String()}, copies{
		backup: func(t *testing.T, dir, folder string) {
			t.Helper()
			token, err := os.ReadFile(filepath.Join(dir, "token"))
			if err != nil {
				t.Fatal(err)
			}
			put(t, filepath.Join(folder, "token"), token)
			postgres(t, "pg_dump", "--format=custom", "--file="+filepath.Join(folder, "prebake.dump"), "--dbname="+u.String())
		},
		restore: func(t *testing.T, folder, dir string) {
			t.Helper()
			do("DROP DATABASE " + name) // simulates the loss of the database
			do("CREATE DATABASE " + name)
			postgres(t, "pg_restore", "--exit-on-error", "--dbname="+u.String(), filepath.Join(folder, "prebake.dump"))
			copyFolder(t, folder, dir)
		},
	})
}

// postgres runs a program of the newest PostgreSQL on this machine, as deploy/postgres.sh does.
func postgres(t *testing.T, program string, args ...string) {
	t.Helper()
	all, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + program)
	if err != nil || len(all) == 0 {
		t.Fatalf("no %s in /usr/lib/postgresql, %v; want what make setup installs", program, err)
	}
	slices.Sort(all)
	if out, err := exec.CommandContext(t.Context(), all[len(all)-1], args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", program, err, out)
	}
}
