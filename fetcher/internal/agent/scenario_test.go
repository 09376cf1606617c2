package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
)

// reboot simulates a reboot: the boot ID is new, and no module is loaded.
func (n *node) reboot(t testing.TB) {
	t.Helper()
	n.boots++
	sample.Write(t, n.root, "proc/sys/kernel/random/boot_id", fmt.Sprintf("boot-%d\n", n.boots))
	sample.Write(t, n.root, "proc/modules", "")
	// COS sets this path on the kernel's command line.
	sample.Write(t, n.root, "sys/module/firmware_class/parameters/path", "/var/lib/nvidia/firmware\n")
	for _, dir := range []string{"proc/driver/nvidia", "sys/module/nvidia", "sys/module/nvidia_uvm",
		"sys/module/nvidia_modeset", "sys/module/nvidia_drm"} {
		if err := os.RemoveAll(filepath.Join(n.root, dir)); err != nil {
			t.Fatal(err)
		}
	}
}

func (n *node) rollback() (*agent.Report, error) {
	n.parts.Line, n.kernel.calls = &timeline.Run{}, nil
	return agent.New(n.cfg, n.parts).Rollback(n.t.Context())
}

// TestAbsoluteLinks checks that the agent follows absolute links inside the node's root. Some node images have such
// links for the install folder and os-release.
func TestAbsoluteLinks(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	at := func(name string) string { return filepath.Join(n.root, name) }
	if err := errors.Join(os.MkdirAll(at("usr/lib"), 0o755), os.Rename(at("etc/os-release"), at("usr/lib/os-release")),
		os.Symlink("/usr/lib/os-release", at("etc/os-release")),
		os.MkdirAll(at("mnt/stateful/nvidia"), 0o755), os.MkdirAll(filepath.Dir(at(installDir)), 0o755),
		os.Symlink("/mnt/stateful/nvidia", at(installDir))); err != nil {
		t.Fatal(err)
	}
	n.parts.Probe = linked{}
	r, err := n.run(t, ref, p.Digest, c.Driver)
	if err != nil || r.Verdict.State != gpucheck.Ready {
		t.Fatalf("Run = %+v, %v; want ready", r.Verdict, err)
	}
	if _, err := os.Stat(at("mnt/stateful/nvidia/lib64/libnvidia-ml.so." + newVersion)); err != nil {
		t.Errorf("the install is not where the node's link leads: %v", err)
	}
}

// linked stands in for NVML with one GPU. Unlike probe, it reads nothing below the node's root.
type linked struct{}

func (linked) Probe(context.Context, string, bool) (gpucheck.NVML, error) {
	return gpucheck.NVML{Version: newVersion, CUDA: "12.2", Devices: make([]gpucheck.Device, 1)}, nil
}

// killed runs the agent once. The fake kernel kills the run when it loads the given module.
func (n *node) killed(t *testing.T, ref, digest string, c sample.Cell, module string) {
	t.Helper()
	n.kernel.die = module + " " + c.Driver.Version
	defer func() {
		n.kernel.die = ""
		if recover() == nil {
			t.Fatalf("the run ended before the load of %s", module)
		}
	}()
	_, _ = n.run(t, ref, digest, c.Driver)
}

func loads(version string) []string {
	return []string{"load nvidia " + version, "load nvidia_uvm " + version, "load nvidia_modeset " + version}
}

// bare returns a node that has just booted and has no driver. A driver for this node is published.
func bare(t *testing.T) (n *node, ref string, c sample.Cell, p sample.Published) {
	t.Helper()
	key := testkit.NewKey(t)
	ref = layout(t)
	c = sample.NewCell(t, buildA, newVersion)
	p = sample.Publish(t, ref, key, c)
	n = newNode(t, c, 1, key)
	n.reboot(t)
	return n, ref, c, p
}

// publishTwo publishes two drivers for one node, and activates the older one. Afterwards, NVML reports the given number
// of usable GPUs.
func publishTwo(t *testing.T, usable int) (n *node, ref string, older, newer sample.Cell, po, pn sample.Published) {
	t.Helper()
	key := testkit.NewKey(t)
	ref = layout(t)
	older, newer = sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	po, pn = sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n = newNode(t, older, 1, key)
	n.reboot(t)
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	n.parts.Probe = probe{n.root, usable}
	return n, ref, older, newer, po, pn
}

// TestBootWithoutFarm checks that a node loads its installed driver after a reboot, whatever the server answers.
func TestBootWithoutFarm(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		answer resolve.Answer
		err    error
		kind   fault.Kind // Internal means no error
	}{
		"nobody answers":       {err: fault.New(fault.Transient, "connection refused", "")},
		"a proxy wants a name": {err: fault.New(fault.Usage, "407 Proxy Authentication Required", "x")},
		"no certificate holds": {err: fault.New(fault.Usage, "x509: certificate is not yet valid", "x")},
		"unknown":              {answer: resolve.Answer{State: api.Unknown, Source: "server"}},
		"building":             {answer: resolve.Answer{State: api.Building, Source: "server"}},
		"failed":               {answer: resolve.Answer{State: api.Failed, Source: "server"}},
		"yanked":               {answer: resolve.Answer{State: api.Yanked, Source: "server"}, kind: fault.NoArtifact},
		"altered":              {err: fault.New(fault.Unverified, "bytes that are not signed", "x"), kind: fault.Unverified},
	} {
		n, _, _, _, po, _ := publishTwo(t, 1)
		n.reboot(t)
		n.parts.Finder = finder{answer: row.answer, err: row.err}
		r, err := n.runAs(t)
		if row.kind == fault.Internal && err != nil || row.kind != fault.Internal && !fault.Is(err, row.kind) {
			t.Errorf("%s: Run = %v; want kind %v", name, err, row.kind)
		}
		if diff := cmp.Diff(loads(oldVersion), n.kernel.calls); diff != "" || r.Verdict.State != gpucheck.Ready ||
			r.Answer.Digest != po.Digest {
			t.Errorf("%s: %s, %+v; system calls (-want +got):\n%s", name, r.Verdict.State, r.Answer, diff)
		}
	}
}

// TestLoadPinFirst checks a node on which LoadPin refuses all modules of other file systems. The agent must say so
// before it asks the server.
func TestLoadPinFirst(t *testing.T) {
	t.Parallel()
	c := sample.NewCell(t, buildA, newVersion)
	for _, dry := range []bool{false, true} {
		n := newNode(t, c, 1, testkit.NewKey(t))
		n.cfg.DryRun = dry
		sample.Write(t, n.root, "proc/sys/kernel/loadpin/enforce", "1\n")
		sample.Write(t, n.root, "proc/cmdline", "ro\n")
		n.parts.Finder = finder{err: errors.New("somebody was asked")}
		if r, err := n.runAs(t); !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "LoadPin") ||
			len(r.Phases) != 1 {
			t.Errorf("dry run %t: Run = %v, phases %+v; want LoadPin's refusal and nothing else", dry, err, r.Phases)
		}
	}
}

// TestUnusableGivesWay checks that the agent returns to the previous driver if the new driver cannot use any GPU. After
// the second failure, the agent tries the new driver again only with --retry.
func TestUnusableGivesWay(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.parts.Probe = byVersion{n.root, newVersion}
	good := n.tree(t)
	for i := range 3 {
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		want, kind := append(append([]string{"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia"},
			loads(newVersion)...),
			append([]string{"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia"},
				loads(oldVersion)...)...), fault.Unusable
		if i == 2 {
			want, kind = nil, fault.Rejected
		}
		if !fault.Is(err, kind) || fault.Hint(err) == "" || r.Verdict.State != gpucheck.Ready ||
			r.Verdict.Digest != po.Digest || r.Changed {
			t.Errorf("%d: Run = %s %s, %v; want %v, and the former driver ready", i, r.Verdict.State, r.Verdict.Digest, err,
				kind)
		}
		if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
			t.Errorf("%d: system calls (-want +got):\n%s", i, diff)
		}
		if diff := cmp.Diff(good, n.tree(t)); diff != "" {
			t.Errorf("%d: tree (-want +got):\n%s", i, diff)
		}
	}
	// If no driver can use the GPU, the agent must keep the new driver: the previous one would not help.
	n.parts.Probe, n.cfg.Retry = probe{n.root, 0}, true
	if _, err := n.run(t, ref, po.Digest, older.Driver); !fault.Is(err, fault.Unusable) {
		t.Errorf("the former driver on a broken GPU: %v; want unusable", err)
	}
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Unusable) || r.Verdict.Digest != pn.Digest ||
		!r.Changed {
		t.Errorf("the new driver on a broken GPU: %+v, %v; want it active, and unusable", r.Verdict, err)
	}
	n.parts.Probe = probe{n.root, 1}
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.Digest != pn.Digest {
		t.Errorf("with --retry: %+v, %v; want the new driver", r, err)
	}
}

// byVersion stands in for NVML on a node with one GPU, which the driver version unfit cannot use.
type byVersion struct{ root, unfit string }

func (p byVersion) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	n, err := probe{p.root, 1}.Probe(ctx, library, persist)
	if n.Version == p.unfit {
		n.Devices = nil
	}
	return n, err
}

// TestKilledWhileLoading kills a run while it loads a driver. The next run must complete or undo the load, although the
// server does not answer.
func TestKilledWhileLoading(t *testing.T) {
	t.Parallel()
	away := finder{err: fault.New(fault.Transient, "nobody answers", "")}
	for module, begun := range map[string]bool{"nvidia": false, "nvidia_uvm": true} {
		n, ref, _, newer, po, pn := publishTwo(t, 1)
		good := n.tree(t)
		n.killed(t, ref, pn.Digest, newer, module)
		n.parts.Finder = away
		r, err := n.runAs(t)
		if begun { // one module is already in the kernel, so the run must complete the load
			if v := r.Verdict; err != nil || v.State != gpucheck.Ready || v.Digest != pn.Digest {
				t.Errorf("killed at %s: %+v, %v; want the new driver", module, v, err)
			}
			continue
		}
		if diff := cmp.Diff(loads(oldVersion), n.kernel.calls); err != nil || diff != "" || r.Verdict.Digest != po.Digest ||
			r.Verdict.State != gpucheck.Ready {
			t.Errorf("killed at %s: %+v, %v; system calls (-want +got):\n%s", module, r.Verdict, err, diff)
		}
		if diff := cmp.Diff(good, n.tree(t)); diff != "" {
			t.Errorf("killed at %s: tree (-want +got):\n%s", module, diff)
		}
	}
}

// TestPanicWhileLoading checks that the agent tries a driver that crashes the node only twice.
func TestPanicWhileLoading(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	for range 2 { // each run first loads the former driver, and then crashes the node
		n.killed(t, ref, pn.Digest, newer, "nvidia")
		n.reboot(t)
	}
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "took the node down 2 times") ||
		r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != po.Digest {
		t.Errorf("after two panics: %s %s, %v; want the former driver, and a refusal", r.Verdict.State, r.Verdict.Digest, err)
	}
	if diff := cmp.Diff(loads(oldVersion), n.kernel.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
}

// TestPanicOfTheInstalled checks an active driver that crashes the node after each reboot. After two crashes, the agent
// must load the previous driver.
func TestPanicOfTheInstalled(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n.reboot(t)
		n.killed(t, ref, pn.Digest, newer, "nvidia_uvm")
	}
	n.reboot(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	r, err := n.runAs(t)
	if r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != po.Digest {
		t.Errorf("after two panics: %+v, %v; want the driver before", r.Verdict, err)
	}
}

// TestRollbackLasts checks that a later run does not undo a rollback that an operator made.
func TestRollbackLasts(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	if r, err := n.rollback(); err != nil || r.Verdict.Digest != po.Digest {
		t.Fatalf("Rollback = %+v, %v; want the old driver", r, err)
	}
	for range 2 {
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "rolled back by hand") ||
			r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready || len(n.kernel.calls) > 0 {
			t.Errorf("Run after a rollback = %s %s, %v, calls %v; want the old driver left alone", r.Verdict.State,
				r.Verdict.Digest, err, n.kernel.calls)
		}
	}
	if _, err := n.rollback(); !fault.Is(err, fault.Rejected) || len(n.kernel.calls) > 0 {
		t.Errorf("a second Rollback = %v, calls %v; want it refused", err, n.kernel.calls)
	}
	n.cfg.Retry = true
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.Digest != pn.Digest {
		t.Errorf("with --retry: %+v, %v; want the new driver", r, err)
	}
}

// TestForeignStays checks that the agent keeps a foreign driver, unless the operator sets --foreign replace.
func TestForeignStays(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	if err := n.kernel.InitModule(sample.Module("nvidia", oldVersion, c.Kernel.Release+" "), ""); err != nil {
		t.Fatal(err)
	}
	sample.Write(t, filepath.Join(n.root, installDir), "lib64/libcuda.so.1", "of another installer")
	before := n.tree(t)
	r, err := n.run(t, ref, p.Digest, c.Driver)
	if !fault.Is(err, fault.Busy) || !strings.Contains(err.Error(), "another installer put on") || r.Changed ||
		len(n.kernel.calls) > 0 {
		t.Errorf("Run = %v, calls %v; want the foreign driver kept", err, n.kernel.calls)
	}
	if diff := cmp.Diff(before, n.tree(t)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	n.cfg.ReplaceForeign = true
	if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("with --foreign replace: %+v, %v; want this program's driver", r.Verdict, err)
	}
	if diff := cmp.Diff(append([]string{"unload nvidia"}, loads(newVersion)...), n.kernel.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
}

// TestChangedParameters checks that the agent reports a changed module parameter while the driver is loaded, and uses
// it at the next load.
func TestChangedParameters(t *testing.T) {
	t.Parallel()
	n, ref, older, _, po, _ := publishTwo(t, 1)
	n.cfg.ModuleParams = map[string]string{"nvidia": "NVreg_Foo=1"}
	for range 2 {
		r, err := n.run(t, ref, po.Digest, older.Driver)
		if err != nil || len(r.Waiting) != 1 || !strings.Contains(r.Waiting[0], "module parameters") ||
			len(n.kernel.calls) > 0 {
			t.Errorf("Run = %+v, %v; want a note on the parameters, and nothing loaded", r.Waiting, err)
		}
	}
	n.reboot(t)
	r, err := n.run(t, ref, po.Digest, older.Driver)
	if err != nil || len(r.Waiting) > 0 || len(n.kernel.calls) == 0 ||
		n.kernel.calls[0] != "load nvidia "+oldVersion+" NVreg_Foo=1" {
		t.Errorf("after a reboot: %+v, %v, calls %v; want the driver loaded with the new parameters", r.Waiting, err,
			n.kernel.calls)
	}
	if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || len(r.Waiting) > 0 {
		t.Errorf("the run after that: %+v, %v; want no note on the parameters", r.Waiting, err)
	}
}

// TestParametersAfterKill kills a run after it has loaded another driver with changed parameters. The next run must not
// take the former driver's parameters for those of the loaded driver.
func TestParametersAfterKill(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.cfg.ModuleParams = map[string]string{"nvidia": "NVreg_Foo=1"}
	n.answer(ref, pn.Digest, newer.Driver)
	n.killedIn(t, "validate")
	if want := "load nvidia " + newVersion + " NVreg_Foo=1"; !slices.Contains(n.kernel.calls, want) {
		t.Fatalf("calls %v; want %s", n.kernel.calls, want)
	}
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || len(r.Waiting) > 0 || len(n.kernel.calls) > 0 {
		t.Errorf("Run = %+v, %v, calls %v; want no note on the parameters, and nothing loaded", r.Waiting, err,
			n.kernel.calls)
	}
}

// TestOptionalModule checks that parameters for nvidia-peermem load it, and that the driver is ready without it: most
// kernels refuse it.
func TestOptionalModule(t *testing.T) {
	t.Parallel()
	for _, refused := range []bool{false, true} {
		n, ref, c, p := bare(t)
		n.cfg.ModuleParams = map[string]string{"nvidia_peermem": "peerdirect_support=0"}
		if refused {
			n.kernel.refuse["nvidia_peermem "+newVersion] = syscall.EINVAL
		}
		r, err := n.run(t, ref, p.Digest, c.Driver)
		if err != nil || r.Verdict.State != gpucheck.Ready {
			t.Errorf("refused %t: Run = %+v, %v; want ready", refused, r.Verdict, err)
		}
		want := append(loads(newVersion), "load nvidia_peermem "+newVersion+" peerdirect_support=0")
		if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
			t.Errorf("refused %t: system calls (-want +got):\n%s", refused, diff)
		}
	}
	// Into a loaded driver, whose other modules are not verified again, it is not loaded. After a reboot it is.
	n, ref, c, p := bare(t)
	for _, want := range [][]string{loads(newVersion), nil,
		append(loads(newVersion), "load nvidia_peermem "+newVersion+" peerdirect_support=0")} {
		_, err := n.run(t, ref, p.Digest, c.Driver)
		if got := strings.Join(n.kernel.calls, ", "); err != nil || got != strings.Join(want, ", ") {
			t.Errorf("Run = %v, system calls %s; want %v", err, got, want)
		}
		if n.cfg.ModuleParams != nil {
			n.reboot(t)
		}
		n.cfg.ModuleParams = map[string]string{"nvidia_peermem": "peerdirect_support=0"}
	}
}

// TestOptionalModuleAfterRollback checks that the former driver gets nvidia-peermem, too, if a driver that waited for a
// reboot is refused then, when no module is loaded.
func TestOptionalModuleAfterRollback(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.cfg.ModuleParams = map[string]string{"nvidia_peermem": "peerdirect_support=0"}
	n.inUse(t, "1")
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Busy) {
		t.Fatalf("Run with a driver in use = %v; want busy", err)
	}
	n.reboot(t)
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	_, err := n.run(t, ref, pn.Digest, newer.Driver)
	want := slices.Concat([]string{"load nvidia " + newVersion}, loads(oldVersion),
		[]string{"load nvidia_peermem " + oldVersion + " peerdirect_support=0"})
	if got := n.kernel.calls; err == nil || len(got) < len(want) || !slices.Equal(want, got[:len(want)]) {
		t.Errorf("Run = %v, system calls %q; want an error, and first %q", err, got, want)
	}
}

// TestRefusedLeavesNothing checks a new driver that the kernel refuses. Afterwards, the firmware path and the device
// files must be those of the former driver.
func TestRefusedLeavesNothing(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	sample.Write(t, n.root, "sys/module/firmware_class/parameters/path", "/somebody/elses")
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	_, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Unusable) {
		t.Fatalf("Run = %v; want unusable", err)
	}
	raw, err := os.ReadFile(filepath.Join(n.root, "sys/module/firmware_class/parameters/path"))
	if err != nil || string(raw) != "/somebody/elses" {
		t.Errorf("firmware path = %q, %v; want the former path", raw, err)
	}
	if len(n.nodes.made) == 0 {
		t.Error("the device files of the former driver were not made again")
	}
	if _, err := n.rollback(); err != nil {
		t.Fatal(err)
	}
	if len(n.nodes.made) > 0 {
		t.Errorf("device files %v without a driver", n.nodes.made)
	}
}

// TestUninstallKilled simulates an uninstall that was killed after its first step. The next run must complete the
// uninstall.
func TestUninstallKilled(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	sample.Write(t, filepath.Join(n.root, installDir), "lib64/libcuda.so.1", "of another installer")
	before := n.tree(t)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	// In former releases, the first step of an uninstall removed this pointer to the active driver.
	if err := os.Remove(filepath.Join(n.root, installDir, ".prebake/current")); err != nil {
		t.Fatal(err)
	}
	n.reboot(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	if _, err := n.runAs(t); !fault.Is(err, fault.Transient) {
		t.Errorf("Run = %v; want transient", err)
	}
	if diff := cmp.Diff(before, n.tree(t)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
}
