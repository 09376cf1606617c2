package agent_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
)

const (
	buildA, buildB = "17800.0.47", "17800.0.50"
	oldVersion     = "535.100.01"
	newVersion     = "535.261.03"
	installDir     = "home/kubernetes/bin/nvidia"
)

// nodes stands in for the code that makes device files in /dev. It records the names of the requested files.
type nodes struct{ made []string }

func (n *nodes) Make(_ *os.Root, d devnode.Node) error {
	n.made = append(n.made, d.Name)
	return nil
}

func (n *nodes) Clear(*os.Root) error {
	n.made = nil
	return nil
}

// probe stands in for NVML. It reports the given number of GPUs and the version of the installed library.
type probe struct {
	root    string
	devices int
}

func (p probe) Probe(context.Context, string, bool) (gpucheck.NVML, error) {
	to, err := os.Readlink(filepath.Join(p.root, installDir, "lib64/libnvidia-ml.so.1"))
	if err != nil {
		return gpucheck.NVML{}, err
	}
	return gpucheck.NVML{Version: strings.TrimPrefix(to, "libnvidia-ml.so."), CUDA: "12.2",
		Devices: make([]gpucheck.Device, p.devices)}, nil
}

// finder stands in for the server: it gives the same answer to every question.
type finder struct {
	answer resolve.Answer
	err    error
}

func (f finder) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	return f.answer, f.err
}

// node is a fake node for one test: its root folder, its kernel, and the parts of the agent that runs on it.
type node struct {
	t      testing.TB
	boots  int
	root   string
	kernel *kernel
	nodes  *nodes
	cfg    agent.Config
	parts  agent.Parts
}

func newNode(t testing.TB, c sample.Cell, gpus int, key *testkit.Key) *node {
	t.Helper()
	n := nodeAt(t, sample.Root(t, c, gpus), gpus)
	n.parts.Verifier = key.Verifier(t)
	return n
}

// nodeAt makes a node with all its files below root and without trusted keys.
func nodeAt(t testing.TB, root string, gpus int) *node {
	t.Helper()
	handle, err := noderoot.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = handle.Close() }) // a failed close of a folder loses no data
	n := &node{t: t, root: root, kernel: &kernel{root: root, refuse: map[string]syscall.Errno{}}, nodes: &nodes{}}
	n.cfg = agent.Config{InstallDir: "/" + installDir, Wish: target.Default, Flavour: resolve.Auto}
	n.parts = agent.Parts{
		Node: handle, Kernel: n.kernel, Nodes: n.nodes, Probe: probe{root, gpus}, Line: &timeline.Run{},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Now: time.Now,
		Open: func(ref string) (agent.Repository, error) { return registry.Open(ref, registry.Options{Plain: true}) },
	}
	return n
}

// run runs the agent once. The server answers that the artifact with this digest is in the repository ref.
func (n *node) run(t testing.TB, ref, digest string, d target.Driver) (*agent.Report, error) {
	t.Helper()
	n.answer(ref, digest, d)
	return n.runAs(t)
}

func (n *node) answer(ref, digest string, d target.Driver) {
	n.parts.Finder = finder{answer: resolve.Answer{State: api.Published, Source: "server", Driver: d, Repository: ref,
		Digest: digest}}
}

func (n *node) runAs(t testing.TB) (*agent.Report, error) {
	t.Helper()
	n.parts.Line = &timeline.Run{}
	n.kernel.calls, n.nodes.made = nil, nil
	r, err := agent.New(n.cfg, n.parts).Run(t.Context())
	if r == nil {
		t.Fatal("Run returned no report")
	}
	return r, err
}

// tree lists the files in the install folder with their contents. It follows top-level links and skips .prebake and
// .cache.
func (n *node) tree(t *testing.T) map[string]string {
	t.Helper()
	seen := map[string]string{}
	dir := filepath.Join(n.root, installDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return seen
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() == ".prebake" || e.Name() == ".cache" {
			continue
		}
		sub, err := filepath.EvalSymlinks(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatalf("link %s has no target: %v", e.Name(), err)
		}
		err = filepath.WalkDir(sub, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(sub, path)
			if filepath.Ext(path) == ".ko" {
				raw = []byte("module")
			}
			seen[filepath.Join(e.Name(), rel)] = string(raw)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return seen
}

// leftovers returns the temporary folders of staging, which a run must remove before it ends.
func (n *node) leftovers(t *testing.T) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(n.root, installDir, ".prebake", "tmp-*"))
	if err != nil {
		t.Fatal(err)
	}
	return left
}

func layout(t *testing.T) string { return "oci:" + filepath.Join(t.TempDir(), "layout") }

func TestInstall(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	ref := testkit.Registry(t, true) + "/prebake/driver"
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.cfg.ModuleParams = map[string]string{"nvidia": "NVreg_Foo=1"}

	r, err := n.run(t, ref, p.Digest, c.Driver)
	if err != nil {
		t.Fatalf("Run = %v; want nil", err)
	}
	if r.Verdict.State != gpucheck.Ready || !r.Changed || r.FetchedBytes == 0 || r.CachedBytes != 0 {
		t.Errorf("report = %+v; want ready, changed and fetched", r)
	}
	want := []string{"load nvidia " + newVersion + " NVreg_Foo=1", "load nvidia_uvm " + newVersion,
		"load nvidia_modeset " + newVersion}
	if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"nvidiactl", "nvidia-modeset", "nvidia-uvm-tools", "nvidia-uvm"},
		n.nodes.made); diff != "" {
		t.Errorf("device files (-want +got):\n%s", diff)
	}
	want = []string{"observe", "resolve", "verify", "fetch", "stage", "install", "load", "validate"}
	var phases []string
	for _, ph := range r.Phases {
		phases = append(phases, ph.Name)
	}
	if diff := cmp.Diff(want, phases); diff != "" {
		t.Errorf("phases (-want +got):\n%s", diff)
	}
	tree := n.tree(t)
	for name, content := range map[string]string{
		"lib64/libnvidia-ml.so." + newVersion:              "library " + newVersion,
		"firmware/nvidia/" + newVersion + "/gsp_tu10x.bin": "firmware " + newVersion, "drivers/nvidia.ko": "module",
	} {
		if tree[name] != content {
			t.Errorf("installed %s = %q; want %q", name, tree[name], content)
		}
	}
	wantCache(t, n, newVersion)
	raw, err := os.ReadFile(filepath.Join(n.root, "sys/module/firmware_class/parameters/path"))
	if err != nil || string(raw) != "/"+installDir+"/firmware" {
		t.Errorf("firmware path = %q, %v", raw, err)
	}

	// A second run with the same answer fetches, loads and changes nothing.
	r, err = n.run(t, ref, p.Digest, c.Driver)
	if err != nil || r.Changed || r.FetchedBytes != 0 || r.CachedBytes == 0 || len(n.kernel.calls) != 0 {
		t.Errorf("second Run = %+v, %v, calls %v; want nothing changed", r, err, n.kernel.calls)
	}
}

func TestUpgradeAndRollback(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n := newNode(t, older, 1, key)
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	good := n.tree(t)

	// A program uses the old driver, so the agent must leave the old driver loaded.
	n.inUse(t, "1")
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.Busy) {
		t.Fatalf("Run with a driver in use = %v; want busy", err)
	}
	if diff := cmp.Diff(good, n.tree(t)); diff != "" || len(n.kernel.calls) != 0 {
		t.Errorf("a driver in use was touched: calls %v, tree (-want +got):\n%s", n.kernel.calls, diff)
	}
	n.inUse(t, "0")

	// The kernel refuses a module of the new driver, so the agent must load the old driver again.
	n.kernel.refuse["nvidia_uvm "+newVersion] = syscall.ENOENT
	_, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Rejected) || !strings.Contains(err.Error(), "NVRM: nvidia_uvm says") {
		t.Fatalf("Run with a refused module = %v; want rejected, with the line of the kernel log", err)
	}
	if diff := cmp.Diff(good, n.tree(t)); diff != "" {
		t.Errorf("after a refused module, tree (-want +got):\n%s", diff)
	}
	want := []string{
		"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia",
		"load nvidia " + newVersion, "load nvidia_uvm " + newVersion, "unload nvidia",
		"load nvidia " + oldVersion, "load nvidia_uvm " + oldVersion, "load nvidia_modeset " + oldVersion,
	}
	if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
		t.Errorf("system calls (-want +got):\n%s", diff)
	}
	clear(n.kernel.refuse)

	wantCache(t, n, oldVersion)

	// Now the kernel accepts the new driver. A rollback must succeed, too.
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if err != nil || !r.Changed || r.Verdict.NVML.Version != newVersion {
		t.Fatalf("Run = %+v, %v; want the new driver", r, err)
	}
	n.parts.Line = &timeline.Run{}
	back, err := agent.New(n.cfg, n.parts).Rollback(t.Context())
	if err != nil || back.Verdict.NVML.Version != oldVersion {
		t.Fatalf("Rollback = %+v, %v; want the old driver", back, err)
	}
	if diff := cmp.Diff(good, n.tree(t)); diff != "" {
		t.Errorf("after rollback, tree (-want +got):\n%s", diff)
	}
	wantCache(t, n, oldVersion)
}

// inUse sets the reference count of module nvidia_uvm: "1" means that a program uses the driver, "0" that none does.
func (n *node) inUse(t *testing.T, refs string) {
	t.Helper()
	path := filepath.Join(n.root, "proc/modules")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(raw), "nvidia_uvm 4096 0", "nvidia_uvm 4096 "+refs)
	text = strings.ReplaceAll(text, "nvidia_uvm 4096 1", "nvidia_uvm 4096 "+refs)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestWithdraw rolls back the only driver that the agent ever installed. The install folder must then have the files of
// the other installer again.
func TestWithdraw(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	for _, foreign := range []bool{false, true} {
		n := newNode(t, c, 1, key)
		rollback := func() (*agent.Report, error) {
			n.parts.Line, n.kernel.calls = &timeline.Run{}, nil
			return agent.New(n.cfg, n.parts).Rollback(t.Context())
		}
		sample.Write(t, filepath.Join(n.root, installDir), "lib64/libcuda.so.1", "of another installer")
		if _, err := rollback(); !fault.Is(err, fault.NoArtifact) || fault.Hint(err) == "" {
			t.Errorf("Rollback without a driver of this program = %v; want no artifact and a hint", err)
		}
		before := n.tree(t)
		if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
			t.Fatal(err)
		}
		ours := n.tree(t)
		n.inUse(t, "1")
		if _, err := rollback(); !fault.Is(err, fault.Busy) || len(n.kernel.calls) > 0 || !cmp.Equal(ours, n.tree(t)) {
			t.Errorf("Rollback of a driver in use = %v, calls %v; want busy and nothing done", err, n.kernel.calls)
		}
		n.inUse(t, "0")
		want := []string{"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia"}
		if foreign { // meanwhile, another program loaded a foreign driver
			sample.Write(t, n.root, "proc/driver/nvidia/version",
				"NVRM version: NVIDIA UNIX x86_64 Kernel Module  "+oldVersion+"  Thu\n")
			want = nil
		}
		r, err := rollback()
		if err != nil || !r.Changed || r.Verdict.State != gpucheck.Absent {
			t.Fatalf("Rollback = %+v, %v; want no active driver", r, err)
		}
		if diff := cmp.Diff(want, n.kernel.calls); diff != "" {
			t.Errorf("system calls (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(before, n.tree(t)); diff != "" {
			t.Errorf("after rollback, tree (-want +got):\n%s", diff)
		}
		if _, err := os.Stat(filepath.Join(n.root, installDir, ".cache")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf(".cache of a driver that is gone: %v", err)
		}
	}
}

// wantCache checks the file .cache, in which Google's installer records the driver that it installed. The agent writes
// this file, too.
func wantCache(t *testing.T, n *node, version string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(n.root, installDir, ".cache"))
	if want := "BUILD_ID=" + buildA + "\nDRIVER_VERSION=" + version + "\nKERNEL_OPEN=Y\n"; err != nil ||
		string(raw) != want {
		t.Errorf(".cache = %q, %v; want %q", raw, err, want)
	}
}

func TestNoUsableGPU(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	rows := []struct {
		name    string
		gpus    int
		usable  int
		refuse  bool
		kind    fault.Kind
		state   gpucheck.State
		present bool // whether files stay installed
	}{
		{"no GPU", 0, 0, true, fault.NoDevice, gpucheck.NoDevice, true},
		{"GPU that the driver does not take", 1, 0, true, fault.Unusable, "", false},
		{"GPU that does not answer", 1, 0, false, fault.Unusable, gpucheck.Unusable, true},
		{"one of two answers", 2, 1, false, fault.Unusable, gpucheck.Unusable, true},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c, row.gpus, key)
			n.parts.Probe = probe{n.root, row.usable}
			if row.refuse {
				n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
			}
			r, err := n.run(t, ref, p.Digest, c.Driver)
			if !fault.Is(err, row.kind) || r.Verdict.State != row.state {
				t.Fatalf("Run = %v with verdict %q; want %v with verdict %q", err, r.Verdict.State, row.kind, row.state)
			}
			if row.refuse && !strings.Contains(err.Error(), "NVRM: nvidia says no such device") {
				t.Errorf("Run = %v; want the kernel's NVRM line in it", err)
			}
			if got := len(n.tree(t)) > 0; got != row.present {
				t.Errorf("files installed = %v; want %v", got, row.present)
			}
		})
	}
}
