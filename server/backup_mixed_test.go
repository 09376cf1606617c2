package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// restoreDump puts a dump in place of what a PostgreSQL database has, as docs/how-to/back-up.md says.
func restoreDump(t *testing.T, db, file string) {
	t.Helper()
	postgres(t, "pg_restore", "--clean", "--if-exists", "--no-owner", "--single-transaction", "--exit-on-error",
		"--dbname="+db, file)
}

// TestBackupMixed backs up a server with one database in SQLite and the other one in PostgreSQL. The command must copy
// the SQLite file, and say when to dump the other database.
func TestBackupMixed(t *testing.T) {
	t.Parallel()
	t.Run("queue in PostgreSQL", func(t *testing.T) {
		t.Parallel()
		db, _ := ownDatabase(t, "queue")
		flags := []string{"--queue", db}
		backUpAndRestore(t, flags, copies{
			backup: func(t *testing.T, dir, folder string) {
				t.Helper()
				postgres(t, "pg_dump", "--format=custom", "--file="+filepath.Join(dir, "queue.dump"), "--dbname="+db)
				code, out, errs := run(t, append([]string{"backup", "--data", dir, folder}, flags...)...)
				if code != 0 || !strings.Contains(out, ": catalogue.db, token\nnot copied: the queue, ") ||
					!strings.Contains(out, "before this command") {
					t.Fatalf("backup = %d\n%s%s\nwant 0, the catalogue, and when to dump the queue", code, out, errs)
				}
				if err := os.Rename(filepath.Join(dir, "queue.dump"), filepath.Join(folder, "queue.dump")); err != nil {
					t.Fatal(err)
				}
				checkIntact(t, filepath.Join(folder, "catalogue.db"))
			},
			restore: func(t *testing.T, folder, dir string) {
				t.Helper()
				restoreDump(t, db, filepath.Join(folder, "queue.dump"))
				copyFolder(t, folder, dir)
			},
		})
	})
	t.Run("catalogue in PostgreSQL", func(t *testing.T) {
		t.Parallel()
		db, lose := ownDatabase(t, "catalogue")
		file := filepath.Join(t.TempDir(), "queue.db")
		flags := []string{"--database", db, "--queue", "sqlite://" + file}
		backUpAndRestore(t, flags, copies{
			backup: func(t *testing.T, dir, folder string) {
				t.Helper()
				code, out, errs := run(t, append([]string{"backup", "--output", "json", "--data", dir, folder}, flags...)...)
				var got backupResult
				if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 ||
					!cmp.Equal(got.Dump, []dump{{"catalogue", "after"}}) {
					t.Fatalf("backup = %d\n%s%s, %v\nwant 0, and when to dump the catalogue", code, out, errs, err)
				}
				postgres(t, "pg_dump", "--format=custom", "--file="+filepath.Join(folder, "catalogue.dump"), "--dbname="+db)
			},
			restore: func(t *testing.T, folder, dir string) {
				t.Helper()
				lose()
				restoreDump(t, db, filepath.Join(folder, "catalogue.dump"))
				copyFolder(t, folder, dir)
				for _, left := range []string{file, file + "-wal", file + "-shm"} {
					if err := os.Remove(left); err != nil && !os.IsNotExist(err) {
						t.Fatal(err)
					}
				}
				if err := os.Rename(filepath.Join(dir, "queue.db"), file); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
}

// TestQueueOfAnotherTime restores a catalogue beside a queue that is older, newer or empty. Each open build must then
// have a job for its own cell, and no job may be without a build.
func TestQueueOfAnotherTime(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"older", "newer", "empty"} {
		t.Run(when, func(t *testing.T) {
			t.Parallel()
			db, lose := ownDatabase(t, when)
			flags := []string{"--queue", db, "--token", scriptToken}
			dir, folder := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "backup")
			url, stop, _ := start(t, dir, flags...)
			want := map[int64]string{}
			ask := func(url, buildID string) {
				t.Helper()
				b, err := api.NewClient(url, scriptToken, nil).RequestBuild(t.Context(), api.BuildRequest{BuildID: buildID,
					Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
				if err != nil {
					t.Fatal(err)
				}
				want[b.ID] = buildID
			}
			ask(url, "17800.1.1")
			dump := filepath.Join(t.TempDir(), "queue.dump")
			postgres(t, "pg_dump", "--format=custom", "--file="+dump, "--dbname="+db)
			ask(url, "17800.1.2") // the dump does not have this build
			if code, out, errs := run(t, "backup", "--data", dir, "--queue", db, folder); code != 0 {
				t.Fatalf("backup = %d\n%s%s\nwant 0", code, out, errs)
			}
			backedUp := maps.Clone(want)
			ask(url, "17800.1.3") // the backup does not have these builds
			ask(url, "17800.1.4")
			if code := stop(); code != 0 {
				t.Fatalf("stop = %d; want 0", code)
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			copyFolder(t, folder, dir)
			switch when {
			case "older":
				restoreDump(t, db, dump)
			case "empty":
				lose()
			}
			url, _, _ = start(t, dir, flags...)
			want = backedUp
			ask(url, "17800.1.5")
			checkJobs(t, db, want)
		})
	}
}

// TestWrongCatalogue starts a server with the wrong catalogue beside the farm's queue: an old one, or an empty one that
// gets a build. Then it starts the server with the right catalogue again. All builds of the right catalogue must then
// have a job, and the server must accept the start of each.
func TestWrongCatalogue(t *testing.T) {
	t.Parallel()
	for _, wrong := range []string{"old", "empty"} {
		t.Run(wrong, func(t *testing.T) {
			t.Parallel()
			db, _ := ownDatabase(t, "wrong_"+wrong)
			flags := []string{"--queue", db, "--token", scriptToken}
			right, other := filepath.Join(t.TempDir(), "right"), filepath.Join(t.TempDir(), "wrong")
			ask := func(url, buildID string) int64 {
				t.Helper()
				b, err := api.NewClient(url, scriptToken, nil).RequestBuild(t.Context(), api.BuildRequest{BuildID: buildID,
					Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
				if err != nil {
					t.Fatal(err)
				}
				return b.ID
			}
			end := func(stop func() int) {
				t.Helper()
				if code := stop(); code != 0 {
					t.Fatalf("stop = %d; want 0", code)
				}
			}
			url, stop, _ := start(t, right, flags...)
			want, inWrong := map[int64]string{}, map[int64]string{}
			if wrong == "old" {
				first := ask(url, "17800.1.1")
				want[first], inWrong[first] = "17800.1.1", "17800.1.1"
				end(stop)
				copyFolder(t, right, other)
				url, stop, _ = start(t, right, flags...)
			}
			for _, buildID := range []string{"17800.1.2", "17800.1.3"} {
				want[ask(url, buildID)] = buildID
			}
			end(stop)
			url, stop, _ = start(t, other, flags...)
			inWrong[ask(url, "17800.1.4")] = "17800.1.4"
			checkJobs(t, db, inWrong)
			end(stop)
			url, _, _ = start(t, right, flags...)
			checkJobs(t, db, want)
			q, err := queue.Open(t.Context(), db)
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			ctx, done := context.WithTimeout(t.Context(), time.Minute)
			defer done()
			got := map[int64]string{}
			err = q.Work(ctx, "w1", 1, func(ctx context.Context, j api.BuildJob, attempt int) error {
				_, err := api.NewClient(url, scriptToken, nil).UpdateBuild(ctx, j.Build,
					api.BuildUpdate{State: api.Building, Worker: "w1", Attempt: attempt})
				if err != nil {
					t.Errorf("start of build %d: %v", j.Build, err)
				}
				if got[j.Build] = j.BuildID; len(got) == len(want) {
					done()
				}
				return nil
			})
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("Work() = %v; builds (-want +got):\n%s", err, diff)
			}
		})
	}
}

// checkJobs waits until the queue has open jobs for exactly these builds, and checks the COS build of each job.
func checkJobs(t *testing.T, url string, want map[int64]string) {
	t.Helper()
	q, err := queue.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(time.Minute); ; {
		open, err := q.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(open)))
		if diff == "" {
			break
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("builds with an open job (-want +got):\n%s", diff)
		}
	}
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for build, buildID := range want {
		var got string
		if err := db.QueryRowContext(t.Context(), `SELECT args->>'build_id' FROM river_job
WHERE args->>'build' = $1 AND state = 'available'`, strconv.FormatInt(build, 10)).Scan(&got); err != nil || got != buildID {
			t.Errorf("the job of build %d is for COS build %q, %v; want %s", build, got, err, buildID)
		}
	}
}

// podCommands is a program in place of kubectl: there is no cluster. It runs what "kubectl exec" runs in a pod, on this
// machine. Other commands of kubectl do nothing. It writes each call to the file $CALLS. If a call contains the text
// $BREAK, the program in the pod gets only the first 1,000 bytes, as if the connection broke off.
const podCommands = `#!/bin/bash
echo "$*" >> "$CALLS"
cut=
[[ -z "$BREAK" || "$*" != *"$BREAK"* ]] || cut=yes
while [ $# -gt 0 ] && [ "$1" != exec ]; do shift; done
while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done
[ $# -gt 1 ] || exit 0
shift
[ -z "$cut" ] || exec "$@" < <(head -c 1000)
exec "$@"
`

// TestBackupPage runs the commands by which docs/how-to/back-up.md backs up a cluster and restores it, as a person
// pastes them. The catalogue is in SQLite, and the queue in PostgreSQL, as in deploy/kubernetes/base/server.yaml. An
// earlier backup broke off. A restore from a broken file must change nothing. A restore that breaks off must not start
// the server. A restore that follows must be complete.
func TestBackupPage(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/how-to/back-up.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n## On a cluster\n")
	section, _, _ = strings.Cut(section, "\n## ")
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(section, -1)
	if len(blocks) < 2 || !strings.Contains(blocks[0][1], "server backup") ||
		!strings.Contains(blocks[1][1], "pg_restore") {
		t.Fatalf("back-up.md has %d blocks for a cluster; want the backup, then the restore", len(blocks))
	}
	db, _ := ownDatabase(t, "page")
	flags := []string{"--queue", db, "--token", scriptToken}
	dir, home, bin := filepath.Join(t.TempDir(), "state"), t.TempDir(), t.TempDir()
	kubectl := filepath.Join(bin, "kubectl")
	if err := os.WriteFile(kubectl, []byte(podCommands), 0o755); err != nil { //nolint:gosec // run below
		t.Fatal(err)
	}
	calls := filepath.Join(home, "calls")
	try := func(block, breakAt string) (string, error) {
		t.Helper()
		if err := os.WriteFile(calls, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(block, "/var/lib/prebake", dir)
		text = strings.ReplaceAll(text, "/usr/local/bin/server", "server")
		cmd := exec.CommandContext(t.Context(), "bash", "-c", text)
		cmd.Dir = home
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+postgresFolder(t)+":"+os.Getenv("PATH"), "PREBAKE_QUEUE="+db,
			"CALLS="+calls, "BREAK="+breakAt)
		said, err := cmd.CombinedOutput()
		return string(said), err
	}
	follow := func(block string) {
		t.Helper()
		if said, err := try(block, ""); err != nil || !strings.HasSuffix(said, "complete\n") {
			t.Fatalf("%s%v\n%s", block, err, said)
		}
	}
	refuse := func(block, breakAt string) {
		t.Helper()
		said, err := try(block, breakAt)
		if all, rerr := os.ReadFile(calls); rerr != nil || err == nil || strings.Contains(string(all), "--replicas 1") {
			t.Errorf("the restore ends with %v, %v; want an error before the server starts\n%s%s", err, rerr, said, all)
		}
	}
	url, stop, _ := start(t, dir, flags...)
	c, key := api.NewClient(url, scriptToken, nil), testkit.NewKey(t)
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	yanked := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	kept := testkit.NewSample(t, key, testkit.SampleKernel("48"), driver, "")
	for _, s := range []testkit.Sample{yanked, kept} {
		publish(t, url, scriptToken, s)
		record(t, c, s)
	}
	if _, err := c.Yank(t.Context(), yanked.Digest, api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}
	ask := func(buildID string) api.Build {
		t.Helper()
		b, err := c.RequestBuild(t.Context(), api.BuildRequest{BuildID: buildID, Board: "lakitu", Driver: driver.Version,
			Flavour: string(driver.Flavour)})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	queued := ask("17800.1.1")
	if err := os.Mkdir(filepath.Join(dir, "backup"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "backup", "catalogue.db"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	follow(blocks[0][1])
	if left, err := os.ReadDir(dir); err != nil || slices.ContainsFunc(left,
		func(e os.DirEntry) bool { return e.Name() == "backup" }) {
		t.Errorf("the server's folder has %v, %v; want no backup left there", left, err)
	}
	later := ask("17800.1.2")
	if _, err := c.Unyank(t.Context(), yanked.Digest); err != nil {
		t.Fatal(err)
	}
	if err := c.PutBuildLog(t.Context(), later.ID, strings.NewReader("later\n")); err != nil {
		t.Fatal(err)
	}
	if code := stop(); code != 0 {
		t.Fatalf("stop = %d; want 0", code)
	}
	good := filepath.Join(home, "prebake-2026-11-29", "data.tar")
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, length := range []int{0, len(data) / 2} { // no file, and half a file
		if err := os.Remove(good); err != nil {
			t.Fatal(err)
		}
		if length > 0 {
			if err := os.WriteFile(good, data[:length], 0o600); err != nil {
				t.Fatal(err)
			}
		}
		refuse(blocks[1][1], "")
		for _, name := range []string{"catalogue.db", "registry", "logs"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				t.Errorf("after a restore without a complete file: %v", err)
			}
		}
		if err := os.WriteFile(good, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refuse(blocks[1][1], "tar -xf")
	follow(blocks[1][1])
	url, stop, _ = start(t, dir, flags...)
	if _, err := api.NewClient(url, scriptToken, nil).Unyank(t.Context(), yanked.Digest); err != nil {
		t.Fatal(err)
	}
	if code := stop(); code != 0 {
		t.Fatalf("stop = %d; want 0", code)
	}
	follow(blocks[1][1]) // each restore is complete, not only the first
	url, _, _ = start(t, dir, flags...)
	c = api.NewClient(url, scriptToken, nil)
	for s, want := range map[*testkit.Sample]api.State{&yanked: api.Yanked, &kept: api.Published} {
		if r := resolved(t, c, *s); r.State != want {
			t.Errorf("Resolve(%s) after the restore = %s; want %s", s.Kernel, r.State, want)
		}
	}
	if _, err := c.Build(t.Context(), later.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("Build(%d) after the restore = %v; want not found, because it is newer than the backup", later.ID, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "logs", strconv.FormatInt(later.ID, 10)+".log")); !os.IsNotExist(err) {
		t.Errorf("the log of build %d after the restore: %v; want none", later.ID, err)
	}
	checkJobs(t, db, map[int64]string{queued.ID: "17800.1.1"})
	pem := filepath.Join(home, "farm.pub")
	if err := os.WriteFile(pem, key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, errs := run(t, "reindex", "--server", url, "--public-key", pem, "--token", scriptToken); code != 0 ||
		!strings.Contains(out, "no differences") {
		t.Errorf("reindex = %d\n%s%s\nwant 0, no differences: the registry was restored, too", code, out, errs)
	}
}
