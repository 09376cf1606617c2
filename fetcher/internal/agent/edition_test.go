package agent_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestEdition checks a driver whose version has a suffix for its edition, such as -grid. Modules, NVML and the kernel
// report the version without the suffix. The agent must recognise the loaded driver nevertheless.
func TestEdition(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion+"-grid")
	ref := testkit.Registry(t, true) + "/prebake/driver"
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	r, err := n.run(t, ref, p.Digest, c.Driver)
	if err != nil || r.Verdict.State != gpucheck.Ready || r.Verdict.Driver != c.Driver {
		t.Fatalf("Run = %+v, %v; want %s ready", r, err, c.Driver)
	}
	if tree := n.tree(t); tree["firmware/nvidia/"+newVersion+"/gsp_tu10x.bin"] == "" {
		t.Errorf("installed %v; want the firmware where the driver looks for it", slices.Sorted(maps.Keys(tree)))
	}
	if raw, err := os.ReadFile(filepath.Join(n.root, "sys/module/firmware_class/parameters/path")); err != nil ||
		string(raw) != "/"+installDir+"/firmware" {
		t.Errorf("firmware path = %q, %v", raw, err)
	}
	if r, err = n.run(t, ref, p.Digest, c.Driver); err != nil || r.Changed || len(n.kernel.calls) != 0 {
		t.Errorf("second Run = %+v, %v, calls %v; want nothing changed", r, err, n.kernel.calls)
	}
	// The driver without the suffix has the same version in its modules, but other modules. The agent must replace the
	// loaded ones.
	plain := sample.NewCell(t, buildA, newVersion)
	q := sample.Publish(t, ref, key, plain)
	_, err = n.run(t, ref, q.Digest, plain.Driver)
	want := []string{"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia", "load nvidia " + newVersion,
		"load nvidia_uvm " + newVersion, "load nvidia_modeset " + newVersion}
	if diff := cmp.Diff(want, n.kernel.calls); err != nil || diff != "" {
		t.Errorf("from an edition to the release: %v, system calls (-want +got):\n%s", err, diff)
	}
}
