package agent_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

// copyPointers replaces the links .prebake/current and previous by copies of the folders that they lead to.
func (n *node) copyPointers(t *testing.T) {
	t.Helper()
	for _, pointer := range []string{"current", "previous"} {
		at := filepath.Join(n.root, installDir, ".prebake", pointer)
		set, err := filepath.EvalSymlinks(at)
		if err := errors.Join(err, os.Remove(at)); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), "cp", "-rL", set, at).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
	}
}

// wantAside checks that the copies of copyPointers were put aside, and are still there or were removed.
func (n *node) wantAside(t *testing.T, when string, kept bool) {
	t.Helper()
	aside := filepath.Join(n.root, installDir, ".prebake/adopted")
	left, err := os.ReadDir(aside)
	if err != nil || (len(left) > 0) != kept {
		t.Errorf("%s: adopted has %v, %v; want the copies kept: %t", when, left, err, kept)
	}
	if _, err := os.Stat(filepath.Join(aside, "current/set.json")); kept && err != nil {
		t.Errorf("%s: the copy: %v", when, err)
	}
}

// fabric stands in for NVML on a machine with NVSwitches and one GPU.
type fabric struct {
	root     string
	starting bool
}

func (p fabric) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	n, err := probe{p.root, 1}.Probe(ctx, library, persist)
	if err == nil && p.starting {
		n.Devices[0].Fabric = "in progress"
	}
	return n, err
}

// TestAsideWithoutLoad checks when copies in place of links are removed on a node on which another program loads the
// driver: when another driver is installed.
func TestAsideWithoutLoad(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.reboot(t)
	n.cfg.NoLoad, n.cfg.AllowDowngrade = true, true
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	n.copyPointers(t)
	for range 2 {
		if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.State != gpucheck.Staged {
			t.Errorf("Run = %+v, %v; want the driver staged", r.Verdict, err)
		}
		n.wantAside(t, "the same driver", true)
	}
	if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || !r.Changed {
		t.Errorf("Run = %+v, %v; want the other driver installed", r.Verdict, err)
	}
	n.wantAside(t, "another driver", false)
}

// TestAsideByRecovery checks copies in place of links that the start of a run moves aside, because an earlier run was
// killed after its load. This run must keep them, and the next run must remove them.
func TestAsideByRecovery(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.answer(ref, pn.Digest, newer.Driver)
	n.killedIn(t, "validate")
	n.copyPointers(t)
	for _, kept := range []bool{true, false} {
		if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
			t.Errorf("Run = %+v, %v; want the driver ready", r.Verdict, err)
		}
		n.wantAside(t, "after the kill", kept)
	}
}
