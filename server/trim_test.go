package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// trims stands in for the catalogue and its logs. It records the age from which each kind of record must be removed.
// Build 1 is not in the catalogue, and build 2 has an old log.
type trims struct {
	audit, builds, logs, marked []time.Duration
	// removed has the builds whose logs were removed.
	removed []int64
	away    error // the error of the database
	last    error // the last error of a removal of logs
	forgot  int   // how often all servers were told to forget their cached facts
}

func (c *trims) ForgetFacts(context.Context) error {
	c.forgot++
	return nil
}

func (c *trims) TrimAudit(_ context.Context, before time.Time) error {
	c.audit = append(c.audit, time.Since(before))
	return nil
}

func (c *trims) TrimBuilds(_ context.Context, before time.Time) (int, error) {
	c.builds = append(c.builds, time.Since(before))
	return 1, nil
}

func (c *trims) MarkOldLogs(_ context.Context, builds []int64, before, now time.Time) ([]int64, error) {
	c.marked = append(c.marked, time.Since(before))
	if c.away != nil || !now.Equal(time.Now()) {
		return nil, c.away
	}
	return builds[1:2], nil
}

func (c *trims) AbsentBuilds(_ context.Context, builds []int64) ([]int64, error) {
	if c.away != nil {
		return nil, c.away
	}
	return builds[:1], nil
}

func (c *trims) Trim(before time.Time, choose func(builds []int64) ([]int64, error)) (int, error) {
	c.logs = append(c.logs, time.Since(before))
	chosen, err := choose([]int64{1, 2, 3})
	c.removed, c.last = append(c.removed, chosen...), err
	return len(chosen), err
}

// TestTrim checks that old records are removed at the start and once a day. If no age is set for builds or logs, they
// must stay. While the database does not answer, no log may be removed.
func TestTrim(t *testing.T) {
	t.Parallel()
	away := errors.New("the database is away")
	twice := func(ages ...time.Duration) []time.Duration { return append(ages, ages...) }
	for _, row := range []struct {
		keep         retention
		away         error
		builds, logs []time.Duration
		removed      []int64
		forgot       int
	}{
		{retention{}, nil, nil, nil, nil, 0},
		{retention{builds: 7 * day}, nil, twice(7 * day), twice(7 * day), []int64{1, 1}, 0},
		{retention{logs: 2 * day}, nil, nil, twice(2 * day), []int64{2, 2}, 2},
		{retention{7 * day, 2 * day}, nil, twice(7 * day), twice(2*day, 7*day), []int64{2, 1, 2, 1}, 2},
		{retention{7 * day, 2 * day}, away, twice(7 * day), twice(2*day, 7*day), nil, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithTimeout(t.Context(), day+time.Hour)
			defer stop()
			c := trims{away: row.away}
			if err := trim(ctx, &c, &c, row.keep, slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff([]time.Duration{auditRetention, auditRetention}, c.audit); d != "" {
				t.Errorf("keep %v: ages of the audit log (-want +got):\n%s", row.keep, d)
			}
			if d := cmp.Diff([][]time.Duration{row.builds, row.logs}, [][]time.Duration{c.builds, c.logs}); d != "" {
				t.Errorf("keep %v: ages of builds and logs (-want +got):\n%s", row.keep, d)
			}
			if d := cmp.Diff(row.removed, c.removed); d != "" || !errors.Is(c.last, row.away) {
				t.Errorf("keep %v: builds whose logs were removed (-want +got), and the last error %v:\n%s", row.keep, c.last,
					d)
			}
			if c.forgot != row.forgot {
				t.Errorf("keep %v: servers had to forget %d times; want %d, once for each removal", row.keep, c.forgot, row.forgot)
			}
		})
	}
}

// TestOldLogIsRemoved starts a server that has old logs. The server must remove them at the start, except those of the
// first and the last failure of a cell without an artifact. The page and the command must then say that the log was
// removed, and why.
func TestOldLogIsRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs := filepath.Join(dir, "logs")
	if err := os.Mkdir(logs, 0o750); err != nil {
		t.Fatal(err)
	}
	logName := func(build int64) string { return filepath.Join(logs, fmt.Sprintf("%d.log", build)) }
	addOldBuilds(t, dir, func(b api.Build) {
		if err := os.WriteFile(logName(b.ID), []byte("what went wrong\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(logName(b.ID), *b.FinishedAt, *b.FinishedAt); err != nil {
			t.Fatal(err)
		}
	})
	url, _, _ := start(t, dir, "--keep-logs", "14")
	deadline, end := context.WithTimeout(t.Context(), time.Minute)
	defer end()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, build := range []int64{2, 4} {
		for {
			if _, err := os.Stat(logName(build)); errors.Is(err, os.ErrNotExist) {
				break
			}
			select {
			case <-tick.C:
			case <-deadline.Done():
				t.Fatalf("the log of build %d was not removed", build)
			}
		}
	}
	for _, build := range []string{"1", "3"} {
		if code, out, errs := run(t, "build", build, "--log", "--server", url); code != 0 || out != "what went wrong\n" {
			t.Errorf("build %s --log = %d\n%s%s\nwant the log of the first and the last failure", build, code, out, errs)
		}
	}
	today := time.Now().UTC().Format(time.DateOnly)
	for build, hint := range map[string]string{
		"2": "server builds --state failed --build-id 17800.0.47 --board lakitu --driver 535.261.03 --flavour open",
		"4": "server artifact sha256:" + strings.Repeat("c", 64),
	} {
		for _, flag := range []string{"--log", "--follow"} {
			code, out, errs := run(t, "build", build, flag, "--server", url)
			if code != fault.NotFound.ExitCode() || out != "" || !strings.Contains(errs, "the log of build "+build+
				" was removed on "+today+" to save space, 40 days after the build's end") || !strings.Contains(errs, hint) {
				t.Errorf("build %s %s = %d\n%s%s\nwant not-found, why, and %q", build, flag, code, out, errs, hint)
			}
		}
		code, out, errs := run(t, "build", build, "--server", url)
		if code != 0 || !strings.Contains(out, "removed on "+today+" to save space") {
			t.Errorf("build %s = %d\n%s%s\nwant that the log was removed", build, code, out, errs)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/builds/"+build, nil)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		page, err := io.ReadAll(answer.Body)
		if err := errors.Join(err, answer.Body.Close()); err != nil {
			t.Fatal(err)
		}
		if text := string(page); answer.StatusCode != http.StatusOK || strings.Contains(text, "Whole log") ||
			!strings.Contains(text, "removed the log of this build to save space") ||
			strings.Contains(text, "attached to the artifact") != (build == "4") {
			t.Errorf("GET /builds/%s = %s\n%s\nwant that the log was removed", build, answer.Status, text)
		}
	}
}

// addOldBuilds adds one cell with three failed builds, and one with a published build, to the catalogue in a data
// folder. The builds ended 40 days ago. It calls with for each build.
func addOldBuilds(t *testing.T, dir string, with func(api.Build)) {
	t.Helper()
	db, err := store.Open(t.Context(), "sqlite://"+filepath.Join(dir, "catalogue.db"))
	if err != nil {
		t.Fatal(err)
	}
	ended := time.Now().Add(-40*day - time.Hour)
	for _, row := range []struct {
		flavour target.Flavour
		state   api.State
	}{{target.Open, api.Failed}, {target.Open, api.Failed}, {target.Open, api.Failed},
		{target.Proprietary, api.Published}} {
		b := api.Build{Kernel: target.Kernel{BuildID: "17800.0.47", Board: "lakitu"}, State: api.Queued, CreatedAt: ended,
			Driver: target.Driver{Version: "535.261.03", Flavour: row.flavour}}
		err := db.Write(t.Context(), func(tx *store.Tx) (err error) {
			if b, _, err = tx.AddBuild(t.Context(), b); err != nil {
				return err
			}
			b.State, b.FinishedAt = row.state, &ended
			if row.state == api.Failed {
				b.Class, b.Error = "api-break", "nv.c:1: error"
			} else {
				b.Digest = "sha256:" + strings.Repeat("c", 64)
			}
			return tx.SetBuild(t.Context(), b)
		})
		if err != nil {
			t.Fatal(err)
		}
		with(b)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}
