package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// silent stands in for a probe that runs into its time limit, because NVML does not answer.
type silent struct{}

func (silent) Probe(context.Context, string, bool) (gpucheck.NVML, error) {
	return gpucheck.NVML{}, fault.New(fault.Unusable, "ask NVML: no answer in 2m0s", "read the kernel log")
}

// TestSilentProbe checks that a node keeps its active driver if NVML does not answer, both while the driver is loaded
// and after a reboot. The node must not count this as a failure of the driver.
func TestSilentProbe(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	works := n.parts.Probe
	n.parts.Probe = silent{}
	for range 3 {
		if _, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Unusable) || len(n.kernel.calls) > 0 {
			t.Errorf("Run = %v, calls %v; want unusable and nothing loaded", err, n.kernel.calls)
		}
	}
	for range 3 {
		n.reboot(t)
		_, err := n.run(t, ref, pn.Digest, newer.Driver)
		if diff := cmp.Diff(loads(newVersion), n.kernel.calls); !fault.Is(err, fault.Unusable) || diff != "" {
			t.Errorf("after a reboot: Run = %v; want unusable; system calls (-want +got):\n%s", err, diff)
		}
	}
	n.parts.Probe = works
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if err != nil || r.Verdict.Digest != pn.Digest || len(n.kernel.calls) > 0 {
		t.Errorf("then: Run = %s, %v, calls %v; want the same driver", r.Verdict.Digest, err, n.kernel.calls)
	}
}

// TestSilentProbeOfNew checks that a node tries a new driver only twice if NVML does not answer with that driver. Each
// try unloads the driver that works.
func TestSilentProbeOfNew(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.parts.Probe = silentOf{n.root, newVersion}
	tries := 0
	for range 4 {
		if _, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil {
			t.Error("Run = nil; want an error")
		}
		if len(n.kernel.calls) > 0 {
			tries++
		}
	}
	if tries != 2 {
		t.Errorf("%d runs loaded the new driver; want 2", tries)
	}
}

// silentOf stands in for NVML. It does not answer while the given version is installed.
type silentOf struct{ root, version string }

func (p silentOf) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	n, err := probe{p.root, 1}.Probe(ctx, library, persist)
	if n.Version == p.version {
		return silent{}.Probe(ctx, library, persist)
	}
	return n, err
}

// TestSweepBesideBrokenGPU checks that a node removes the layers of former drivers, although one of its GPUs is broken.
func TestSweepBesideBrokenGPU(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	var n *node
	for _, version := range []string{oldVersion, "535.183.01", newVersion} {
		c := sample.NewCell(t, buildA, version)
		p := sample.Publish(t, ref, key, c)
		if n == nil {
			n = newNode(t, c, 2, key)
			n.parts.Probe = probe{n.root, 1}
		}
		if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Unusable) {
			t.Fatalf("Run = %v; want unusable", err)
		}
	}
	for _, pattern := range []string{"sets/*", "layers/*/drivers"} {
		all, err := filepath.Glob(filepath.Join(n.root, installDir, ".prebake", pattern))
		if err != nil || len(all) != 2 {
			t.Errorf("%s: %v, %v; want those of the current and the previous driver", pattern, all, err)
		}
	}
}

// filling is a kernel that refuses all modules. After the first refusal, the agent can write no small file, as on a
// full disk.
type filling struct {
	kmod.System
	n *node
	t *testing.T
}

func (f filling) InitModule([]byte, string) error {
	if err := os.MkdirAll(filepath.Join(f.n.root, installDir, ".prebake/tmp-file"), 0o755); err != nil {
		f.t.Error(err)
	}
	return syscall.ENOENT
}

// TestFailureOnFullDisk checks that the agent closes its record of a load that failed on a full disk. After the next
// boot, a record that is still open would count as a crash of the node.
func TestFailureOnFullDisk(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.parts.Kernel = filling{n.kernel, n, t}
	if _, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Rejected) {
		t.Fatalf("Run = %v; want rejected", err)
	}
	raw, err := os.ReadFile(filepath.Join(n.root, installDir, ".prebake/attempts.json"))
	if err == nil && strings.Contains(string(raw), `"open": true`) {
		t.Errorf("the record is still open: %s", raw)
	}
}

// TestForeignLoading checks the agent while another program loads a driver. The agent must wait, even if it may replace
// foreign drivers.
func TestForeignLoading(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.cfg.ReplaceForeign = true
	sample.Write(t, n.root, "proc/modules", "nvidia 4096 1 - Loading 0x0 (OE+)\n")
	sample.Write(t, n.root, "sys/module/nvidia/version", oldVersion+"\n")
	_, err := n.run(t, ref, p.Digest, c.Driver)
	if !fault.Is(err, fault.Busy) || fault.Hint(err) == "" || !strings.Contains(err.Error(), "still loading") ||
		len(n.kernel.calls) > 0 {
		t.Errorf("Run = %v, calls %v; want busy and no call", err, n.kernel.calls)
	}
}
