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
	db, lose := ownDatabase(t, "both")
	backUpAndRestore(t, []string{"--database", db}, copies{
		backup: func(t *testing.T, dir, folder string) {
			t.Helper()
			token, err := os.ReadFile(filepath.Join(dir, "token"))
			if err != nil {
				t.Fatal(err)
			}
			put(t, filepath.Join(folder, "token"), token)
			postgres(t, "pg_dump", "--format=custom", "--file="+filepath.Join(folder, "prebake.dump"), "--dbname="+db)
		},
		restore: func(t *testing.T, folder, dir string) {
			t.Helper()
			lose()
			postgres(t, "pg_restore", "--exit-on-error", "--dbname="+db, filepath.Join(folder, "prebake.dump"))
			copyFolder(t, folder, dir)
		},
	})
}

// ownDatabase makes a PostgreSQL database for one test, and returns its URL. lose drops the database and makes an empty
// one in its place.
func ownDatabase(t *testing.T, purpose string) (raw string, lose func()) {
	t.Helper()
	raw = installed.Postgres(t)
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	name := "prebake_" + purpose + "_" + strconv.Itoa(os.Getpid())
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
	return u.String(), func() {
		t.Helper()
		do("DROP DATABASE " + name)
		do("CREATE DATABASE " + name)
	}
}

// postgres runs a program of the newest PostgreSQL on this machine, as deploy/postgres.sh does.
func postgres(t *testing.T, program string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), filepath.Join(postgresFolder(t), program),
		args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", program, err, out)
	}
}

// postgresFolder returns the folder with the programs of the newest PostgreSQL on this machine.
func postgresFolder(t *testing.T) string {
	t.Helper()
	all, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(all) == 0 {
		t.Fatalf("no programs in /usr/lib/postgresql, %v; want what make setup installs", err)
	}
	slices.Sort(all)
	return all[len(all)-1]
}
