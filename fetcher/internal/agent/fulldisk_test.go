package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/faulttable"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// crashVariable names the root of a node on which loads take the node down. Its folder home is a small disk.
const crashVariable = "PREBAKE_TEST_CRASHES"

// TestCrashesOnFullDisk lets the load of a driver take the node down while the disk of the install folder is full. The
// crashes must be counted, or else the node reboots endlessly.
func TestCrashesOnFullDisk(t *testing.T) {
	t.Parallel()
	installed.Program(t, "bwrap")
	for _, process := range []string{"TestCrashOfActive", "TestCrashAfterUpdate", "TestCrashWithoutReserve"} {
		t.Run(process, func(t *testing.T) {
			t.Parallel()
			root := filepath.Join(t.TempDir(), "root")
			disk := filepath.Join(root, "home")
			if err := os.MkdirAll(disk, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "bwrap", "--dev-bind", "/", "/", "--size", strconv.Itoa(32<<20),
				"--tmpfs", disk, "--die-with-parent", "--", os.Args[0], "-test.run=^"+process+"$", "-test.v")
			cmd.Env = append(os.Environ(), crashVariable+"="+root)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+process) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// crashing makes a node with an active driver on the small disk. It skips the test outside of TestCrashesOnFullDisk.
func crashing(t *testing.T) (n *node, ref string, older, newer sample.Cell, po, pn sample.Published) {
	t.Helper()
	root := os.Getenv(crashVariable)
	if root == "" {
		t.Skip("TestCrashesOnFullDisk runs this test")
	}
	key := testkit.NewKey(t)
	ref = layout(t)
	older, newer = sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildB, newVersion)
	po, pn = sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	sample.RootAt(t, root, older, 1)
	n = nodeAt(t, root, 1)
	n.parts.Verifier = key.Verifier(t)
	n.reboot(t)
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	return n, ref, older, newer, po, pn
}

func (n *node) fillHome(t *testing.T) {
	t.Helper()
	if err := faulttable.Fill(filepath.Join(n.root, "home", "filler")); err != nil {
		t.Fatal(err)
	}
}

// wantNoLoad runs the agent without the farm after two crashes.
func (n *node) wantNoLoad(t *testing.T) {
	t.Helper()
	n.reboot(t)
	n.parts.Finder = finder{err: fault.New(fault.Transient, "nobody answers", "")}
	for range 2 {
		if _, err := n.runAs(t); err == nil || len(n.kernel.calls) > 0 {
			t.Errorf("after two crashes: Run = %v, calls %v; want an error, and nothing loaded", err, n.kernel.calls)
		}
	}
}

func TestCrashOfActive(t *testing.T) {
	t.Parallel()
	n, ref, older, _, po, _ := crashing(t)
	n.fillHome(t)
	for range 2 {
		n.reboot(t)
		n.killed(t, ref, po.Digest, older, "nvidia")
	}
	n.wantNoLoad(t)
}

func TestCrashAfterUpdate(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := crashing(t)
	sample.RootAt(t, n.root, newer, 1)
	n.reboot(t)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	n.reboot(t)
	n.fillHome(t)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	n.wantNoLoad(t)
}

// TestCrashWithoutReserve lets the load of a driver take the node down while the disk is full, and an older release
// reserved no space. The agent must remove what nobody needs, so that it can count the crash, and must then try the
// driver again.
func TestCrashWithoutReserve(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := crashing(t)
	sample.RootAt(t, n.root, newer, 1)
	n.reboot(t)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	n.reboot(t)
	ours := filepath.Join(n.root, installDir, ".prebake")
	records := filepath.Join(n.root, attemptsFile)
	raw, err := os.ReadFile(records)
	if err := errors.Join(err, os.WriteFile(records, bytes.TrimSpace(raw), 0o644), os.Remove(records+".spare"),
		os.Remove(filepath.Join(ours, "verdict.json.spare"))); err != nil {
		t.Fatal(err)
	}
	compiled, unused := "sets/"+strings.Repeat("a", 64), "sets/"+strings.Repeat("b", 64)
	layer := "layers/" + strings.Repeat("c", 64)
	sample.Write(t, ours, "tmp-left/half", strings.Repeat("x", 256<<10))
	sample.Write(t, ours, layer+"/lib64/x", strings.Repeat("x", 256<<10))
	for set, origin := range map[string]string{compiled: "node", unused: "published"} {
		sample.Write(t, ours, set+"/set.json",
			fmt.Sprintf(`{"digest":"sha256:%s","origin":%q}`, filepath.Base(set), origin))
	}
	n.fillHome(t)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	for _, digest := range []string{po.Digest, pn.Digest} {
		if _, err := os.Stat(filepath.Join(ours, "sets", strings.TrimPrefix(digest, "sha256:"))); err != nil {
			t.Errorf("the current or the previous driver: %v; want it kept", err)
		}
	}
	for name, want := range map[string]bool{"tmp-left": false, layer: false, unused: false, compiled: true} {
		if _, err := os.Stat(filepath.Join(ours, name)); (err == nil) != want {
			t.Errorf("%s: %v; want it kept: %t", name, err, want)
		}
	}
	n.fillHome(t)
	n.wantNoLoad(t)
}

// TestUncountedCrash checks that a driver whose load took the node down is not loaded again while nothing can be
// written: the next crash would not be counted either.
func TestUncountedCrash(t *testing.T) {
	t.Parallel()
	n, ref, newer, pn := updated(t)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	n.reboot(t)
	n.fillDisk(t, true)
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil || len(n.kernel.calls) > 0 ||
		!strings.Contains(err.Error(), "cannot record this crash") {
		t.Errorf("Run = %s, %v, calls %v; want an error, and nothing loaded", r.Verdict.State, err, n.kernel.calls)
	}
	n.fillDisk(t, false)
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("then: Run = %s, %v; want the driver ready", r.Verdict.State, err)
	}
}

// freeing is a finder that makes the full disk of a node writable again.
type freeing struct {
	finder
	free func()
}

func (f freeing) Find(ctx context.Context, q resolve.Question) (resolve.Answer, error) {
	f.free()
	return f.finder.Find(ctx, q)
}

// TestCrashIsCountedLater checks a crash that the next run could not record at its start, because the disk was full. If
// the run can write again when it activates another driver, it must count the crash then.
func TestCrashIsCountedLater(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildB, newVersion)
	other := sample.NewCell(t, buildB, "535.309.01")
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	px := sample.Publish(t, ref, key, other)
	n := newNode(t, older, 1, key)
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	sample.RootAt(t, n.root, newer, 1)
	n.reboot(t)
	n.killed(t, ref, pn.Digest, newer, "nvidia")
	n.reboot(t)
	n.fillDisk(t, true)
	n.answer(ref, px.Digest, other.Driver)
	n.parts.Finder = freeing{n.parts.Finder.(finder), func() { n.fillDisk(t, false) }}
	if r, err := n.runAs(t); err != nil || r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != px.Digest {
		t.Fatalf("Run = %+v, %v; want the other driver ready", r.Verdict, err)
	}
	raw, err := os.ReadFile(filepath.Join(n.root, attemptsFile))
	var all map[string]struct{ Crashes int }
	if err := errors.Join(err, json.Unmarshal(raw, &all)); err != nil {
		t.Fatal(err)
	}
	if all[pn.Digest].Crashes != 1 {
		t.Errorf("attempts = %s; want one crash of the newer driver", raw)
	}
}

// TestReservedRecords checks what a node reserves for the records of activations: also if an older release wrote them,
// and if somebody changed the files.
func TestReservedRecords(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	records := filepath.Join(n.root, attemptsFile)
	spare := records + ".spare"
	for name, damage := range map[string]func() error{
		"nothing": func() error { return nil },
		"an older release": func() error {
			return errors.Join(os.Remove(spare), os.WriteFile(records, []byte("{}\n"), 0o644))
		},
		"only the spare": func() error { return os.Remove(records) },
		"a folder": func() error {
			return errors.Join(os.Remove(spare), os.MkdirAll(filepath.Join(spare, "x"), 0o755))
		},
		"a link": func() error {
			return errors.Join(os.Remove(spare), os.Symlink("../lib64/libnvidia-ml.so.1", spare))
		},
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		good := n.tree(t)
		if _, err := agent.New(n.cfg, n.parts).Run(t.Context()); err != nil {
			t.Errorf("%s: Run = %v", name, err)
		}
		for _, file := range []string{records, spare} {
			if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() || info.Size() != 128<<10 {
				t.Errorf("%s: %s: %v, %v; want a file of 128 KiB", name, filepath.Base(file), info, err)
			}
		}
		for range 2 { // a change of the driver writes the records several times
			older, newer, po, pn = newer, older, pn, po
			n.cfg.AllowDowngrade = true
			if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || r.Verdict.Digest != po.Digest {
				t.Errorf("%s: Run = %v", name, err)
			}
		}
		for file, text := range good {
			if n.tree(t)[file] != text {
				t.Errorf("%s: file %s was changed", name, file)
			}
		}
	}
}
