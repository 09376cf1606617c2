package agent_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// foreignNode returns a node on which Google's installer loaded a driver with three modules. Only the modules in onDisk
// have a file in the installer's folder.
func foreignNode(t *testing.T, c sample.Cell, key *testkit.Key, onDisk ...string) *node {
	t.Helper()
	n := newNode(t, c, 1, key)
	n.reboot(t)
	n.kernel.ids = true
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-peermem"} {
		m := sample.Module(name, oldVersion, c.Kernel.Release+" ")
		if err := n.kernel.InitModule(m, ""); err != nil {
			t.Fatal(err)
		}
		for _, have := range onDisk {
			if have == name {
				sample.Write(t, filepath.Join(n.root, installDir), "drivers/"+name+".ko", string(m))
			}
		}
	}
	sample.Write(t, filepath.Join(n.root, installDir), "lib64/libcuda.so.1", "of another installer")
	n.cfg.ReplaceForeign = true
	return n
}

// TestForeignPutBack checks that the agent loads a foreign driver again from that driver's own files if our driver
// fails.
func TestForeignPutBack(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := foreignNode(t, c, key, "nvidia", "nvidia-uvm", "nvidia-peermem")
	before := n.tree(t)
	n.kernel.refuse["nvidia_uvm "+newVersion] = syscall.ENODEV
	n.kernel.calls = nil
	_, err := n.run(t, ref, p.Digest, c.Driver)
	if !fault.Is(err, fault.Unusable) || strings.Contains(err.Error(), "and then") {
		t.Errorf("Run = %v; want unusable, and nothing else", err)
	}
	want := []string{
		"unload nvidia_peermem", "unload nvidia_uvm", "unload nvidia", "load nvidia " + newVersion,
		"load nvidia_uvm " + newVersion, "unload nvidia",
		"load nvidia " + oldVersion, "load nvidia_uvm " + oldVersion, "load nvidia_peermem " + oldVersion,
	}
	if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, n.tree(t)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	// Our driver has the additional module nvidia_peermem, too. The agent must load it, because it was loaded before.
	delete(n.kernel.refuse, "nvidia_uvm "+newVersion)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	if last := n.kernel.calls[len(n.kernel.calls)-1]; last != "load nvidia_peermem "+newVersion {
		t.Errorf("the last system call is %q; want peermem loaded again", last)
	}
}

// TestFailedAdoption puts a copy of the active driver in place of the link .prebake/current, without set.json, and
// removes the driver itself. The agent adopts the loaded driver, but the probe does not answer. Programs use the files
// of the copy, so their links must stay.
func TestFailedAdoption(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	good := n.tree(t)
	ours := filepath.Join(n.root, installDir, ".prebake")
	current := filepath.Join(ours, "current")
	set, err := filepath.EvalSymlinks(current)
	if err := errors.Join(err, os.Remove(current)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cp", "-rL", set, current).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	if err := errors.Join(os.Remove(filepath.Join(current, "set.json")), os.Remove(filepath.Join(ours, "previous")),
		os.RemoveAll(filepath.Join(ours, "sets"))); err != nil {
		t.Fatal(err)
	}
	copied := n.tree(t)
	works := n.parts.Probe
	n.parts.Probe = silent{}
	for i := range 2 {
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if !fault.Is(err, fault.Unusable) || r.Changed {
			t.Errorf("run %d: Run = %+v, %v; want unusable, and nothing changed", i, r.Verdict, err)
		}
		if diff := cmp.Diff(copied, n.tree(t)); diff != "" {
			t.Errorf("run %d: tree (-want +got):\n%s", i, diff)
		}
		if info, err := os.Lstat(current); err != nil || !info.IsDir() {
			t.Errorf("run %d: the copy: %v, %v; want it in its place", i, info, err)
		}
	}
	n.parts.Probe, n.cfg.Retry = works, true
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if err != nil || r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != pn.Digest {
		t.Errorf("then: Run = %+v, %v; want the driver adopted", r.Verdict, err)
	}
	if diff := cmp.Diff(good, n.tree(t)); diff != "" {
		t.Errorf("then: tree (-want +got):\n%s", diff)
	}
}

// TestForeignKilled kills a run after it unloaded a foreign driver and before it loaded ours. If our driver then fails,
// the next run must load the foreign driver again.
func TestForeignKilled(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := foreignNode(t, c, key, "nvidia", "nvidia-uvm", "nvidia-peermem")
	before := n.tree(t)
	n.killed(t, ref, p.Digest, c, "nvidia")
	n.kernel.refuse["nvidia_uvm "+newVersion] = syscall.ENODEV
	_, err := n.run(t, ref, p.Digest, c.Driver)
	if err == nil || !strings.Contains(err.Error(), "failed 2 times") { // the kill and this failure
		t.Errorf("Run = %v; want the driver refused", err)
	}
	want := []string{
		"load nvidia " + newVersion, "load nvidia_uvm " + newVersion, "unload nvidia",
		"load nvidia " + oldVersion, "load nvidia_uvm " + oldVersion, "load nvidia_peermem " + oldVersion,
	}
	if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, n.tree(t)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	// After a reboot, no foreign driver was unloaded, so the agent must not load one.
	n.cfg.Retry = true
	n.killed(t, ref, p.Digest, c, "nvidia")
	n.reboot(t)
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Unusable) {
		t.Errorf("Run after a reboot = %v; want unusable", err)
	}
	for _, call := range n.kernel.calls {
		if strings.HasSuffix(call, " "+oldVersion) {
			t.Errorf("after a reboot: %s", call)
		}
	}
}

// TestForeignNotPutBack checks a foreign driver whose files are missing, so that the agent cannot load it again. The
// error must name the modules.
func TestForeignNotPutBack(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := foreignNode(t, c, key, "nvidia")
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	_, err := n.run(t, ref, p.Digest, c.Driver)
	if !fault.Is(err, fault.Unusable) ||
		!strings.Contains(err.Error(), "found no file on this node for module nvidia_uvm, nvidia_peermem") {
		t.Errorf("Run = %v; want the names of the modules that were not loaded again", err)
	}
}
