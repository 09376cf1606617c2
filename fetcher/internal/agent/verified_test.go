package agent_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// edit changes the one file of the install folder that matches a pattern. If change returns nil, edit removes the file.
func (n *node) edit(t *testing.T, pattern string, change func([]byte) []byte) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.root, installDir, ".prebake", pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %v, %v; want one file", pattern, found, err)
	}
	raw, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	if raw = change(raw); raw == nil {
		err = os.Remove(found[0])
	} else {
		err = os.WriteFile(found[0], raw, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flipped(raw []byte) []byte { return flip(raw, 0.5) }
func gone([]byte) []byte        { return nil }

// damages has changes that may happen to an install folder between two runs.
var damages = map[string]func(t *testing.T, n *node){
	"a byte of a module": func(t *testing.T, n *node) { n.edit(t, "layers/*/drivers/nvidia.ko", flipped) },
	"a module that is never loaded": func(t *testing.T, n *node) {
		n.edit(t, "layers/*/drivers/nvidia-peermem.ko", flipped)
	},
	"a module, and set.json says so too": func(t *testing.T, n *node) {
		evil := sample.Module("nvidia", oldVersion, "6.1.77+ SMP preempt mod_unload ")
		evil = append(evil, "more"...)
		var was string
		n.edit(t, "layers/*/drivers/nvidia.ko", func(raw []byte) []byte { was = digestOf(raw); return evil })
		n.edit(t, "sets/*/set.json", func(raw []byte) []byte {
			if !bytes.Contains(raw, []byte(was)) {
				t.Fatal("set.json notes no digest of the module")
			}
			return bytes.ReplaceAll(raw, []byte(was), []byte(digestOf(evil)))
		})
	},
	"a byte of a library": func(t *testing.T, n *node) {
		n.edit(t, "layers/*/lib64/libnvidia-ml.so."+oldVersion,
			flipped)
	},
	"a library gone": func(t *testing.T, n *node) {
		n.edit(t, "layers/*/lib64/libnvidia-ml.so."+oldVersion,
			gone)
	},
	"a link of a library": func(t *testing.T, n *node) {
		n.relink(t, "layers/*/lib64/libnvidia-ml.so.1",
			"../bin/nvidia-smi")
	},
	"a byte of a firmware": func(t *testing.T, n *node) {
		n.edit(t, "layers/*/firmware/nvidia/*/gsp_tu10x.bin",
			flipped)
	},
	"a note that is no JSON": func(t *testing.T, n *node) {
		n.edit(t, "sets/*/set.json",
			func([]byte) []byte { return []byte("{") })
	},
	"a note that is a folder": func(t *testing.T, n *node) {
		n.edit(t, "sets/*/set.json", gone)
		sample.Write(t, n.root, installDir+"/.prebake/current/set.json/x", "")
	},
	"a layer that is a file": func(t *testing.T, n *node) {
		name := filepath.Dir(n.one(t, "layers/*/lib64"))
		if err := errors.Join(os.RemoveAll(name), os.WriteFile(name, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	},
	"a library that anybody may write": func(t *testing.T, n *node) {
		if err := os.Chmod(n.one(t, "layers/*/lib64/libnvidia-ml.so."+oldVersion), 0o666); err != nil {
			t.Fatal(err)
		}
	},
	"half a layer":        func(t *testing.T, n *node) { n.removeAll(t, "layers/*/lib64") },
	"a layer gone":        func(t *testing.T, n *node) { n.removeAll(t, "layers/*/drivers/nvidia.ko/../..") },
	"a set's link":        func(t *testing.T, n *node) { n.relink(t, "sets/*/lib64", "/tmp") },
	"the statements gone": func(t *testing.T, n *node) { n.edit(t, "sets/*/proof.json", gone) },
	"the statements broken": func(t *testing.T, n *node) {
		n.edit(t, "sets/*/proof.json", func([]byte) []byte { return []byte("{") })
	},
	"no statements": func(t *testing.T, n *node) {
		n.edit(t, "sets/*/proof.json", func(raw []byte) []byte {
			var all map[string]any
			if json.Unmarshal(raw, &all) != nil {
				t.Fatal("no JSON")
			}
			all["bundles"] = []string{}
			raw, err := json.Marshal(all)
			if err != nil {
				t.Fatal(err)
			}
			return raw
		})
	},
}

func (n *node) one(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.root, installDir, ".prebake", pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %v, %v; want one", pattern, found, err)
	}
	return found[0]
}

func (n *node) relink(t *testing.T, pattern, to string) {
	t.Helper()
	name := n.one(t, pattern)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, name); err != nil {
		t.Fatal(err)
	}
}

func (n *node) add(t *testing.T, pattern, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.one(t, pattern), name), []byte("evil"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (n *node) removeAll(t *testing.T, pattern string) {
	t.Helper()
	up := strings.Count(pattern, "/..")
	name := n.one(t, strings.TrimSuffix(pattern, strings.Repeat("/..", up)))
	for range up {
		name = filepath.Dir(name)
	}
	if err := os.RemoveAll(name); err != nil {
		t.Fatal(err)
	}
}

// TestVerifiedNow checks that the agent compares the installed files with the signed content before it loads a module.
// If files are damaged, the agent must fetch them again. If the server does not answer, the agent must load nothing,
// and say why.
func TestVerifiedNow(t *testing.T) {
	t.Parallel()
	for name, damage := range damages {
		for _, farm := range []bool{true, false} {
			t.Run(name+map[bool]string{true: ", farm answers", false: ", farm is away"}[farm], func(t *testing.T) {
				t.Parallel()
				n, ref, older, _, po, _ := publishTwo(t, 1)
				good := n.tree(t)
				n.reboot(t)
				damage(t, n)
				var r *agent.Report
				var err error
				if farm {
					r, err = n.run(t, ref, po.Digest, older.Driver)
					if err != nil || r.Verdict.State != gpucheck.Ready {
						t.Fatalf("Run = %+v, %v; want the damage repaired", r.Verdict, err)
					}
					if diff := cmp.Diff(good, n.tree(t)); diff != "" {
						t.Errorf("installed (-want +got):\n%s", diff)
					}
				} else {
					n.parts.Finder = finder{err: fault.New(fault.Transient, "connection refused", "")}
					if r, err = n.runAs(t); err == nil || r.Verdict.State == gpucheck.Ready {
						t.Errorf("Run = %+v, %v; want an error", r.Verdict, err)
					}
					if !strings.Contains(errText(err), "verify installed driver") &&
						!strings.Contains(errText(err), "connection refused") {
						t.Errorf("Run = %v; want the damage named", err)
					}
					if len(n.kernel.calls) != 0 {
						t.Errorf("system calls %v; want nothing loaded", n.kernel.calls)
					}
					// As soon as the server answers again, the next run must repair the files.
					if r, err = n.run(t, ref, po.Digest, older.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
						t.Errorf("then: %+v, %v; want ready", r.Verdict, err)
					}
				}
				if diff := cmp.Diff(loads(oldVersion), n.kernel.calls); diff != "" {
					t.Errorf("system calls (-want +got):\n%s", diff)
				}
				if left := n.leftovers(t); len(left) != 0 {
					t.Errorf("left over: %v", left)
				}
				// Afterwards, the files are complete, so the next run must fetch nothing.
				if r, err = n.run(t, ref, po.Digest, older.Driver); err != nil || r.FetchedBytes != 0 {
					t.Errorf("then: %d bytes, %v; want none", r.FetchedBytes, err)
				}
			})
		}
	}
}

func digestOf(raw []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(raw)) }

func answerOf(source resolve.Source, ref, digest string, d target.Driver) resolve.Answer {
	return resolve.Answer{State: api.Published, Source: source, Driver: d, Repository: ref, Digest: digest}
}

// TestAddedStays checks that files of other programs in lib64 and bin do not count as damage, and that the agent never
// removes them. On GKE's nodes with H100 and H200, Google's installers write NCCL plugins to lib64.
func TestAddedStays(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.add(t, "layers/*/lib64", "libnccl-net.so")
	n.add(t, "layers/*/bin", "nccl-test")
	there := func() {
		t.Helper()
		for _, name := range []string{"lib64/libnccl-net.so", "bin/nccl-test"} {
			if raw, err := os.ReadFile(filepath.Join(n.root, installDir, name)); err != nil || string(raw) != "evil" {
				t.Errorf("%s is %q, %v; want the added file unchanged", name, raw, err)
			}
		}
	}
	n.reboot(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "connection refused", "")}
	if r, err := n.runAs(t); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("after a reboot: %+v, %v; want ready", r.Verdict, err)
	}
	n.edit(t, "layers/*/lib64/libnvidia-ml.so."+oldVersion, flipped)
	if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || r.FetchedBytes == 0 {
		t.Errorf("with a damaged library: %d bytes, %v; want the layer fetched", r.FetchedBytes, err)
	}
	there()
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.Digest != pn.Digest {
		t.Errorf("another driver: %+v, %v", r.Verdict, err)
	}
	there()
}

// TestAddedBeforeDriver checks a library that was in lib64 before the first driver. The library must stay there, and
// must not count as damage.
func TestAddedBeforeDriver(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	const name = installDir + "/lib64/libnccl-net.so"
	sample.Write(t, n.root, name, "plugin")
	for _, when := range []string{"first run", "second run", "after a reboot"} {
		if when == "after a reboot" {
			n.reboot(t)
			n.parts.Finder = finder{err: fault.New(fault.Transient, "connection refused", "")}
		} else {
			n.answer(ref, p.Digest, c.Driver)
		}
		r, err := n.runAs(t)
		if err != nil || r.Verdict.State != gpucheck.Ready || when != "first run" && r.FetchedBytes != 0 {
			t.Errorf("%s: %+v, %v, %d bytes fetched; want ready", when, r.Verdict, err, r.FetchedBytes)
		}
		if raw, err := os.ReadFile(filepath.Join(n.root, name)); err != nil || string(raw) != "plugin" {
			t.Errorf("%s: %s is %q, %v; want it unchanged", when, name, raw, err)
		}
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// TestKeyNoLongerTrusted checks a driver whose signing key the node no longer trusts. After a reboot, the agent must
// not load the driver, even if the server does not answer.
func TestKeyNoLongerTrusted(t *testing.T) {
	t.Parallel()
	n, _, _, _, _, _ := publishTwo(t, 1)
	n.reboot(t)
	n.parts.Verifier = testkit.NewKey(t).Verifier(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "connection refused", "")}
	if _, err := n.runAs(t); err == nil || len(n.kernel.calls) != 0 {
		t.Errorf("Run = %v, calls %v; want nothing loaded", err, n.kernel.calls)
	}
}

// TestNodesOwnAfterReboot checks that the agent accepts the node's own key only for a driver that the node compiled
// itself.
func TestNodesOwnAfterReboot(t *testing.T) {
	t.Parallel()
	farm, own := testkit.NewKey(t), testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, oldVersion)
	p := sample.Publish(t, ref, own, c)
	n := newNode(t, c, 1, farm)
	n.reboot(t)
	n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
	n.parts.Finder = finder{answer: answerOf("local", ref, p.Digest, c.Driver)}
	if r, err := n.runAs(t); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Fatalf("Run = %+v, %v", r.Verdict, err)
	}
	n.parts.Finder = finder{err: fault.New(fault.Transient, "connection refused", "")}
	n.reboot(t)
	if r, err := n.runAs(t); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("after a reboot: %+v, %v; want ready", r.Verdict, err)
	}
	n.reboot(t)
	n.edit(t, "sets/*/set.json",
		func(raw []byte) []byte { return bytes.Replace(raw, []byte(`"node"`), []byte(`"published"`), 1) })
	if _, err := n.runAs(t); err == nil || len(n.kernel.calls) != 0 {
		t.Errorf("with the origin published: %v, calls %v; want the driver refused", err, n.kernel.calls)
	}
}

// TestRollbackVerifies checks that a rollback verifies the previous driver before it unloads the active one.
func TestRollbackVerifies(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.cfg.Wish = "535.261.03"
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob(filepath.Join(n.root, installDir, ".prebake/previous/drivers/nvidia.ko"))
	if err != nil || len(all) != 1 {
		t.Fatalf("%v, %v", all, err)
	}
	if err := os.WriteFile(all[0], []byte("evil"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.inUse(t, "0")
	r, err := n.rollback()
	if !fault.Is(err, fault.Unverified) || len(n.kernel.calls) != 0 || r.Changed {
		t.Errorf("Rollback = %v, calls %v; want it refused before anything is unloaded", err, n.kernel.calls)
	}
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.Digest != pn.Digest {
		t.Errorf("then: %+v, %v; want the driver that runs", r.Verdict, err)
	}
}

// TestPendingIsNotReadAgain checks a driver that waits for an idle GPU. The agent must read its files again only after
// a write to them, and before the load.
func TestPendingIsNotReadAgain(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	n.inUse(t, "1")
	n.answer(ref, pn.Digest, newer.Driver)
	a := agent.New(n.cfg, n.parts)
	run := func() {
		t.Helper()
		if _, err := a.Run(t.Context()); !fault.Is(err, fault.Busy) {
			t.Fatalf("Run = %v; want busy", err)
		}
	}
	run()
	name := n.one(t, "layers/*/lib64/libnvidia-ml.so."+newVersion)
	opened := watchOpens(t, name)
	run()
	if opened() {
		t.Error("the library of a driver that waits was read again")
	}
	if raw, err := os.ReadFile(name); err != nil || os.WriteFile(name, flipped(raw), 0o644) != nil || !opened() {
		t.Fatalf("change a byte: %v", err)
	}
	run()
	name = n.one(t, "layers/*/lib64/libnvidia-ml.so."+newVersion)
	opened = watchOpens(t, name)
	n.inUse(t, "0")
	if r, err := a.Run(t.Context()); err != nil || r.Verdict.Digest != pn.Digest {
		t.Errorf("Run = %+v, %v; want the driver that waited, as it was signed", r.Verdict, err)
	}
	if !opened() {
		t.Error("the library was not read before its driver was loaded")
	}
}

// watchOpens returns a function that reports whether a file was opened since its last call.
func watchOpens(t *testing.T, name string) func() bool {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, name, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		n, err := unix.Read(fd, make([]byte, 1<<16))
		return err == nil && n > 0
	}
}

// TestCopiedFolder checks an install folder after `cp -L`, so that .prebake/current and previous are folders and no
// links. Runs must still use the driver, although the server does not answer, and an uninstall must work. The first run
// puts the copies aside, and a later one removes them when the driver is ready without them.
func TestCopiedFolder(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		reboots bool
		states  []gpucheck.State // of the runs; the last one must remove the copies
	}{
		"loaded":         {false, []gpucheck.State{gpucheck.Ready, gpucheck.Ready}},
		"after a reboot": {true, []gpucheck.State{gpucheck.Ready, gpucheck.Ready}},
		"after a reboot, while the fabric manager is missing": {true,
			[]gpucheck.State{gpucheck.Starting, gpucheck.Starting, gpucheck.Ready}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, ref, _, newer, _, pn := publishTwo(t, 1)
			if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
				t.Fatal(err)
			}
			good := n.tree(t)
			n.copyPointers(t)
			if row.reboots {
				n.reboot(t)
			}
			n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
			for i, want := range row.states {
				n.parts.Probe = fabric{n.root, want == gpucheck.Starting}
				r, err := n.runAs(t)
				if (err != nil) != (want == gpucheck.Starting) || r.Verdict.State != want || r.Verdict.Digest != pn.Digest {
					t.Errorf("run %d: Run = %+v, %v; want the driver %s", i, r.Verdict, err, want)
				}
				if diff := cmp.Diff(good, n.tree(t)); diff != "" {
					t.Errorf("run %d: tree (-want +got):\n%s", i, diff)
				}
				n.wantAside(t, fmt.Sprintf("run %d", i), i < len(row.states)-1)
			}
			if r, err := n.uninstall(); err != nil || !r.Changed {
				t.Errorf("Uninstall = %v", err)
			}
		})
	}
}
