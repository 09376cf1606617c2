package agent_test

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// foreignNode is a node on which Google's installer loaded a driver. The installer's folder has the files of the named
// modules.
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

// TestForeignPutBack checks that a foreign driver is loaded again from its own files when our driver fails.
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
	// The node's additional module is loaded with this program's driver, too.
	delete(n.kernel.refuse, "nvidia_uvm "+newVersion)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	if last := n.kernel.calls[len(n.kernel.calls)-1]; last != "load nvidia_peermem "+newVersion {
		t.Errorf("the last system call is %q; want peermem loaded again", last)
	}
}

// TestForeignKilled kills a run between the unload of a foreign driver and the load of ours. If ours then fails, the
// next run must restore the foreign driver.
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
	// A foreign driver of an earlier boot is not restored.
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

// TestForeignNotPutBack checks that the error names the modules whose files are missing.
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
