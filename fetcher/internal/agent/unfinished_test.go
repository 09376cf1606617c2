package agent_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
)

// updated returns a node whose COS was updated after it got a driver. The newer driver is published for the new COS
// build.
func updated(t *testing.T) (n *node, ref string, newer sample.Cell, pn sample.Published) {
	t.Helper()
	key := testkit.NewKey(t)
	ref = layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildB, newVersion)
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n = newNode(t, older, 1, key)
	n.reboot(t)
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	sample.RootAt(t, n.root, newer, 1)
	n.reboot(t)
	return n, ref, newer, pn
}

// killedIn runs the agent once, and kills the run when the given phase begins.
func (n *node) killedIn(t *testing.T, phase string) {
	t.Helper()
	n.kernel.calls = nil
	n.parts.Line = &timeline.Run{Watch: func(e timeline.Event) {
		if e.Phase == phase && e.Done == nil && e.Text == "" {
			panic("killed")
		}
	}}
	defer func() {
		if recover() == nil {
			t.Fatalf("the run ended before phase %s", phase)
		}
	}()
	_, _ = agent.New(n.cfg, n.parts).Run(t.Context())
}

// TestKilledAfterUpdate kills the first load of a driver after an update of COS. The former driver is for another COS
// build. So the next run must load the new driver from the disk, although the server does not answer. If the new driver
// crashes the node twice, it must not be loaded again.
func TestKilledAfterUpdate(t *testing.T) {
	t.Parallel()
	away := finder{err: fault.New(fault.Transient, "nobody answers", "")}
	for _, reboots := range []bool{false, true} {
		for _, phase := range []string{"install", "load"} { // before the switch of links, or at the load of the first module
			n, ref, newer, pn := updated(t)
			if phase == "load" {
				n.killed(t, ref, pn.Digest, newer, "nvidia")
			} else {
				n.answer(ref, pn.Digest, newer.Driver)
				n.killedIn(t, phase)
			}
			if reboots {
				n.reboot(t)
			}
			n.parts.Finder = away
			r, err := n.runAs(t)
			if diff := cmp.Diff(loads(newVersion), n.kernel.calls); diff != "" || err != nil ||
				r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != pn.Digest {
				t.Errorf("killed in %s, reboots %t: Run = %s %s, %v; system calls (-want +got):\n%s", phase, reboots,
					r.Verdict.State, r.Verdict.Reason, err, diff)
			}
		}
	}
	n, ref, newer, pn := updated(t)
	for range 2 {
		n.killed(t, ref, pn.Digest, newer, "nvidia")
		n.reboot(t)
	}
	n.parts.Finder = away
	if _, err := n.runAs(t); err == nil || len(n.kernel.calls) > 0 {
		t.Errorf("after two crashes: Run = %v, calls %v; want an error, and nothing loaded", err, n.kernel.calls)
	}
}

// TestKilledFirstLoad kills a run before it loads the only driver of a node. In the first case the node is new; in the
// second case it has just booted, and its disk becomes full. The next run must load the driver from the disk, although
// the server does not answer.
func TestKilledFirstLoad(t *testing.T) {
	t.Parallel()
	away := finder{err: fault.New(fault.Transient, "nobody answers", "")}
	for _, full := range []bool{false, true} {
		n, ref, c, p := bare(t)
		n.answer(ref, p.Digest, c.Driver)
		if full {
			if _, err := n.runAs(t); err != nil {
				t.Fatal(err)
			}
			n.reboot(t)
		}
		n.killedIn(t, "install")
		if full {
			n.fillDisk(t, true)
			// The agent first makes each link under this name, and then renames it. A folder of this name makes that fail.
			sample.Write(t, n.root, installDir+"/.prebake/tmp-link/x", "")
		}
		n.parts.Finder = away
		r, err := n.runAs(t)
		if diff := cmp.Diff(loads(newVersion), n.kernel.calls); diff != "" || r.Verdict.Digest != p.Digest ||
			!full && err != nil {
			t.Errorf("full disk %t: Run = %s %s, %v; system calls (-want +got):\n%s", full, r.Verdict.State, r.Verdict.Digest,
				err, diff)
		}
	}
}

// TestRollbackKilled kills an operator's rollback. The next run must complete the rollback, although the server still
// offers the newer driver.
func TestRollbackKilled(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"nvidia", "nvidia_uvm", "probe"} {
		for _, reboots := range []bool{false, true} {
			n, ref, _, newer, po, pn := publishTwo(t, 1)
			if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
				t.Fatal(err)
			}
			func() {
				defer func() {
					if recover() == nil {
						t.Fatalf("the rollback was not killed at %s", at)
					}
				}()
				works := n.parts.Probe
				defer func() { n.kernel.die, n.parts.Probe = "", works }()
				if n.kernel.die = at + " " + oldVersion; at == "probe" {
					n.parts.Probe = dying{}
				}
				_, _ = n.rollback()
			}()
			if reboots {
				n.reboot(t)
			}
			for i := range 2 {
				r, err := n.run(t, ref, pn.Digest, newer.Driver)
				if !fault.Is(err, fault.Rejected) || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
					t.Errorf("killed at %s, reboots %t, run %d: Run = %s %s, %v; want the older driver, and the newer one refused",
						at, reboots, i, r.Verdict.State, r.Verdict.Driver, err)
				}
			}
		}
	}
}

// TestRollbackOnFullDisk fills the disk when a rollback checks the older driver. The rollback must return an error, and
// the node must not forget the rollback, although the server still offers the newer driver.
func TestRollbackOnFullDisk(t *testing.T) {
	t.Parallel()
	for _, reboots := range []bool{false, true} {
		n, ref, _, newer, po, pn := publishTwo(t, 1)
		if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
			t.Fatal(err)
		}
		n.kernel.calls = nil
		n.parts.Line = &timeline.Run{Watch: func(e timeline.Event) {
			if e.Phase == "validate" && e.Done == nil && e.Text == "" {
				n.fillDisk(t, true)
			}
		}}
		if r, err := agent.New(n.cfg, n.parts).Rollback(t.Context()); err == nil || r.Verdict.Digest != po.Digest ||
			!strings.Contains(err.Error(), "record the end of the activation") {
			t.Errorf("Rollback = %s, %v; want the older driver, and an error because its record could not be written",
				r.Verdict.Digest, err)
		}
		n.fillDisk(t, false)
		if reboots {
			n.reboot(t)
		}
		for i := range 2 {
			r, err := n.run(t, ref, pn.Digest, newer.Driver)
			if !fault.Is(err, fault.Rejected) || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
				t.Errorf("reboots %t, run %d: Run = %s %s, %v; want the older driver, and the newer one refused", reboots, i,
					r.Verdict.State, r.Verdict.Driver, err)
			}
		}
	}
}

// TestFailedRollbackIsNotNoted checks that a failed rollback has no effect on later runs: the agent must load the newer
// driver, which works, after a reboot.
func TestFailedRollbackIsNotNoted(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.kernel.refuse["nvidia "+oldVersion] = syscall.ENODEV
	if _, err := n.rollback(); !fault.Is(err, fault.Unusable) {
		t.Errorf("Rollback = %v; want unusable", err)
	}
	n.reboot(t)
	clear(n.kernel.refuse)
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Pending != "" || r.Verdict.Digest != pn.Digest {
		t.Errorf("then: Run = %+v, %v, pending %q; want the present driver", r.Verdict, err, r.Pending)
	}
}

// TestNotedRollbackOutlivesRecords records a rollback that waits for an idle GPU on a node that already has many
// records. Those are from a time when the clock was ahead, so the new records look like the oldest. The node must not
// drop them. The test writes the records as this release does, so it also fails if a later release cannot read them.
func TestNotedRollbackOutlivesRecords(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	many := map[string]json.RawMessage{}
	for i := range 40 {
		many[fmt.Sprintf("sha256:%064x", i)] = json.RawMessage(
			`{"before":{"current":"sets/x"},"at":"2100-01-01T00:00:00Z","failures":2,"why":"x"}`)
	}
	raw, err := json.Marshal(many)
	if err != nil {
		t.Fatal(err)
	}
	sample.Write(t, n.root, attemptsFile, string(raw))
	n.inUse(t, "1")
	if _, err := n.rollback(); !fault.Is(err, fault.Busy) {
		t.Fatalf("Rollback = %v; want busy", err)
	}
	all := map[string]json.RawMessage{}
	if raw, err = os.ReadFile(filepath.Join(n.root, attemptsFile)); err != nil || json.Unmarshal(raw, &all) != nil ||
		len(all) != 32 {
		t.Errorf("%d records, %v; want 32", len(all), err)
	}
	n.inUse(t, "0")
	if r, _ := n.run(t, ref, pn.Digest, newer.Driver); r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
		t.Errorf("idle: Run = %s %s; want the previous driver", r.Verdict.State, r.Verdict.Driver)
	}
}

// fillRecords writes 32 records of load attempts, which is the maximum, as this release writes them.
func (n *node) fillRecords(t *testing.T, record func(i int) string) {
	t.Helper()
	many := map[string]json.RawMessage{}
	for i := range 32 {
		many[fmt.Sprintf("sha256:%064x", i)] = json.RawMessage(record(i))
	}
	raw, err := json.Marshal(many)
	if err != nil {
		t.Fatal(err)
	}
	sample.Write(t, n.root, attemptsFile, string(raw))
}

// TestNewFailureIsKept lets a driver fail on a node that has the maximum number of records. The node must count the
// failures, although it reboots after each one and then loads its active driver first. Otherwise it would try the
// failing driver endlessly. For the new record, the node must drop the record that matters least.
func TestNewFailureIsKept(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		record func(i int) string
		gone   int // the record that the node must drop first
	}{
		"all took the node down": {func(i int) string { // record 23 has the earliest time
			return fmt.Sprintf(`{"before":{},"at":"2026-01-01T00:%02d:00Z","crashes":2}`, (i+9)%32)
		}, 23},
		"all but one were rolled back": {func(i int) string {
			if i == 5 {
				return `{"before":{},"at":"2026-01-01T00:05:00Z","failures":2,"why":"x"}`
			}
			return fmt.Sprintf(`{"before":{},"at":"2026-01-01T00:%02d:00Z","byHand":true}`, i)
		}, 5},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, ref, _, newer, po, pn := publishTwo(t, 1)
			n.kernel.refuse["nvidia "+newVersion] = syscall.ENOENT
			n.fillRecords(t, row.record)
			tries := 0
			for i := range 4 {
				n.reboot(t)
				r, err := n.run(t, ref, pn.Digest, newer.Driver)
				if !fault.Is(err, fault.Rejected) || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
					t.Errorf("Run = %+v, %v; want the former driver ready", r.Verdict, err)
				}
				if slices.Contains(n.kernel.calls, "load nvidia "+newVersion) {
					tries++
				}
				left := map[string]json.RawMessage{}
				raw, err := os.ReadFile(filepath.Join(n.root, attemptsFile))
				if err != nil || json.Unmarshal(raw, &left) != nil || len(left) > 32 || len(left) < 30 {
					t.Errorf("%d records, %v; want about 32", len(left), err)
				}
				if _, kept := left[fmt.Sprintf("sha256:%064x", row.gone)]; kept && i == 0 {
					t.Errorf("record %d is still there; want that one dropped", row.gone)
				}
			}
			if tries != 2 {
				t.Errorf("tried the failing driver %d times; want 2", tries)
			}
		})
	}
}

// TestFailuresOutliveWrongClock lets two drivers fail in turn on a node with the maximum number of records. Those are
// from a time when the clock was ahead, so they look newer. Still, the record of one failing driver must not replace
// that of the other.
func TestFailuresOutliveWrongClock(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	var cells []sample.Cell
	var published []sample.Published
	for _, version := range []string{oldVersion, newVersion, "535.300.01"} {
		c := sample.NewCell(t, buildA, version)
		cells, published = append(cells, c), append(published, sample.Publish(t, ref, key, c))
	}
	n := newNode(t, cells[0], 1, key)
	n.reboot(t)
	if _, err := n.run(t, ref, published[0].Digest, cells[0].Driver); err != nil {
		t.Fatal(err)
	}
	n.fillRecords(t, func(i int) string {
		return fmt.Sprintf(`{"before":{},"at":"2100-01-01T00:%02d:00Z","failures":2,"why":"x"}`, i)
	})
	tries := map[int]int{}
	for _, c := range cells[1:] {
		n.kernel.refuse["nvidia "+c.Driver.Version] = syscall.ENOENT
	}
	for range 4 {
		for i := 1; i < 3; i++ {
			if _, err := n.run(t, ref, published[i].Digest, cells[i].Driver); !fault.Is(err, fault.Rejected) {
				t.Errorf("Run of driver %d = %v; want rejected", i, err)
			}
			if len(n.kernel.calls) > 0 {
				tries[i]++
			}
		}
	}
	if tries[1] != 2 || tries[2] != 2 {
		t.Errorf("tried the failing drivers %d and %d times; want each twice", tries[1], tries[2])
	}
}

// TestOnlyRollbacksAreReported kills the load of the active driver after a reboot. The next run must not report a
// rollback: it loads the same driver again, or only loads the previous driver in its place. If the load of a new driver
// is killed, the next run returns to the former driver, and must report that rollback.
func TestOnlyRollbacksAreReported(t *testing.T) {
	t.Parallel()
	away := finder{err: fault.New(fault.Transient, "nobody answers", "")}
	says := func(r *agent.Report) bool { return strings.Contains(strings.Join(r.Plan, "\n"), "rolled back") }
	for name, row := range map[string]struct {
		previous bool // whether the node has a previous driver
		kills    int
		reboots  bool // whether the node also reboots after each kill
	}{
		"the only driver, killed once":             {kills: 1},
		"the only driver, takes the node down":     {kills: 2, reboots: true},
		"the driver after another, killed once":    {previous: true, kills: 1},
		"the driver after another, takes it down":  {previous: true, kills: 2, reboots: true},
		"the driver after another, takes it once":  {previous: true, kills: 1, reboots: true},
		"the driver after another, killed at once": {previous: true, kills: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, ref, older, newer, po, pn := publishTwo(t, 1)
			active, digest := older, po.Digest
			if row.previous {
				active, digest = newer, pn.Digest
				if _, err := n.run(t, ref, digest, active.Driver); err != nil {
					t.Fatal(err)
				}
			}
			n.reboot(t)
			for range row.kills {
				n.killed(t, ref, digest, active, "nvidia")
				if row.reboots {
					n.reboot(t)
				}
			}
			n.parts.Finder = away
			if r, err := n.runAs(t); says(r) {
				t.Errorf("Run = %v reports %q; want no rollback, because there was none", err, r.Plan)
			}
		})
	}
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	n.parts.Finder = away
	if r, err := n.runAs(t); err != nil || !says(r) || r.Verdict.Digest != po.Digest {
		t.Errorf("Run = %v with %s reports %q; want the rollback to the former driver", err, r.Verdict.Digest, r.Plan)
	}
}

// TestBusyRollbackIsNotReported checks a rollback while a program uses the driver. The report must not list the
// rollback, or the removal of the only driver, as done.
func TestBusyRollbackIsNotReported(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.inUse(t, "1")
	if r, err := n.rollback(); !fault.Is(err, fault.Busy) || len(r.Plan) > 0 {
		t.Errorf("Rollback of the only driver = %v, did %q; want busy, and nothing done", err, r.Plan)
	}
	n.inUse(t, "0")
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "1")
	if r, err := n.rollback(); !fault.Is(err, fault.Busy) || len(r.Plan) > 0 {
		t.Errorf("Rollback = %v, did %q; want busy, and nothing done", err, r.Plan)
	}
}

// TestNotedRollbackOfARelease checks that the agent can read the records of a waiting rollback in the form of this
// release. A node may be updated to a later release of the fetcher while a rollback waits.
func TestNotedRollbackOfARelease(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	sample.Write(t, n.root, attemptsFile, fmt.Sprintf(`{
  %q: {"before": {}, "at": "2026-11-30T10:00:00Z", "byHand": true, "unknown": "to this release"},
  %q: {"before": {}, "at": "2026-11-30T10:00:00Z", "next": true}
}
`, pn.Digest, po.Digest))
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Rejected) || r.Verdict.Digest != po.Digest ||
		r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run = %s %s, %v; want the previous driver, and the newer one refused", r.Verdict.State, r.Verdict.Driver,
			err)
	}
}

// TestEditBootBesideAnother checks that a run changes neither the boot configuration nor the record of its changes
// while another fetcher holds the lock. Both fetchers first write each small file under the same temporary name.
// Without the lock, one record could get the content of another.
func TestEditBootBesideAnother(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	maker := &bootMaker{entries: 5}
	n.parts.Boot, n.cfg.EditBoot = maker, true
	loadPin := func(on, cmdline string) {
		sample.Write(t, n.root, "proc/sys/kernel/loadpin/enforce", on+"\n")
		sample.Write(t, n.root, "proc/cmdline", cmdline+"\n")
	}
	loadPin("1", "ro")
	other, err := install.Open(n.parts.Node, n.cfg.InstallDir, true)
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := other.Lock("tmp/none")
	if err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(n.root, installDir, ".prebake/boot.json")
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Rejected) ||
		!strings.Contains(err.Error(), "another installer works") || len(maker.wants)+maker.reboots > 0 {
		t.Errorf("Run = %v, %d edits, %d reboots; want none beside another fetcher", err, len(maker.wants), maker.reboots)
	}
	if _, err := os.Stat(record); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record of changes: %v; want none", err)
	}
	if _, err := agent.New(n.cfg, n.parts).Boot(true); !fault.Is(err, fault.Busy) || maker.undone {
		t.Errorf("Boot, undone = %v; want busy", err)
	}
	// While another fetcher holds the lock, a run must not reset the count of changes either.
	const edits = `{"edits":1,"at":"2026-11-30T10:00:00Z","bootId":"x","applied":true}`
	sample.Write(t, filepath.Dir(record), "boot.json", edits)
	loadPin("0", "ro")
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Busy) {
		t.Errorf("Run = %v; want busy", err)
	}
	if raw, err := os.ReadFile(record); err != nil || string(raw) != edits {
		t.Errorf("the record of changes = %s, %v; want it as before", raw, err)
	}
	if err := errors.Join(unlock(), other.Close()); err != nil {
		t.Fatal(err)
	}
}
