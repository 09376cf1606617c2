package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

func TestWindow(t *testing.T) {
	t.Parallel()
	for text, open := range map[string]map[string]bool{
		"any":         {"00:00": true, "12:00": true},
		"never":       {"00:00": false, "12:00": false},
		"02:00-05:00": {"01:59": false, "02:00": true, "04:59": true, "05:00": false},
		"22:00-04:00": {"21:59": false, "22:00": true, "23:59": true, "00:00": true, "03:59": true, "04:00": false},
	} {
		w, err := agent.ParseWindow(text)
		if err != nil {
			t.Fatal(err)
		}
		for at, want := range open {
			now, err := time.Parse("15:04", at)
			if err != nil {
				t.Fatal(err)
			}
			// The same time in another time zone must give the same result.
			if got := w.Closed(now.In(time.FixedZone("x", 3600))) == ""; got != want {
				t.Errorf("%s at %s: open %t; want %t", text, at, got, want)
			}
		}
	}
	for _, text := range []string{"", "2-5", "02:00", "02:00-02:00", "25:00-26:00", "02:00-05:00-06:00", "always"} {
		if w, err := agent.ParseWindow(text); err == nil {
			t.Errorf("ParseWindow(%q) = %+v; want an error", text, w)
		}
	}
}

// TestMaintenance checks that the agent replaces a working driver only during the maintenance hours. If no driver is
// loaded, the hours do not matter.
func TestMaintenance(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	n.cfg.Maintenance = agent.Window{From: 2 * time.Hour, Until: 5 * time.Hour}
	n.parts.Now = func() time.Time { return time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC) }
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Busy) || !strings.Contains(err.Error(), "02:00 to 05:00 UTC") ||
		r.Verdict.Digest != po.Digest || len(n.kernel.calls) > 0 {
		t.Errorf("at noon: %+v, %v, calls %v; want the old driver kept", r.Verdict, err, n.kernel.calls)
	}
	n.parts.Now = func() time.Time { return time.Date(2026, 6, 2, 3, 0, 0, 0, time.UTC) }
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.Digest != pn.Digest {
		t.Errorf("at night: %+v, %v; want the new driver", r.Verdict, err)
	}
	n.cfg.Maintenance = agent.Window{Never: true}
	n.reboot(t)
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("after a reboot: %+v, %v; want the new driver loaded", r.Verdict, err)
	}
}

// TestWaitIdle checks that the agent names the program that uses the driver, waits for its end, and replaces the
// driver.
func TestWaitIdle(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	n.inUse(t, "1")
	sample.Write(t, n.root, "proc/812/comm", "python3\n")
	sample.Write(t, n.root, "proc/812/cgroup", "0::/kubepods/podaaaaaaaa-7d1c-4b0e-9a53-0d7f6b1c2e3f/0b\n")
	sample.Write(t, n.root, "var/log/pods/ml_train-0_aaaaaaaa-7d1c-4b0e-9a53-0d7f6b1c2e3f/0.log", "")
	if err := os.MkdirAll(filepath.Join(n.root, "proc/812/fd"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/nvidia0", filepath.Join(n.root, "proc/812/fd/3")); err != nil {
		t.Fatal(err)
	}
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Busy) || !strings.Contains(err.Error(), "in use by python3 (pod ml/train-0)") ||
		r.Verdict.Digest != po.Digest {
		t.Errorf("Run = %v; want busy, and the name of the program", err)
	}
	n.cfg.WaitIdle = time.Minute
	n.answer(ref, pn.Digest, newer.Driver)
	a, told := agent.New(n.cfg, n.parts), told{}
	a.Watch(&ending{&told, func() { n.inUse(t, "0") }}) // the program ends once the agent waits for it
	if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != pn.Digest || r.Verdict.State != gpucheck.Ready ||
		r.Pending != "" {
		t.Errorf("Run = %+v, %v, pending %q; want the new driver once the GPU is idle", r.Verdict, err, r.Pending)
	}
	if len(told) == 0 || told[0].State != gpucheck.Ready || told[0].Digest != po.Digest {
		t.Errorf("while the agent waits, it reports %+v; want the active driver", told)
	}
}

// TestWaitIdleRelabelled changes the node's label while a run waits for an idle GPU. If the label then asks for another
// driver or is malformed, the run must end as busy, with the driver that was active. If the label cannot be read, the
// last one holds.
func TestWaitIdleRelabelled(t *testing.T) {
	t.Parallel()
	for _, row := range labelChanges {
		synctest.Test(t, func(t *testing.T) {
			n, ref, older, newer, po, pn := publishTwo(t, 1)
			n.inUse(t, "1")
			n.cfg.WaitIdle = time.Minute
			n.parts.Finder = &byWish{has: map[target.Wish]resolve.Answer{
				"default":           answerOf("server", ref, po.Digest, older.Driver),
				oldVersion:          answerOf("server", ref, po.Digest, older.Driver),
				"default@NVIDIA_L4": answerOf("server", ref, pn.Digest, newer.Driver)}}
			n.kernel.calls = nil
			a, label := agent.New(n.cfg, n.parts), &nodeLabel{wish: "default@NVIDIA_L4"}
			a.UseLabel(label.read)
			a.Watch(&ending{&told{}, func() { *label = row.label; n.inUse(t, "0") }})
			r, err := a.Run(t.Context())
			if row.ends && (!fault.Is(err, fault.Busy) || r.Verdict.Digest != po.Digest || len(n.kernel.calls) > 0) ||
				!row.ends && (err != nil || r.Verdict.Digest != pn.Digest) || r.Relabelled != row.ends {
				t.Errorf("%s: Run = %s, %v, system calls %v; want busy: %t", row.name, r.Verdict.Digest, err, n.kernel.calls,
					row.ends)
			}
			if !row.ends || row.label.err != nil {
				return
			}
			if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != po.Digest || r.Pending != "" {
				t.Errorf("%s: the next Run = %s, %v, pending %q; want %s", row.name, r.Verdict.Digest, err, r.Pending, po.Digest)
			}
		})
	}
}

// TestWaitIdleRelabelledInUse changes the node's label an hour after a run began to wait for an idle GPU. The GPU stays
// in use. The run must end soon, so that the driver of the former wish does not stay noted for the next boot. At once,
// the watcher must learn why the node lacks the wanted driver.
func TestWaitIdleRelabelledInUse(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name  string
		label nodeLabel // after an hour
		took  time.Duration
	}{
		{"the same label", nodeLabel{wish: "default@NVIDIA_L4"}, 3 * time.Hour},
		{"an unread label", nodeLabel{err: unread}, 3 * time.Hour},
		{"a removed label", nodeLabel{}, time.Hour},
		{"a malformed label", nodeLabel{err: malformed}, time.Hour},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n, ref, older, newer, po, pn := publishTwo(t, 1)
				n.inUse(t, "1")
				n.cfg.WaitIdle = 3 * time.Hour
				n.parts.Finder = &byWish{has: map[target.Wish]resolve.Answer{
					"default":           answerOf("server", ref, po.Digest, older.Driver),
					"default@NVIDIA_L4": answerOf("server", ref, pn.Digest, newer.Driver)}}
				a, start := agent.New(n.cfg, n.parts), time.Now()
				label := nodeLabel{wish: "default@NVIDIA_L4"}
				a.UseLabel(func(ctx context.Context) (target.Wish, error) {
					if time.Since(start) >= time.Hour {
						label = row.label
					}
					return label.read(ctx)
				})
				w := &reasons{told: &told{}}
				a.Watch(w)
				r, err := a.Run(t.Context())
				took, ends := time.Since(start).Round(idleCheck), row.took == time.Hour
				if !fault.Is(err, fault.Busy) || r.Relabelled != ends || took != row.took {
					t.Errorf("Run = %v after %v, relabelled %t; want busy after %v", err, took, r.Relabelled, row.took)
				}
				if len(w.why) == 0 || !fault.Is(w.why[0], fault.Busy) || w.at[0].Sub(start) >= idleCheck {
					t.Errorf("the watcher gets the reasons %v at %v; want busy at once", w.why, w.at)
				}
			})
		})
	}
}

// idleCheck is the time between two reads of the label while a run waits for an idle GPU.
const idleCheck = time.Minute

// reasons is a watcher that records why the wanted driver waits, and the time.
type reasons struct {
	*told
	why []error
	at  []time.Time
}

func (w *reasons) Pending(why error) { w.why, w.at = append(w.why, why), append(w.at, time.Now()) }

// ending is a watcher that calls a function after each report.
type ending struct {
	*told
	then func()
}

func (e *ending) Report(v gpucheck.Verdict) {
	e.told.Report(v)
	e.then()
}

type told []gpucheck.Verdict

func (l *told) Report(v gpucheck.Verdict) { *l = append(*l, v) }
func (l *told) Alive()                    {}
func (l *told) CheckStarted()             {}
func (l *told) CheckStopped()             {}
