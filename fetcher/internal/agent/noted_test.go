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

// noted makes a node with a driver in use and a rollback that waits for it.
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

// TestNotedRollbackFails reboots a node with a noted rollback whose driver cannot be activated. The failure does not
// count. The driver that was rolled back must be loaded, because it is better than none. The rollback still waits.
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
			_, _ = n.run(t, ref, pn.Digest, newer.Driver) // the error says why it is not the wanted driver
			if r, _ := n.run(t, ref, pn.Digest, newer.Driver); r.Verdict.State != gpucheck.Ready ||
				r.Verdict.Digest != po.Digest {
				t.Errorf("once the driver can be activated: %+v; want the rollback done", r.Verdict)
			}
		})
	}
}

// TestAttemptsOutliveFullDisk checks that the records stay if the check of an active driver fails on a full disk.
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

// TestNotedRollbackIsPending checks that a rollback that waits is never reported as success, whatever the farm answers:
// otherwise the daemon would not try it again.
func TestNotedRollbackIsPending(t *testing.T) {
	t.Parallel()
	n, _, _, po, pn := noted(t)
	n.cfg.Wish = target.Wish(newVersion)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	if r, err := n.runAs(t); !fault.Is(err, fault.Busy) || r.Verdict.Digest != pn.Digest {
		t.Errorf("Run = %+v, %v; want busy, and the present driver", r.Verdict, err)
	}
	n.inUse(t, "0")
	if r, err := n.runAs(t); err != nil || r.Verdict.Digest != po.Digest {
		t.Errorf("idle: Run = %+v, %v; want the previous driver", r.Verdict, err)
	}
}

// TestMonitorEndsForNotedRollback checks that a daemon that watches the driver does a noted rollback as soon as the GPU
// is idle. If a run could not do it, Monitor must not end again and again.
func TestMonitorEndsForNotedRollback(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		refs   []string // how many programs have the driver open, at each check
		closed bool     // whether the owner's hours forbid a replacement
		ends   int      // the check after which Monitor ends; 0 means with the context
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

// TestMonitorLeavesRollbackAlone checks a daemon beside a rollback by hand. Until the rollback is done, its note looks
// like one that waits. The daemon must not begin a run then.
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

// loadedBefore is a finder that notes whether a driver is loaded when it is asked. It never answers.
type loadedBefore struct {
	n      *node
	loaded *bool
}

func (f loadedBefore) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	raw, err := os.ReadFile(filepath.Join(f.n.root, "proc/modules"))
	*f.loaded = err == nil && len(raw) > 0
	return resolve.Answer{}, fault.New(fault.Transient, "nobody answers", "")
}

// TestNotedRollbackFailsWithoutFarm reboots a node with a noted rollback whose driver fails. The driver that was rolled
// back must be loaded before the node waits for the farm.
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

// TestRollbackIsNotedAtOnce checks that no kill can leave half of a noted rollback. The clock, which each note asks, is
// where the test looks.
func TestRollbackIsNotedAtOnce(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "1")
	look := func() (next, byHand bool) {
		raw, _ := os.ReadFile(filepath.Join(n.root, attemptsFile)) // there may be none yet
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

// TestRollbackToDamagedIsNotNoted checks that no rollback waits for a previous driver that does not verify: the node
// would report it as pending for ever.
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

// TestRollbackWaitsForProbe checks that a rollback waits some seconds for the check of another fetcher, but not for
// other programs.
func TestRollbackWaitsForProbe(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		command string
		ends    time.Duration
		done    bool
	}{
		{"nvmlprobe", 3 * time.Second, true},
		{"probe", 3 * time.Second, true}, // the copy on the node
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
