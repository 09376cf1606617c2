package agent_test

import (
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
)

// TestLoweredRecordAllowsReturn reboots a node because of a fatal error of its GPU. The driver that waits for the
// reboot cannot use the GPU. The former driver used the GPU before the error, so it must be loaded again.
func TestLoweredRecordAllowsReturn(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		before func(t *testing.T, n *node, stage func()) // ends with the last check before the reboot
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

// TestCheckIsRecordedDuringDownload checks that the result of a check is recorded while the run downloads another driver
// and holds the lock. Otherwise fetcher status would show an old state for hours over a slow network.
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
					time.Sleep(90 * time.Second) // one check at least
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
