package agent_test

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestLoweredRecordAllowsReturn checks a node that reboots because of a fatal GPU error, while a new driver waits for
// the reboot. The new driver cannot use the GPU. The former driver could use the GPU before the error, so the agent
// must load the former driver again.
func TestLoweredRecordAllowsReturn(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		before func(t *testing.T, n *node, stage func()) // its last step is the last check before the reboot
	}{
		{"a check found the error", func(t *testing.T, n *node, stage func()) {
			stage()
			watchGPU(t, n, map[int]func(){1: func() { n.says(brokenGPU) }}, 4)
		}},
		{"a check and a later run found the error", func(t *testing.T, n *node, stage func()) {
			watchGPU(t, n, map[int]func(){1: func() { n.says(brokenGPU) }}, 4)
			stage()
		}},
		{"only a run found the error", func(_ *testing.T, n *node, stage func()) {
			n.says(brokenGPU)
			stage()
		}},
		{"a record of an older release", func(t *testing.T, n *node, stage func()) {
			stage()
			n.changeRecord(t, map[string]any{"mostUsableGPUs": nil})
			watchGPU(t, n, map[int]func(){1: func() { n.says(brokenGPU) }}, 4)
		}},
		{"an older release and no check", func(t *testing.T, n *node, stage func()) {
			stage()
			n.changeRecord(t, map[string]any{"mostUsableGPUs": nil})
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			n, ref, older, newer, po, pn := publishTwo(t, 1)
			n.kernel.log = []string{"<6>[    1.000000] the kernel boots"}
			n.parts.Probe = byVersion{n.root, newVersion}
			n.answer(ref, po.Digest, older.Driver)
			row.before(t, n, func() {
				n.inUse(t, "1")
				if r, err := n.run(t, ref, pn.Digest, newer.Driver); !strings.Contains(r.Answer.Reason, "in use") {
					t.Fatalf("Run = %q, %v; want the new driver to wait", r.Answer.Reason, err)
				}
				n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
			})
			n.kernel.log = nil
			n.reboot(t)
			r, err := n.runAs(t)
			if r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != po.Digest {
				t.Errorf("Run after the reboot = %s %s, %v; want the former driver, ready", r.Verdict.State, r.Verdict.Digest, err)
			}
			if len(n.kernel.calls) == 0 || n.kernel.calls[0] != "load nvidia "+newVersion {
				t.Errorf("system calls %v; want the new driver tried first", n.kernel.calls)
			}
		})
	}
}

// TestCheckIsRecordedDuringDownload checks that Monitor records the result of each check while a run downloads another
// driver and holds the lock. Otherwise `fetcher status` would show an old state for hours on a slow network.
func TestCheckIsRecordedDuringDownload(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	state := &atomic.Int32{}
	n.parts.Probe = repairable{probe{n.root, 1}, state}
	n.answer(ref, pn.Digest, newer.Driver)
	synctest.Test(t, func(t *testing.T) {
		var begun atomic.Bool
		open := n.parts.Open
		n.parts.Open = func(ref string) (agent.Repository, error) {
			repo, err := open(ref)
			return blobs{repo, func(_ string, rc io.ReadCloser) io.ReadCloser {
				if !begun.CompareAndSwap(false, true) {
					return rc
				}
				for _, to := range []int32{lost, healthy} {
					state.Store(to)
					time.Sleep(90 * time.Second) // long enough for one check
					s, err := agent.New(n.cfg, n.parts).Status(t.Context())
					if err != nil || s.Verdict.Digest != po.Digest || (s.Verdict.State == gpucheck.Ready) != (to == healthy) {
						t.Errorf("Status during the download, GPU in state %d = %+v, %v", to, s, err)
					}
				}
				return rc
			}}, err
		}
		a := agent.New(n.cfg, n.parts)
		a.Watch(watcher(func(gpucheck.Verdict) {}))
		if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != pn.Digest || !begun.Load() {
			t.Errorf("Run = %+v, %v, download seen %t; want the new driver", r.Verdict, err, begun.Load())
		}
	})
}

// losing stands in for NVML on a node with two GPUs, of which one is lost.
type losing struct {
	probe
	lost int
}

func (p *losing) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	nvml, err := p.probe.Probe(ctx, library, persist)
	for i := range nvml.Devices {
		if nvml.Devices[i].PCIBusID = fmt.Sprintf("00000000:00:0%d.0", 4+i); i == p.lost {
			nvml.Devices[i].Error, nvml.Devices[i].Code = "read name: GPU is lost", 15
		}
	}
	return nvml, err
}

// TestStatusNamesTheLostGPU checks that `fetcher status` names the GPU that is lost now, and not the GPU that was lost
// before.
func TestStatusNamesTheLostGPU(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 2, key)
	gpus := &losing{probe{n.root, 2}, 0}
	n.parts.Probe = gpus
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Unusable) {
		t.Fatalf("Run = %v; want unusable", err)
	}
	a := agent.New(n.cfg, n.parts)
	for gpus.lost = range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := a.Monitor(ctx, time.Millisecond, watcher(func(gpucheck.Verdict) { cancel() })); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("1 of 2 GPUs usable: 0000:00:0%d.0: read name: GPU is lost", 4+gpus.lost)
		if s, err := a.Status(t.Context()); err != nil || s.Verdict.Reason != want {
			t.Errorf("Status with GPU %d lost = %q, %v; want %q", gpus.lost, s.Verdict.Reason, err, want)
		}
	}
}
