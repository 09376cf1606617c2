package main

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// copies are the operator's two steps: back up a database and the token, and restore them.
type copies struct {
	backup  func(t *testing.T, dir, folder string)
	restore func(t *testing.T, folder, dir string)
}

// TestBackup backs up and restores SQLite databases as "server backup --help" says.
func TestBackup(t *testing.T) {
	t.Parallel()
	backUpAndRestore(t, nil, copies{
		backup: func(t *testing.T, dir, folder string) {
			t.Helper()
			code, out, errs := run(t, "backup", "--data", dir, folder)
			left, registry := "", filepath.Join(dir, "registry")
			for _, name := range []string{"repos", "blobs", "damaged"} {
				left += "  " + filepath.Join(registry, name) + "\n"
			}
			if code != 0 || !strings.Contains(out, "queue.db, catalogue.db, token") || !strings.Contains(out, left) {
				t.Fatalf("backup = %d\n%s%s\nwant 0, what was copied, and what is left", code, out, errs)
			}
			for _, name := range []string{"queue.db", "catalogue.db", "token"} {
				if info, err := os.Stat(filepath.Join(folder, name)); err != nil || info.Mode().Perm() != 0o600 {
					t.Errorf("%s in the backup: %v, %v; want mode 0600", name, info, err)
				}
			}
			if code, _, errs := run(t, "backup", "--data", dir, folder); code != fault.Usage.ExitCode() ||
				!strings.Contains(errs, "exists already") {
				t.Errorf("backup over a backup = %d %s; want usage", code, errs)
			}
			checkIntact(t, filepath.Join(folder, "catalogue.db"))
			checkIntact(t, filepath.Join(folder, "queue.db"))
		},
		restore: copyFolder,
	})
}

// TestBackupOfOneFile backs up a server that keeps catalogue and queue in the same file.
func TestBackupOfOneFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "both.db")
	flags := []string{"--database", "sqlite://" + file, "--queue", "sqlite://" + file}
	backUpAndRestore(t, flags, copies{
		backup: func(t *testing.T, dir, folder string) {
			t.Helper()
			code, out, errs := run(t, append([]string{"backup", "--data", dir, folder}, flags...)...)
			if code != 0 || !strings.Contains(out, ": catalogue.db, token") {
				t.Fatalf("backup = %d\n%s%s\nwant 0, and one database", code, out, errs)
			}
		},
		restore: func(t *testing.T, folder, dir string) {
			t.Helper()
			copyFolder(t, folder, dir)
			for _, left := range []string{file + "-wal", file + "-shm"} {
				if err := os.Remove(left); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
			}
			if err := os.Rename(filepath.Join(dir, "catalogue.db"), file); err != nil {
				t.Fatal(err)
			}
		},
	})
}

// backUpAndRestore backs up a running server, deletes its data, and restores it. Artifacts that were published after
// the backup must be in the catalogue again after `server reindex --apply`.
func backUpAndRestore(t *testing.T, flags []string, copies copies) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	url, stop, _ := start(t, dir, flags...)
	secret := secretOf(t, dir)
	c := api.NewClient(url, secret, nil)
	key := testkit.NewKey(t)
	driver := target.Driver{Version: "535.261.03", Flavour: target.Open}
	yanked := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	before := testkit.NewSample(t, key, testkit.SampleKernel("48"), driver, "")
	after := testkit.NewSample(t, key, testkit.SampleKernel("49"), driver, "")
	for _, s := range []testkit.Sample{yanked, before} {
		publish(t, url, secret, s)
		record(t, c, s)
	}
	if _, err := c.Yank(t.Context(), yanked.Digest, api.YankRequest{Reason: "panics"}); err != nil {
		t.Fatal(err)
	}

	// A client requests builds without a pause until the backup has ended.
	var mu sync.Mutex
	var asked []api.Build
	writing, enough := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	begun := make(chan struct{})
	writer.Go(func() {
		for n := 0; writing.Err() == nil; n++ {
			b, err := c.RequestBuild(t.Context(), api.BuildRequest{BuildID: "17800.1." + strconv.Itoa(n), Board: "lakitu",
				Driver: driver.Version, Flavour: string(driver.Flavour)})
			if err != nil {
				t.Errorf("RequestBuild() beside the backup = %v; want none", err)
			}
			mu.Lock()
			asked = append(asked, b)
			mu.Unlock()
			if n == 20 || err != nil && n < 20 {
				close(begun)
			}
			if err != nil {
				return
			}
		}
	})
	<-begun
	mu.Lock()
	atLeast := len(asked)
	mu.Unlock()
	folder := filepath.Join(t.TempDir(), "backup")
	copies.backup(t, dir, folder)
	enough()
	writer.Wait()
	publish(t, url, secret, after)
	record(t, c, after)
	for _, name := range []string{"repos", "blobs"} {
		copyFolder(t, filepath.Join(dir, "registry", name), filepath.Join(folder, "registry", name))
	}

	if code := stop(); code != 0 {
		t.Fatalf("stop = %d; want 0", code)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	copies.restore(t, folder, dir)
	url, _, _ = start(t, dir, flags...)
	if got := secretOf(t, dir); got != secret {
		t.Error("the token after the restore differs from the token before")
	}
	c = api.NewClient(url, secret, nil)
	for _, b := range asked[:atLeast] {
		got, err := c.Build(t.Context(), b.ID)
		if err != nil || got.Kernel.String() != b.Kernel.String() || got.Driver != b.Driver || got.State != api.Queued {
			t.Errorf("Build(%d) after the restore = %v %v %s, %v; want %v %v queued", b.ID, got.Kernel, got.Driver, got.State,
				err, b.Kernel, b.Driver)
		}
	}
	for s, want := range map[*testkit.Sample]api.State{&yanked: api.Yanked, &before: api.Published, &after: api.Unknown} {
		if r := resolved(t, c, *s); r.State != want {
			t.Errorf("Resolve(%s) after the restore = %s; want %s", s.Kernel, r.State, want)
		}
	}

	pem := filepath.Join(t.TempDir(), "farm.pub")
	if err := os.WriteFile(pem, key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"reindex", "--server", url, "--key", pem, "--token-file", filepath.Join(dir, "token")}
	if code, out, errs := run(t, args...); code != fault.Mismatch.ExitCode() ||
		!strings.Contains(out, after.Digest[7:19]+"  missing") {
		t.Errorf("reindex = %d\n%s%s\nwant 5, and what is missing", code, out, errs)
	}
	if r := resolved(t, c, after); r.State != api.Unknown {
		t.Errorf("Resolve() after reindex without --apply = %s; want unknown", r.State)
	}
	if code, out, errs := run(t, append(args, "--apply")...); code != 0 ||
		!strings.Contains(out, after.Digest[7:19]+"  recorded") {
		t.Errorf("reindex --apply = %d\n%s%s\nwant 0, and what was recorded", code, out, errs)
	}
	if r := resolved(t, c, after); r.State != api.Published || r.Digest != after.Digest {
		t.Errorf("Resolve() after reindex --apply = %s %s; want published %s", r.State, r.Digest, after.Digest)
	}
	if r := resolved(t, c, yanked); r.State != api.Yanked {
		t.Errorf("Resolve() of what was yanked after reindex --apply = %s; want yanked", r.State)
	}
	if code, out, errs := run(t, args...); code != 0 || !strings.Contains(out, "no differences") {
		t.Errorf("reindex after --apply = %d\n%s%s\nwant 0, no differences", code, out, errs)
	}
}

// TestBackupRefuses checks that a backup that fails leaves no folder behind.
func TestBackupRefuses(t *testing.T) {
	t.Parallel()
	dir, one := t.TempDir(), t.TempDir()
	put(t, filepath.Join(one, "catalogue.db"), nil)
	for _, row := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"no folder", []string{"backup"}, fault.Usage.ExitCode(), "needs one FOLDER"},
		{"no data", []string{"backup", "--data", filepath.Join(dir, "none"), filepath.Join(dir, "out")},
			fault.NotFound.ExitCode(), "--data, --database and --queue"},
		{"postgres", []string{"backup", "--data", dir, "--database", "postgres://u@localhost/x", filepath.Join(dir, "out")},
			fault.Usage.ExitCode(), "pg_dump"},
		{"no queue", []string{"backup", "--data", one, filepath.Join(dir, "out")}, fault.NotFound.ExitCode(),
			"--data, --database and --queue"},
		{"wrong queue", []string{"backup", "--data", one, "--queue", filepath.Join(one, "queue.db"),
			filepath.Join(dir, "out")}, fault.Usage.ExitCode(), "same value as server serve"},
		{"no parent", []string{"backup", "--data", dir, filepath.Join(dir, "a/b")}, fault.Usage.ExitCode(), "may write"},
	} {
		if code, _, errs := run(t, row.args...); code != row.code || !strings.Contains(errs, row.want) {
			t.Errorf("%s: %v = %d %s; want %d with %q", row.name, row.args, code, errs, row.code, row.want)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v; want nothing", left, err)
	}
}

func secretOf(t *testing.T, dir string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "token"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(raw))
}

// publish puts a sample into the server's registry, as builders do.
func publish(t *testing.T, url, secret string, s testkit.Sample) {
	t.Helper()
	repo, err := registry.Open(strings.TrimPrefix(url, "http://")+"/prebake/driver",
		registry.Options{Username: "x", Password: secret, Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Publish(t, repo)
}

// record adds a sample to the catalogue, as builders do.
func record(t *testing.T, c *api.Client, s testkit.Sample) {
	t.Helper()
	if _, err := c.AddArtifact(t.Context(), api.NewArtifact{Digest: s.Digest, Fingerprint: s.Identity.Fingerprint,
		Driver: s.Identity.Driver, Release: s.Identity.Release, Kernels: []target.Kernel{s.Kernel}}); err != nil {
		t.Fatal(err)
	}
}

func resolved(t *testing.T, c *api.Client, s testkit.Sample) api.Resolution {
	t.Helper()
	r, err := c.Resolve(t.Context(), api.Question{BuildID: s.Kernel.BuildID, Board: s.Kernel.Board,
		Driver: s.Identity.Driver.Version, Flavour: string(s.Identity.Driver.Flavour)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// checkIntact lets SQLite check that a database is not damaged.
func checkIntact(t *testing.T, file string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+file+"?mode=ro")
	if err != nil {
		t.Fatal(err)
	}
	var verdict string
	if err := db.QueryRowContext(t.Context(), `PRAGMA integrity_check`).Scan(&verdict); err != nil || verdict != "ok" {
		t.Errorf("integrity_check of %s = %q, %v; want ok", file, verdict, err)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
}

// copyFolder copies a folder as cp -r does.
func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}
