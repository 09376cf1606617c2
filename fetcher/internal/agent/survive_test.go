package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestUnusableAndOpen checks a new driver that cannot use the GPU while a program has it open. The new driver must stay
// active, because the libraries must match the loaded modules. Once no program uses the driver, a run may replace it.
func TestUnusableAndOpen(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.parts.Probe, n.kernel.open = byVersion{n.root, newVersion}, "nvidia_uvm "+newVersion
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Unusable) || !strings.Contains(err.Error(), "stays active") ||
		r.Verdict.State == gpucheck.Ready {
		t.Errorf("Run = %+v, %v; want unusable, and the reason why the driver stays", r.Verdict, err)
	}
	if _, ok := n.tree(t)["lib64/libnvidia-ml.so."+newVersion]; !ok {
		t.Errorf("the libraries are not those of the modules that are loaded: %v", n.tree(t))
	}
	n.kernel.open = ""
	n.inUse(t, "0")
	if r, err := n.run(t, ref, po.Digest, older.Driver); err == nil && r.Verdict.Digest != po.Digest {
		t.Errorf("the run after that: %+v, %v", r.Verdict, err)
	}
	n.cfg.AllowDowngrade = true
	if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || r.Verdict.Digest != po.Digest ||
		r.Verdict.State != gpucheck.Ready {
		t.Errorf("the former driver, once nobody uses the GPU: %+v, %v; want it ready", r.Verdict, err)
	}
}

// TestKilledWhileLooking kills a run while it checks the GPUs with a new driver. The next run must check that driver
// again. Because it cannot use the GPU, the run must return to the former driver.
func TestKilledWhileLooking(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	n.parts.Probe = dying{}
	func() {
		defer func() {
			if recover() == nil {
				t.Fatal("the probe was not run")
			}
		}()
		_, _ = n.run(t, ref, pn.Digest, newer.Driver)
	}()
	n.parts.Probe = byVersion{n.root, newVersion}
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Unusable) || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run = %+v, %v; want the former driver back", r.Verdict, err)
	}
}

type dying struct{}

func (dying) Probe(context.Context, string, bool) (gpucheck.NVML, error) { panic("killed") }

// TestNextAfterReboot checks a new driver that must wait, because a program uses the GPU. The node must fetch it only
// once. After a reboot, the node must load it, even if the server does not answer.
func TestNextAfterReboot(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	n.inUse(t, "1")
	for i := range 3 {
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if !fault.Is(err, fault.Busy) || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready ||
			(r.FetchedBytes > 0) != (i == 0) {
			t.Errorf("%d: Run = %+v, %v, %d bytes; want busy beside the former driver, and one download", i, r.Verdict, err,
				r.FetchedBytes)
		}
	}
	// The server does not know the driver any more. The agent must keep it on the disk nevertheless.
	n.parts.Finder = finder{answer: resolve.Answer{State: api.Unknown, Source: "server"}}
	if r, err := n.runAs(t); err != nil || !strings.Contains(r.Pending, newVersion) {
		t.Errorf("with a farm that knows nothing: %v, pending %q; want the driver still pending", err, r.Pending)
	}
	n.reboot(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	r, err := n.runAs(t)
	if diff := cmp.Diff(loads(newVersion), n.kernel.calls); err != nil || diff != "" || r.Verdict.Digest != pn.Digest {
		t.Errorf("after a reboot: %+v, %v; system calls (-want +got):\n%s", r.Verdict, err, diff)
	}
}

// TestFullDiskAtBoot checks that the agent loads an installed driver although the disk is full.
func TestFullDiskAtBoot(t *testing.T) {
	t.Parallel()
	n, ref, older, _, po, _ := publishTwo(t, 1)
	n.reboot(t)
	// The agent first writes each small file under this name, and then renames it. A folder of this name makes that fail.
	if err := os.Mkdir(filepath.Join(n.root, installDir, ".prebake/tmp-file"), 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := n.run(t, ref, po.Digest, older.Driver)
	if diff := cmp.Diff(loads(oldVersion), n.kernel.calls); diff != "" || r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run = %+v, %v; system calls (-want +got):\n%s", r.Verdict, err, diff)
	}
}

// TestHostileAttempts checks that the agent loads the active driver although its file with records of load attempts is
// damaged or has wrong content.
func TestHostileAttempts(t *testing.T) {
	t.Parallel()
	n, _, _, _, po, _ := publishTwo(t, 1)
	file := filepath.Join(installDir, ".prebake/attempts.json")
	for name, text := range map[string]string{
		"no JSON": "{", "a list": "[]", "nothing": "", "null": `{"x":null}`,
		"no set": `{"` + po.Digest + `":{"open":true,"bootId":"another","before":{"current":"../../etc"}}}`,
		"a set that is gone": `{"` + po.Digest + `":{"open":true,"bootId":"another","before":{"current":"sets/` +
			strings.Repeat("ab", 32) + `","previous":"/"}}}`,
		"many crashes": `{"sha256:` + strings.Repeat("ab",
			32) + `":{"crashes":9,"open":true,"before":{"current":"sets/` + strings.TrimPrefix(po.Digest, "sha256:") + `"}}}`,
	} {
		n.reboot(t)
		sample.Write(t, n.root, file, text)
		n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
		if r, err := n.runAs(t); err != nil || r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != po.Digest {
			t.Errorf("%s: Run = %+v, %v; want the driver active", name, r.Verdict, err)
		}
	}
}
