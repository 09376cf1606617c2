package agent_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
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
	"github.com/prebake/prebake/pkg/testkit"
)

type watcher func(v gpucheck.Verdict)

func (w watcher) Report(v gpucheck.Verdict) { w(v) }
func (w watcher) Alive()                    {}
func (w watcher) CheckStarted()             {}
func (w watcher) CheckStopped()             {}

// TestHeldInKernel checks that the agent unloads no module of a driver if the kernel cannot unload one of them.
func TestHeldInKernel(t *testing.T) {
	t.Parallel()
	for name, modules := range map[string]string{
		"gdrdrv": "gdrdrv 36864 0 - Live 0x0 (OE)\nnvidia_modeset 4096 0 - Live 0x0 (OE)\nnvidia_uvm 4096 0 - " +
			"Live 0x0 (OE)\nnvidia 4096 3 gdrdrv,nvidia_uvm,nvidia_modeset, Live 0x0 (OE)\n",
		"never unloads": "nvidia_modeset 4096 - - Live 0x0 (OE)\nnvidia_uvm 4096 - - Live 0x0 (OE)\nnvidia 4096 - - Live " +
			"0x0 (OE)\n",
		"never unloads m": "nvidia_modeset 4096 0 - Live 0x0 (OE)\nnvidia_uvm 4096 0 - Live 0x0 (OE)\nnvidia 4096 1 " +
			"nvidia_uvm,[permanent], Live 0x0 (OE)\n",
	} {
		key := testkit.NewKey(t)
		ref := layout(t)
		old, c := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
		first, second := sample.Publish(t, ref, key, old), sample.Publish(t, ref, key, c)
		n := newNode(t, old, 1, key)
		if _, err := n.run(t, ref, first.Digest, old.Driver); err != nil {
			t.Fatal(err)
		}
		sample.Write(t, n.root, "proc/modules", modules)
		before := n.tree(t)
		_, err := n.run(t, ref, second.Digest, c.Driver)
		if !fault.Is(err, fault.Busy) || fault.Hint(err) == "" ||
			!strings.Contains(err.Error(), strings.TrimSuffix(name, " m")) {
			t.Errorf("%s: Run = %v; want busy, with the reason and a hint", name, err)
		}
		if len(n.kernel.calls) > 0 {
			t.Errorf("%s: system calls %v; want none", name, n.kernel.calls)
		}
		if diff := cmp.Diff(before, n.tree(t)); diff != "" {
			t.Errorf("%s: the install folder changed (-before +after):\n%s", name, diff)
		}
	}
}

// answering stands in for NVML with a fixed answer. It records which library was asked.
type answering struct {
	nvml  gpucheck.NVML
	err   error
	asked *string
}

func (a answering) Probe(_ context.Context, library string, _ bool) (gpucheck.NVML, error) {
	*a.asked = library
	return a.nvml, a.err
}

// TestForeignStatus checks the verdict on a foreign driver. In /proc/modules, the kernel cannot unload modules, so it
// shows no reference counts. The lines are from a machine with an H200 and the open driver 580.159.04.
func TestForeignStatus(t *testing.T) {
	t.Parallel()
	const theirs = "580.159.04"
	healthy := gpucheck.NVML{Version: theirs, CUDA: "13.0",
		Devices: []gpucheck.Device{{UUID: "GPU-1", Name: "NVIDIA H200", PCIBusID: "00000000:00:04.0"}}}
	lost := healthy
	lost.Devices = []gpucheck.Device{{PCIBusID: "00000000:00:04.0", Error: "read name: GPU is lost"}}
	for name, row := range map[string]struct {
		probe   answering
		library string // the path of the driver's library
		state   gpucheck.State
		reason  string
		kind    fault.Kind // Internal means no error
		usable  int
	}{
		"healthy, known to the loader": {answering{nvml: healthy}, "libnvidia-ml.so.1", gpucheck.Foreign,
			"every GPU answers", fault.Internal, 1},
		"healthy, as Google's installer has": {answering{nvml: healthy}, "/var/lib/nvidia/lib64/libnvidia-ml.so.1",
			gpucheck.Foreign, "every GPU answers", fault.Internal, 1},
		"lost": {answering{nvml: lost}, "libnvidia-ml.so.1", gpucheck.Unusable, "GPU is lost",
			fault.Unusable, 0},
		"nobody may ask": {answering{err: errors.New("no probe")}, "libnvidia-ml.so.1", gpucheck.Foreign,
			"NVML was not asked", fault.Internal, 0},
	} {
		n := newNode(t, sample.NewCell(t, buildA, newVersion), 1, testkit.NewKey(t))
		sample.Write(t, n.root, "proc/modules", "nvidia_uvm 4096 - - Live 0x0 (OE)\nnvidia 4096 - - Live 0x0 (OE)\n")
		sample.Write(t, n.root, "proc/driver/nvidia/version",
			"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "+theirs+"  Release Build  (dvs-builder@x)\n")
		for _, m := range []string{"nvidia", "nvidia_uvm"} {
			sample.Write(t, n.root, "sys/module/"+m+"/version", theirs+"\n")
		}
		if strings.HasPrefix(row.library, "/") {
			sample.Write(t, n.root, row.library[1:], "ELF")
		}
		asked := ""
		row.probe.asked = &asked
		n.parts.Probe = row.probe
		s, err := agent.New(n.cfg, n.parts).Status(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		v := s.Verdict
		if v.State != row.state || !strings.Contains(v.Reason, row.reason) || v.Driver.String() != theirs+"-open" ||
			v.PCIGPUs != 1 || v.UsableGPUs != row.usable || len(v.Modules) != 2 {
			t.Errorf("%s: %+v; want %s, %q", name, v, row.state, row.reason)
		}
		if err := v.Err(); (err == nil) != (row.kind == fault.Internal) || err != nil && !fault.Is(err, row.kind) {
			t.Errorf("%s: Err = %v; want %v", name, err, row.kind)
		}
		if asked != row.library {
			t.Errorf("%s: NVML was asked in %s; want %s", name, asked, row.library)
		}
	}
}

func TestHold(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	n.kernel.calls = nil
	// Between the checks, another program replaces the module, and later restores the former one.
	versions := []string{newVersion, oldVersion, newVersion}
	want := []gpucheck.State{gpucheck.Ready, gpucheck.Drifted, gpucheck.Ready}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var got []gpucheck.State
		err := agent.New(n.cfg, n.parts).Monitor(ctx, time.Minute, watcher(func(v gpucheck.Verdict) {
			if got = append(got, v.State); len(got) == len(versions) {
				cancel()
				return
			}
			sample.Write(t, n.root, "sys/module/nvidia/version", versions[len(got)]+"\n")
		}))
		if err != nil {
			t.Errorf("Monitor = %v; want nil when told to stop", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("verdicts (-want +got):\n%s", diff)
		}
		if took := time.Since(start); took != 3*time.Minute {
			t.Errorf("three checks took %v; want 3m", took)
		}
	})
	if len(n.kernel.calls) > 0 {
		t.Errorf("Hold made system calls: %v", n.kernel.calls)
	}
}

// TestNotLoaded checks that Monitor ends once the driver is missing at three checks in a row. Then another process
// unloaded the driver and did not load it again.
func TestNotLoaded(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	live, err := os.ReadFile(filepath.Join(n.root, "proc/modules"))
	if err != nil {
		t.Fatal(err)
	}
	// At each check, the driver is loaded (1) or not (0). While another installer works, the driver may be missing at one
	// or two checks.
	checks := []int{1, 0, 0, 1, 0, 1, 0, 0, 0}
	synctest.Test(t, func(t *testing.T) {
		seen := 0
		set := func() {
			modules := ""
			if seen < len(checks) && checks[seen] == 1 {
				modules = string(live)
			}
			sample.Write(t, n.root, "proc/modules", modules)
		}
		set()
		start := time.Now()
		err := agent.New(n.cfg, n.parts).Monitor(t.Context(), time.Minute, watcher(func(v gpucheck.Verdict) {
			if want := checks[seen] == 0; v.NotLoaded() != want {
				t.Errorf("check %d: %+v; want not loaded %t", seen, v, want)
			}
			seen++
			set()
		}))
		if !errors.Is(err, agent.ErrNotLoaded) || time.Since(start) != time.Duration(len(checks))*time.Minute {
			t.Errorf("Monitor = %v after %v; want %v after %d minutes", err, time.Since(start), agent.ErrNotLoaded, len(checks))
		}
	})
}

// slowFinder stands in for a slow server: it answers after the channel heard was closed.
type slowFinder struct {
	resolve.Finder
	heard chan struct{}
}

func (s slowFinder) Find(ctx context.Context, q resolve.Question) (resolve.Answer, error) {
	select {
	case <-s.heard:
	case <-ctx.Done():
	}
	return s.Finder.Find(ctx, q)
}

// TestReportsWhileItWaits checks that a run reports a working driver before the server answers. It must do so after a
// reboot, and if the driver is already loaded.
func TestReportsWhileItWaits(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	for _, rebooted := range []bool{false, true} {
		if rebooted {
			n.reboot(t)
		}
		n.answer(ref, p.Digest, c.Driver)
		synctest.Test(t, func(t *testing.T) {
			heard := make(chan struct{})
			n.parts.Finder = slowFinder{n.parts.Finder, heard}
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			a := agent.New(n.cfg, n.parts)
			once := sync.OnceFunc(func() { close(heard) })
			a.Watch(watcher(func(v gpucheck.Verdict) {
				if v.State == gpucheck.Ready {
					once()
				}
			}))
			start := time.Now()
			if _, err := a.Run(ctx); err != nil || time.Since(start) > time.Minute {
				t.Errorf("rebooted %t: Run = %v after %v; want a report of the driver in the first minute", rebooted, err,
					time.Since(start))
			}
		})
	}
}

// counted counts the calls of Alive, which tell the liveness probe that the run still works.
type counted struct {
	told
	alive int
}

func (c *counted) Alive() { c.alive++ }

// TestAliveWithoutDriver checks that a run calls Alive each minute while it waits for the server without a loaded
// driver. Otherwise the liveness probe would kill a program that had a driver before.
func TestAliveWithoutDriver(t *testing.T) {
	t.Parallel()
	for _, installed := range []bool{false, true} {
		n, ref, c, p := bare(t)
		if installed {
			if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
				t.Fatal(err)
			}
			n.reboot(t)
			n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
		}
		synctest.Test(t, func(t *testing.T) {
			heard := make(chan struct{})
			time.AfterFunc(20*time.Minute, func() { close(heard) })
			n.parts.Finder = slowFinder{finder{err: fault.New(fault.Transient, "nobody answers", "")}, heard}
			a, w := agent.New(n.cfg, n.parts), &counted{}
			a.Watch(w)
			if _, err := a.Run(t.Context()); err == nil || w.alive < 15 {
				t.Errorf("installed %t: Run = %v with %d signs of life in 20 minutes; want an error, and one each minute",
					installed, err, w.alive)
			}
		})
	}
}

// TestXidWhileWatched checks that a fatal GPU error (Xid) in the kernel log makes the node unready, until the driver
// asks for no recovery action any more.
func TestXidWhileWatched(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.answer(ref, p.Digest, c.Driver)
	a := agent.New(n.cfg, n.parts)
	if _, err := a.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	says := func(line string) {
		n.kernel.mu.Lock()
		defer n.kernel.mu.Unlock()
		n.kernel.log = append(n.kernel.log, line)
	}
	var seen []string
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	looks := 0
	err := a.Monitor(ctx, time.Millisecond, watcher(func(v gpucheck.Verdict) {
		if word := string(v.State) + " " + v.Reason; len(seen) == 0 || seen[len(seen)-1] != word {
			seen = append(seen, word)
		}
		switch looks++; looks {
		case 2:
			says("<6>[   20.000000] NVRM: Xid (PCI:0000:00:04): 31, pid=1, MMU Fault")
		case 4:
			says("<3>[   21.000000] NVRM: Xid (PCI:0000:00:04): 48, pid=1, An uncorrectable double bit error (DBE) has been " +
				"detected")
		case 8:
			says("<3>[   22.000000] NVRM: Xid (PCI:0000:00:04): 154, GPU recovery action changed from 0x1 (GPU Reset " +
				"Required) to 0x0 (None)")
		case 12:
			cancel()
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"ready ",
		"unusable the driver reports Xid 48 of GPU 0000:00:04: pid=1, An uncorrectable double bit error (DBE) has been " +
			"detected", "ready "}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

// TestRollbackTimeline checks that each rollback reports its phases, even if it fails.
func TestRollbackTimeline(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	rows := []struct {
		name    string
		prepare func()
		ok      bool
	}{
		{"nothing to roll back", func() {}, false},
		{"dry run", func() {
			if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
				t.Fatal(err)
			}
			n.cfg.DryRun = true
		}, true},
		{"in use", func() {
			n.cfg.DryRun = false
			n.inUse(t, "1")
		}, false},
		{"the only driver", func() { n.inUse(t, "0") }, true},
	}
	for _, row := range rows { // each row begins with the state that the row before it left
		row.prepare()
		r, err := n.rollback()
		if (err == nil) != row.ok || len(r.Phases) == 0 || r.Phases[0].Name != "observe" {
			t.Errorf("%s: Rollback = %v with phases %+v; want ok %t, and the phase observe", row.name, err, r.Phases, row.ok)
		}
	}
}
