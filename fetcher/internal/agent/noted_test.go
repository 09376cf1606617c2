package agent_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

const attemptsFile = installDir + "/.prebake/attempts.json"

// noted returns a node with a noted rollback: a program uses the newer driver, so the agent only recorded that the
// rollback must follow once the GPU is idle.
func noted(t *testing.T) (n *node, ref string, newer sample.Cell, po, pn sample.Published) {
	t.Helper()
	n, ref, _, newer, po, pn = publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "1")
	if _, err := n.rollback(); !fault.Is(err, fault.Busy) {
		t.Fatalf("Rollback = %v; want busy", err)
	}
	return n, ref, newer, po, pn
}

// fillDisk makes the write of each small file fail, or succeed again. It also takes the space that was reserved.
func (n *node) fillDisk(t *testing.T, full bool) {
	t.Helper()
	// Every small file is first written under one of these names.
	for _, name := range []string{"tmp-file", "attempts.json.spare", "verdict.json.spare"} {
		name = filepath.Join(n.root, installDir, ".prebake", name)
		err := os.RemoveAll(name)
		if full {
			err = errors.Join(err, os.Mkdir(name, 0o755))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestNotedRollbackFails reboots a node with a noted rollback. The older driver cannot be activated, for a reason that
// is no failure of the driver. The agent must load the newer driver again, because any driver is better than none. The
// rollback must still wait.
func TestNotedRollbackFails(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(t *testing.T, n *node, broken bool){
		"full disk": func(t *testing.T, n *node, broken bool) { n.fillDisk(t, broken) },
		"busy kernel": func(_ *testing.T, n *node, broken bool) {
			if delete(n.kernel.refuse, "nvidia "+oldVersion); broken {
				n.kernel.refuse["nvidia "+oldVersion] = syscall.EBUSY
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, ref, newer, po, pn := noted(t)
			n.reboot(t)
			set(t, n, true)
			for i := range 2 {
				r, err := n.run(t, ref, pn.Digest, newer.Driver)
				if err == nil || r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != pn.Digest {
					t.Fatalf("run %d: %+v, %v; want the present driver ready, and an error", i, r.Verdict, err)
				}
				want := loads(newVersion)
				if i > 0 {
					want = nil
				}
				if diff := cmp.Diff(want, n.kernel.calls); diff != "" && name == "full disk" {
					t.Errorf("run %d: system calls (-want +got):\n%s", i, diff)
				}
			}
			set(t, n, false)
			_, _ = n.run(t, ref, pn.Digest, newer.Driver) // the error says that the loaded driver is not the wanted one
			if r, _ := n.run(t, ref, pn.Digest, newer.Driver); r.Verdict.State != gpucheck.Ready ||
				r.Verdict.Digest != po.Digest {
				t.Errorf("once the driver can be activated: %+v; want the rollback done", r.Verdict)
			}
		})
	}
}

// TestAttemptsOutliveFullDisk checks that the agent keeps its records of load attempts if the check of the active
// driver fails while the disk is full.
func TestAttemptsOutliveFullDisk(t *testing.T) {
	t.Parallel()
	n, ref, newer, _, pn := noted(t)
	read := func() string {
		raw, err := os.ReadFile(filepath.Join(n.root, attemptsFile))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	before := read()
	n.parts.Probe = silent{}
	n.fillDisk(t, true)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil {
		t.Error("Run without an answer of the probe = nil; want an error")
	}
	if diff := cmp.Diff(before, read()); diff != "" {
		t.Errorf("records of attempts (-want +got):\n%s", diff)
	}
}

// TestNotedRollbackIsPending checks that a run never reports success while a rollback waits, whatever the server
// answers. Otherwise the daemon would not try the rollback again.
func TestNotedRollbackIsPending(t *testing.T) {
	t.Parallel()
	n, _, _, po, pn := noted(t)
	n.cfg.Wish = target.Wish(newVersion)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	if r, err := n.runAs(t); !fault.Is(err, fault.Busy) || r.Verdict.Digest != pn.Digest {
		t.Errorf("Run = %+v, %v; want busy, and the present driver", r.Verdict, err)
	}
	n.inUse(t, "0")
	if r, err := n.runAs(t); !fault.Is(err, fault.Transient) || r.Verdict.Digest != po.Digest {
		t.Errorf("idle: Run = %+v, %v; want the previous driver, which does not have the wanted version", r.Verdict, err)
	}
}

// TestNotedRollbackIsWanted checks a node on which a rollback waits, after the farm begins to name the previous driver.
// The loaded driver works, so each run must check it. Once the GPU is idle, the previous driver must be loaded.
func TestNotedRollbackIsWanted(t *testing.T) {
	t.Parallel()
	n, ref, _, po, pn := noted(t)
	older := sample.NewCell(t, buildA, oldVersion)
	n.cfg.Wish = oldVersion
	for i := range 2 { // each by a new process
		r, err := n.run(t, ref, po.Digest, older.Driver)
		if !fault.Is(err, fault.Busy) || r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != pn.Digest ||
			r.Pending == "" || len(n.kernel.calls) > 0 {
			t.Errorf("run %d: %+v, %v, pending %q, calls %v; want busy, and the present driver ready", i, r.Verdict, err,
				r.Pending, n.kernel.calls)
		}
	}
	n.inUse(t, "0")
	if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || r.Verdict.Digest != po.Digest || r.Pending != "" {
		t.Errorf("idle: Run = %+v, %v, pending %q; want the previous driver", r.Verdict, err, r.Pending)
	}
}

// TestMonitorEndsForNotedRollback checks when Monitor ends so that a run can do a noted rollback: as soon as the GPU
// becomes idle. If the GPU was already idle in the last run, that run failed to do the rollback. Then Monitor must not
// end again and again.
func TestMonitorEndsForNotedRollback(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		refs   []string // how many programs have the driver open, at each check
		closed bool     // whether the maintenance hours forbid a replacement of the driver
		ends   int      // the check after which Monitor ends; 0 means that only the context ends it
	}{
		{"in use, then idle", []string{"1", "1", "0", "0"}, false, 3},
		{"in use, then idle, outside the owner's hours", []string{"1", "1", "0", "0"}, true, 0},
		{"idle, so the last run failed to do it", []string{"0", "0", "0", "0"}, false, 0},
		{"idle, used again, idle", []string{"0", "1", "0", "0"}, false, 3},
	} {
		n, ref, newer, _, pn := noted(t)
		_, _ = n.run(t, ref, pn.Digest, newer.Driver) // the error says that the driver is in use
		n.cfg.Maintenance.Never = row.closed
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			n.inUse(t, row.refs[0])
			checks := 0
			err := agent.New(n.cfg, n.parts).Monitor(ctx, time.Minute, watcher(func(gpucheck.Verdict) {
				n.inUse(t, row.refs[checks])
				if checks++; checks == len(row.refs) {
					cancel()
				}
			}))
			if got := errors.Is(err, agent.ErrRollback); got != (row.ends > 0) || got && checks != row.ends {
				t.Errorf("%s: Monitor = %v after %d checks; want its end for the rollback after %d", row.name, err, checks,
					row.ends)
			}
		})
	}
}

// TestMonitorLeavesRollbackAlone checks the daemon while an operator's rollback works. Until the rollback is done, its
// record looks like that of a rollback that waits. The daemon must not begin a run then.
func TestMonitorLeavesRollbackAlone(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		noted, checked, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
		parts := n.parts
		parts.Line = &timeline.Run{Watch: func(e timeline.Event) {
			if e.Phase == "install" && e.Done == nil && e.Text == "" {
				close(noted)
				<-checked
			}
		}}
		checks := 0
		err := agent.New(n.cfg, n.parts).Monitor(ctx, time.Minute, watcher(func(gpucheck.Verdict) {
			switch checks++; checks {
			case 1:
				go func() {
					defer close(done)
					if r, err := agent.New(n.cfg, parts).Rollback(t.Context()); err != nil || r.Verdict.Digest != po.Digest {
						t.Errorf("Rollback = %+v, %v; want the previous driver", r.Verdict, err)
					}
				}()
				<-noted
			case 2:
				close(checked)
				<-done
			case 3:
				cancel()
			}
		}))
		if err != nil || checks != 3 {
			t.Errorf("Monitor = %v after %d checks; want its end with the context after 3", err, checks)
		}
		if checks < 2 {
			close(checked)
			<-done
		}
	})
}

// loadedBefore stands in for a server that cannot be reached. It records whether a driver is loaded when the agent
// asks.
type loadedBefore struct {
	n      *node
	loaded *bool
}

func (f loadedBefore) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	raw, err := os.ReadFile(filepath.Join(f.n.root, "proc/modules"))
	*f.loaded = err == nil && len(raw) > 0
	return resolve.Answer{}, fault.New(fault.Transient, "nobody answers", "")
}

// TestNotedRollbackFailsWithoutFarm reboots a node with a noted rollback. The older driver fails. The agent must load
// the newer driver before it waits for the server.
func TestNotedRollbackFailsWithoutFarm(t *testing.T) {
	t.Parallel()
	n, _, _, _, pn := noted(t)
	n.reboot(t)
	n.kernel.refuse["nvidia "+oldVersion] = syscall.ENOENT
	loaded := false
	n.parts.Finder = loadedBefore{n, &loaded}
	r, err := n.runAs(t)
	if !loaded || r.Verdict.Digest != pn.Digest || r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run = %s %s, %v, loaded before the farm was asked: %t; want the present driver, loaded before",
			r.Verdict.State, r.Verdict.Digest, err, loaded)
	}
}

// TestRollbackIsNotedAtOnce checks that a kill cannot leave half of the record of a noted rollback. The agent asks the
// clock for each write of its records. So the fake clock reads the file.
func TestRollbackIsNotedAtOnce(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "1")
	look := func() (next, byHand bool) {
		raw, _ := os.ReadFile(filepath.Join(n.root, attemptsFile)) // the file may not exist yet
		return bytes.Contains(raw, []byte(`"next": true`)), bytes.Contains(raw, []byte(`"byHand": true`))
	}
	n.parts.Now = func() time.Time {
		if next, byHand := look(); next != byHand {
			t.Errorf("the records have a waiting driver: %t, a driver that was rolled back: %t; want both or none", next, byHand)
		}
		return time.Now()
	}
	if _, err := n.rollback(); !fault.Is(err, fault.Busy) {
		t.Errorf("Rollback = %v; want busy", err)
	}
	if next, byHand := look(); !next || !byHand {
		t.Errorf("the records have a waiting driver: %t, a driver that was rolled back: %t; want both", next, byHand)
	}
}

// TestRollbackToDamagedIsNotNoted checks that the agent records no rollback to a driver whose files are damaged.
// Otherwise the node would report a pending rollback for ever.
func TestRollbackToDamagedIsNotNoted(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "1")
	n.edit(t, "layers/*/lib64/libnvidia-ml.so."+oldVersion, flipped)
	if r, err := n.rollback(); !fault.Is(err, fault.Unverified) || r.Pending != "" {
		t.Errorf("Rollback = %v, pending %q; want unverified, and nothing pending", err, r.Pending)
	}
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Pending != "" || r.Verdict.Digest != pn.Digest {
		t.Errorf("then: Run = %+v, %v, pending %q; want the present driver, and nothing pending", r.Verdict, err, r.Pending)
	}
}

// TestRollbackWaitsForProbe checks a rollback while another program has the driver open. If that program is the probe
// of another fetcher, the rollback must wait some seconds for its end. For any other program, it must not wait.
func TestRollbackWaitsForProbe(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		command string
		ends    time.Duration
		done    bool
	}{
		{"nvmlprobe", 3 * time.Second, true},
		{"probe", 3 * time.Second, true}, // the name of the probe's copy on the node
		{"nvmlprobe", time.Hour, false},
		{"python3", 3 * time.Second, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			n, ref, _, newer, po, pn := publishTwo(t, 1)
			if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
				t.Fatal(err)
			}
			n.inUse(t, "1")
			sample.Write(t, n.root, "proc/70/comm", row.command+"\n")
			fd := filepath.Join(n.root, "proc/70/fd")
			if err := errors.Join(os.Mkdir(fd, 0o755), os.Symlink("/dev/nvidiactl", filepath.Join(fd, "3"))); err != nil {
				t.Fatal(err)
			}
			end := time.AfterFunc(row.ends, func() {
				n.inUse(t, "0")
				_ = os.RemoveAll(filepath.Join(n.root, "proc/70"))
			})
			defer end.Stop()
			r, err := n.rollback()
			if done := err == nil && r.Verdict.Digest == po.Digest; done != row.done || !done && !fault.Is(err, fault.Busy) {
				t.Errorf("%s for %s: Rollback = %+v, %v; want it done: %v, else busy", row.command, row.ends, r.Verdict, err,
					row.done)
			}
		})
	}
}
