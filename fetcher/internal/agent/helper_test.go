package agent_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// TestHelperModule checks that the agent runs the node's modprobe for drm_kms_helper, which nvidia-drm needs, before it
// loads nvidia-drm. It runs modprobe only if drm_kms_helper is not loaded yet.
func TestHelperModule(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: modprobe runs in the node's root")
	}
	key, ref := testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	c.Modify = func(files map[string]string) {
		files["drivers/nvidia-drm.ko"] = string(sample.Module("nvidia-drm", newVersion,
			c.Kernel.Release+" SMP preempt mod_unload "))
	}
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.reboot(t)
	out := filepath.Join(n.root, "asked")
	inputs.Files(t, "testdata/modprobe.go")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(n.root, "sbin/modprobe"),
		"testdata/modprobe.go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	for _, want := range []string{"-q drm_kms_helper\n", ""} {
		if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
			t.Fatal(err)
		}
		// If modprobe ran after the load of a module of the driver, its output has that module's line of /proc/modules.
		raw, err := os.ReadFile(out)
		if string(raw) != want || err != nil && want != "" {
			t.Errorf("modprobe was asked for %q, %v; want %q", raw, err, want)
		}
		if !slices.Contains(n.kernel.calls, "load nvidia_drm "+newVersion) {
			t.Errorf("system calls %v; want nvidia-drm loaded", n.kernel.calls)
		}
		n.reboot(t)
		sample.Write(t, n.root, "sys/module/drm_kms_helper/refcnt", "0\n")
		if err := os.RemoveAll(out); err != nil {
			t.Fatal(err)
		}
	}
}
