package worker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestOutcomeOnFullDisk has a server whose disk has no space for logs. The server must get the build's outcome
// nevertheless. The worker must send the log as soon as the disk has space again, without a restart.
func TestOutcomeOnFullDisk(t *testing.T) {
	t.Parallel()
	r := newRig(t, fails(fault.New(fault.Unsupported, "no such driver", "")))
	r.cfg.KeptEvery = time.Millisecond
	r.server.noLog = fault.DiskFull
	r.server.build = api.Build{ID: 7, State: api.Failed, Worker: "w1", Attempt: 1}
	r.server.refuse = func(u api.BuildUpdate) *api.Problem {
		if u.State == api.Failed {
			time.AfterFunc(50*time.Millisecond, func() { // so the worker keeps the log first
				r.server.mu.Lock()
				defer r.server.mu.Unlock()
				r.server.noLog = 0
			})
		}
		return nil
	}
	r.runUntil(t, func() bool {
		r.server.mu.Lock()
		defer r.server.mu.Unlock()
		return r.server.log != "" && len(r.buildFiles(t)) == 0
	})
	if last := r.server.states[len(r.server.states)-1]; last.State != api.Failed || r.tries != 1 {
		t.Errorf("after %d tries the server heard %+v; want it failed", r.tries, last)
	}
	if r.server.log != "log of a failure\n" {
		t.Errorf("the server has the log %q; want that of the failure", r.server.log)
	}
	if left := r.buildFiles(t); len(left) > 0 {
		t.Errorf("files left in the state folder: %v", left)
	}
}

// TestKilledAfterOutcome has a server whose disk has no space for logs. A worker is killed right after it reported an
// outcome. The next worker in the same folder must send the log.
func TestKilledAfterOutcome(t *testing.T) {
	t.Parallel()
	r := newRig(t, fails(fault.New(fault.Unsupported, "no such driver", "")))
	r.server.noLog = fault.DiskFull
	r.server.build = api.Build{ID: 7, State: api.Failed, Worker: "w1", Attempt: 1}
	killed := t.TempDir()
	r.server.refuse = func(u api.BuildUpdate) *api.Problem {
		if u.State == api.Failed {
			if err := os.CopyFS(killed, os.DirFS(r.cfg.State)); err != nil {
				t.Error(err)
			}
		}
		return nil
	}
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	r.cfg.State, r.server.noLog = killed, 0
	if len(r.buildFiles(t)) == 0 {
		t.Fatal("the killed worker left no log, so this test proves nothing")
	}
	r.runUntil(t, func() bool { return len(r.buildFiles(t)) == 0 })
	if r.server.log != "log of a failure\n" {
		t.Errorf("the server has the log %q; want that of the failure", r.server.log)
	}
}

// buildFiles returns the paths of the logs in the worker's state folder.
func (r *rig) buildFiles(t *testing.T) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(r.cfg.State, "build-*"))
	if err != nil {
		t.Error(err)
	}
	return left
}

// newRigWithKept returns a rig whose worker has stopped and has kept the log of a build, because the server's disk is
// full. path is the log's path.
func newRigWithKept(t *testing.T) (r *rig, path string) {
	t.Helper()
	r = newRig(t, fails(fault.New(fault.Unsupported, "no such driver", "")))
	r.server.noLog = fault.DiskFull
	r.server.build = api.Build{ID: 7, State: api.Failed, Worker: "w1", Attempt: 1}
	if err := r.run(t, 2); err != nil {
		t.Fatal(err)
	}
	kept := r.buildFiles(t)
	if len(kept) != 1 {
		t.Fatalf("the state folder has %v; want one kept log", kept)
	}
	return r, kept[0]
}

// runUntil runs the worker until done returns true, but at most a minute.
func (r *rig) runUntil(t *testing.T, done func() bool) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	var end sync.WaitGroup
	defer end.Wait()
	end.Go(func() {
		defer stop()
		for !done() && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
	})
	if err := worker.Run(ctx, r.cfg); err != nil && ctx.Err() == nil {
		t.Fatal(err)
	}
}

// TestKeptLog checks which kept logs a later worker in the same folder sends: only the log of the build's last attempt.
// The later worker may have another ID.
func TestKeptLog(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, id string
		build    api.Build
		noRead   fault.Kind
		sent     bool
	}{
		{"the same worker", "w1", api.Build{ID: 7, State: api.Failed, Worker: "w1", Attempt: 1}, 0, true},
		{"another ID", "w2", api.Build{ID: 7, State: api.Failed, Worker: "w1", Attempt: 1}, 0, true},
		{"another worker's attempt", "w1", api.Build{ID: 7, State: api.Failed, Worker: "w3", Attempt: 1}, 0, false},
		{"a later attempt of it", "w1", api.Build{ID: 7, State: api.Building, Worker: "w1", Attempt: 2}, 0, false},
		{"the build is gone", "w1", api.Build{}, fault.NotFound, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r, _ := newRigWithKept(t)
			r.cfg.ID = row.id
			r.server.noLog, r.server.noRead, r.server.build = 0, row.noRead, row.build
			r.runUntil(t, func() bool { return len(r.buildFiles(t)) == 0 })
			want := ""
			if row.sent {
				want = "log of a failure\n"
			}
			if r.server.log != want {
				t.Errorf("the server has the log %q; want %q", r.server.log, want)
			}
			if left := r.buildFiles(t); len(left) > 0 {
				t.Errorf("files left in the state folder: %v", left)
			}
		})
	}
}

// TestKeptLogsAreBounded checks that a worker keeps only the newest logs while the server's disk is full. If one log is
// too large, the worker must still keep older logs that have space.
func TestKeptLogsAreBounded(t *testing.T) {
	t.Parallel()
	const full = worker.MaxKeptBytes / api.MaxBuildLog
	for _, row := range []struct {
		name  string
		sizes []int64 // sizes of the logs in bytes, the newest log first
		kept  func(i int) bool
	}{
		{"many", slices.Repeat([]int64{1}, worker.MaxKept+5), func(i int) bool { return i < worker.MaxKept }},
		{"large", slices.Repeat([]int64{api.MaxBuildLog}, full+3), func(i int) bool { return i < full }},
		{"one too large", []int64{1, worker.MaxKeptBytes + 1, 1, 1}, func(i int) bool { return i != 1 }},
		{"one too large beside a newer one", []int64{worker.MaxKeptBytes - 1, 2, 1, 1}, func(i int) bool { return i%2 == 0 }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r, first := newRigWithKept(t)
			if err := os.Remove(first); err != nil {
				t.Fatal(err)
			}
			var want []string
			for i, size := range row.sizes {
				path := strings.Replace(first, "build-7", fmt.Sprintf("build-%d", 100+i), 1)
				at := time.Now().Add(-time.Duration(i) * time.Minute)
				if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, size),
					os.Chtimes(path, at, at)); err != nil {
					t.Fatal(err)
				}
				if row.kept(i) {
					want = append(want, path)
				}
			}
			r.runUntil(t, func() bool { return len(r.buildFiles(t)) <= len(want) })
			if diff := cmp.Diff(want, r.buildFiles(t)); diff != "" {
				t.Errorf("kept logs (-want +got):\n%s", diff)
			}
		})
	}
}
