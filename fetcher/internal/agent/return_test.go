package agent_test

import (
	"bytes"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestUnprovedComesBack starts with a loaded driver that no longer verifies. If the next driver fails, the agent must
// load the former driver again from its own files. It must not try the next driver endlessly.
func TestUnprovedComesBack(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(t *testing.T, n *node){
		"without statements": damages["the statements gone"],
		"a changed library": func(t *testing.T, n *node) {
			n.edit(t, "layers/*/lib64/libnvidia-ml.so."+oldVersion,
				flipped)
		},
	} {
		key := testkit.NewKey(t)
		ref := layout(t)
		older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
		po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
		n := newNode(t, older, 1, key)
		n.reboot(t)
		n.kernel.ids = true
		if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
			t.Fatal(err)
		}
		damage(t, n)
		n.kernel.refuse["nvidia_uvm "+newVersion] = syscall.ENODEV
		if _, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Unusable) ||
			strings.Contains(err.Error(), "and then") {
			t.Errorf("%s: Run = %v; want unusable, and the former driver back", name, err)
		}
		want := append([]string{"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia", "load nvidia " + newVersion,
			"load nvidia_uvm " + newVersion, "unload nvidia"}, loads(oldVersion)...)
		if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
			t.Errorf("%s: system calls (-want +got):\n%s", name, diff)
		}
		for range 3 {
			_, _ = n.run(t, ref, pn.Digest, newer.Driver) // the test checks the system calls of the last run
		}
		if len(n.kernel.calls) != 0 {
			t.Errorf("%s: the agent still tries the failing driver: %v", name, n.kernel.calls)
		}
	}
}

// TestRefusedIsKept checks when the agent downloads a driver that it cannot load yet: never while it must keep a
// foreign driver, and only once while a program uses the GPU.
func TestRefusedIsKept(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := foreignNode(t, c, key, "nvidia", "nvidia-uvm", "nvidia-peermem")
	n.cfg.ReplaceForeign = false
	for range 2 {
		if r, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Busy) || r.FetchedBytes != 0 {
			t.Errorf("Run = %v, %d bytes; want an error before anything is fetched", err, r.FetchedBytes)
		}
	}
	n.cfg.ReplaceForeign = true
	n.inUse(t, "1")
	for i := range 3 {
		r, err := n.run(t, ref, p.Digest, c.Driver)
		if !fault.Is(err, fault.Busy) || (r.FetchedBytes > 0) != (i == 0) {
			t.Errorf("%d: Run = %v, %d bytes; want one download", i, err, r.FetchedBytes)
		}
	}
}

// TestForeignIsLeftAlone checks that the agent unloads a working foreign driver at most twice if its own driver fails.
func TestForeignIsLeftAlone(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := foreignNode(t, c, key, "nvidia", "nvidia-uvm", "nvidia-peermem")
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	tries := 0
	for range 5 {
		_, err := n.run(t, ref, p.Digest, c.Driver)
		if err == nil {
			t.Error("Run = nil; want an error")
		}
		if len(n.kernel.calls) > 0 {
			tries++
		}
	}
	if tries != 2 {
		t.Errorf("%d runs made system calls; want 2, until the agent gives the driver up", tries)
	}
}

// TestMissingModuleIsProved checks that the agent verifies the file of a missing module before it loads the module. The
// test replaces that file, and the file's digest in set.json, so the agent must load nothing.
func TestMissingModuleIsProved(t *testing.T) {
	t.Parallel()
	n, _, _, _, _, _ := publishTwo(t, 1)
	if err := n.kernel.DeleteModule("nvidia_uvm"); err != nil {
		t.Fatal(err)
	}
	evil := append(sample.Module("nvidia-uvm", oldVersion, "6.1.77+ SMP preempt mod_unload "), "evil"...)
	var was string
	n.edit(t, "layers/*/drivers/nvidia-uvm.ko", func(raw []byte) []byte { was = digestOf(raw); return evil })
	n.edit(t, "sets/*/set.json",
		func(raw []byte) []byte { return bytes.ReplaceAll(raw, []byte(was), []byte(digestOf(evil))) })
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	if _, err := n.runAs(t); err == nil || len(n.kernel.calls) > 0 {
		t.Errorf("Run = %v, calls %v; want nothing loaded", err, n.kernel.calls)
	}
}

// TestNextIsOfTheWish checks a driver that waits for a reboot but no longer matches the wish. After the reboot, the
// agent must load the active driver instead.
func TestNextIsOfTheWish(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.inUse(t, "1")
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Busy) {
		t.Fatal(err)
	}
	n.inUse(t, "0")
	n.cfg.Wish = oldVersion
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	n.reboot(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	if r, err := n.runAs(t); err != nil || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run = %+v, %v; want the driver of the wish", r.Verdict, err)
	}
}
