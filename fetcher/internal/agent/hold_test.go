package agent_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// watcher is told verdicts.
type watcher func(v gpucheck.Verdict)

func (w watcher) Tell(v gpucheck.Verdict) { w(v) }
func (w watcher) Alive()                  {}

// A driver that something else in the kernel uses, or that the kernel never unloads,
// stays whole: nothing of it is unloaded before the refusal.
func TestHeldInKernel(t *testing.T) {
	t.Parallel()
	for name, modules := range map[string]string{
		"gdrdrv":          "gdrdrv 36864 0 - Live 0x0 (OE)\nnvidia_uvm 4096 0 - Live 0x0 (OE)\nnvidia 4096 2 gdrdrv,nvidia_uvm, Live 0x0 (OE)\n",
		"never unloads":   "nvidia_uvm 4096 - - Live 0x0 (OE)\nnvidia 4096 - - Live 0x0 (OE)\n",
		"never unloads m": "nvidia_uvm 4096 0 - Live 0x0 (OE)\nnvidia 4096 1 nvidia_uvm,[permanent], Live 0x0 (OE)\n",
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
		if !fault.Is(err, fault.Busy) || fault.Hint(err) == "" || !strings.Contains(err.Error(), strings.TrimSuffix(name, " m")) {
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
	// Between the looks somebody replaces the module, and then puts it back.
	versions := []string{newVersion, oldVersion, newVersion}
	want := []gpucheck.State{gpucheck.Ready, gpucheck.Drifted, gpucheck.Ready}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var got []gpucheck.State
		err := agent.New(n.cfg, n.parts).Hold(ctx, time.Minute, watcher(func(v gpucheck.Verdict) {
			if got = append(got, v.State); len(got) == len(versions) {
				cancel()
				return
			}
			sample.Write(t, n.root, "sys/module/nvidia/version", versions[len(got)]+"\n")
		}))
		if err != nil {
			t.Errorf("Hold = %v; want nil when told to stop", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("verdicts (-want +got):\n%s", diff)
		}
		if took := time.Since(start); took != 3*time.Minute {
			t.Errorf("three looks took %v; want 3m", took)
		}
	})
	if len(n.kernel.calls) > 0 {
		t.Errorf("Hold made system calls: %v", n.kernel.calls)
	}
}
