package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/faulttable"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

var update = flag.Bool("update", false, "write docs/reference/node-faults.md anew")

// These are the faults that a test can cause at the start of a phase of a run.
const (
	faultKill    = "killed"
	faultDisk    = "disk full"
	faultNetwork = "network gone"
	faultRead    = "unreadable"
	faultDamage  = "files damaged"
	faultClock   = "clock in 1970"
	faultTwo     = "two at once"
)

var faults = []string{faultKill, faultDisk, faultNetwork, faultRead, faultDamage, faultClock, faultTwo}

// order tells a child process what to do. The child process reads it from the environment.
type order struct {
	Root, Layout, Keys string
	Older, Newer       string // the digests of the two artifacts
	// SetUp means that the child process first makes the node, with the older driver active.
	SetUp bool
	// Boot means that the node was rebooted, so no module is loaded.
	Boot bool
	// Rebooted means that the node was rebooted since the last order.
	Rebooted bool
	// Fault happens when the given phase begins; "" means no fault. A run has no phase rollbackNoted: this one begins when
	// the agent has recorded that a rollback waits until the GPU is idle.
	Fault, Phase string
}

const rollbackNoted = "rollback noted"

// outcome is the result that the child process prints.
type outcome struct {
	Class   string // "" means success
	Error   string
	Digest  string // the digest in the verdict
	State   gpucheck.State
	Struck  bool
	Fetched int64
	Problem string // what is wrong with the node
	// Again is the outcome of the next run, if that run must be in the same process.
	Again *outcome
}

const orderVariable = "PREBAKE_TEST_ORDER"

// TestFaultProcess is the body of the child process. Without an order in the environment, the test does nothing.
func TestFaultProcess(t *testing.T) {
	raw := os.Getenv(orderVariable)
	if raw == "" {
		return
	}
	var o order
	if err := json.Unmarshal([]byte(raw), &o); err != nil {
		t.Fatal(err)
	}
	if o.SetUp {
		o.setUp(t)
		unix.Sync() // flush the older driver to disk, as if it had been installed long ago
	}
	if o.Rebooted {
		n := o.node(t)
		n.boots = 100
		n.reboot(t)
	}
	if o.SetUp && o.Phase == rollbackNoted {
		o.noteRollback(t)
	}
	got := o.run(t)
	if o.SetUp {
		if err := os.RemoveAll(filepath.Join(o.Root, "home", "filler")); err != nil {
			t.Fatal(err)
		}
		o.Fault = ""
		again := o.run(t)
		got.Again = &again
	}
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("OUTCOME %s\n", text)
}

func cells(t testing.TB) (older, newer sample.Cell) {
	older, newer = sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	older.Bulk, newer.Bulk = 64<<10, 64<<10
	return older, newer
}

// setUp makes a node on which the older driver is active.
func (o order) setUp(t testing.TB) {
	older, _ := cells(t)
	sample.RootAt(t, o.Root, older, 1)
	n := o.node(t)
	n.reboot(t)
	before := o
	before.Fault, before.Boot = "", false
	if r, err := n.runOf(t, before, before.Older, older); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Fatalf("set up the node: Run = %+v, %v", r.Verdict, err)
	}
	if o.Boot {
		n.reboot(t)
	}
}

// noteRollback activates the newer driver and rolls it back while a program uses it. So the agent only records the
// rollback. Then the fault happens.
func (o order) noteRollback(t *testing.T) {
	n := o.node(t)
	_, newer := cells(t)
	if r, err := n.runOf(t, o, o.Newer, newer); err != nil || r.Verdict.Digest != o.Newer {
		t.Fatalf("set up the node: Run = %+v, %v", r.Verdict, err)
	}
	unix.Sync() // flush the newer driver to disk, as if it had been installed long ago
	n.inUse(t, "1")
	if _, err := n.rollback(); !fault.Is(err, fault.Busy) {
		t.Fatalf("Rollback = %v; want busy", err)
	}
	if err := o.strike(t, nil); err != nil {
		t.Fatal(err)
	}
}

// node returns a node whose whole state is on the disk, so that another process can go on with it.
func (o order) node(t testing.TB) *node {
	t.Helper()
	pem, err := os.ReadFile(o.Keys)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := trust.ParsePublicKeys(pem)
	if err != nil {
		t.Fatal(err)
	}
	v, err := trust.NewVerifier(trust.Policy{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	n := nodeAt(t, o.Root, 1)
	n.parts.Verifier = v
	return n
}

// runOf runs the agent once. The server answers with the artifact of this digest, which has the driver of c.
func (n *node) runOf(t testing.TB, o order, digest string, c sample.Cell) (*agent.Report, error) {
	n.parts.Finder = finder{answer: answerOf("server", "oci:"+o.Layout, digest, c.Driver)}
	return agent.New(n.cfg, n.parts).Run(t.Context())
}

func (o order) run(t testing.TB) (got outcome) {
	n := o.node(t)
	_, newer := cells(t)
	var gone atomic.Bool
	n.parts.Open = func(ref string) (agent.Repository, error) {
		repo, err := registry.Open(ref, registry.Options{})
		return cuttable{repo, &gone}, err
	}
	if o.Fault == faultClock {
		n.parts.Now = func() time.Time { return time.Unix(0, 0) }
	}
	var once sync.Once
	var struck error
	n.parts.Line = &timeline.Run{Watch: func(e timeline.Event) {
		if o.Fault == "" || e.Phase != o.Phase || e.Done != nil || e.Text != "" {
			return
		}
		once.Do(func() {
			got.Struck = true
			struck = o.strike(t, &gone)
		})
	}}
	r, err := n.runOf(t, o, o.Newer, newer)
	got.Digest, got.State, got.Fetched = r.Verdict.Digest, r.Verdict.State, r.FetchedBytes
	if err = errors.Join(err, struck); err != nil {
		got.Class, got.Error = fault.Of(err).String(), err.Error()
	}
	got.Problem = n.problem()
	return got
}

func (o order) strike(t testing.TB, gone *atomic.Bool) error {
	ours := filepath.Join(o.Root, installDir, ".prebake")
	switch o.Fault {
	case faultKill:
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case faultPower:
		// Reset only a virtual machine that package vm booted, never the machine that runs the tests.
		if line, err := os.ReadFile("/proc/cmdline"); err != nil || !bytes.Contains(line, []byte(" rdinit=/init")) ||
			os.Args[0] != "/test" {
			t.Fatal("this is no virtual machine of ours")
		}
		err := os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0) // resets the machine at once, without a flush
		t.Fatalf("reset the machine: it still runs: %v", err)
	case faultDisk:
		return faulttable.Fill(filepath.Join(o.Root, "home", "filler"))
	case faultNetwork:
		gone.Store(true)
	case faultRead:
		// Make each file a link to itself. Even root cannot read such a link, as with a broken disk.
		return eachFile(ours, func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Symlink(filepath.Base(path), path)
		})
	case faultDamage:
		return eachFile(ours, func(path string) error {
			raw, err := os.ReadFile(path)
			if err != nil || len(raw) == 0 {
				return err
			}
			raw[len(raw)/2] ^= 1
			return os.WriteFile(path, raw, 0o644)
		})
	case faultTwo:
		second := o
		second.Fault = ""
		if got := second.run(t); got.Class != "" && got.Class != fault.Busy.String() {
			return fmt.Errorf("the second run: %+v", got)
		}
	}
	return nil
}

// eachFile calls do with the path of every file of the unpacked layers. dir is the folder .prebake of an install
// folder.
func eachFile(dir string, do func(string) error) error {
	return filepath.WalkDir(filepath.Join(dir, "layers"), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return do(path)
	})
}

// cuttable is a repository that fails with a network error once gone is set.
type cuttable struct {
	agent.Repository
	gone *atomic.Bool
}

func (c cuttable) err() error {
	if c.gone.Load() {
		return fault.New(fault.Transient, "network is unreachable", "try again")
	}
	return nil
}

func (c cuttable) Manifest(ctx context.Context, digest string) ([]byte, error) {
	if err := c.err(); err != nil {
		return nil, err
	}
	return c.Repository.Manifest(ctx, digest)
}

func (c cuttable) AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted ...map[string]string) ([][]byte, error) {
	if err := c.err(); err != nil {
		return nil, err
	}
	return c.Repository.AttachedIf(ctx, digest, artifactType, useful, wanted...)
}

func (c cuttable) Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error) {
	rc, err := c.Repository.Blob(ctx, digest, size)
	if err := errors.Join(c.err(), err); err != nil {
		return nil, err
	}
	return rc, nil
}

// problem returns what is wrong with a node: its library cannot be read, or the library and the loaded modules belong
// to different drivers. "" means that nothing is wrong.
func (n *node) problem() string {
	lib, err := os.ReadFile(filepath.Join(n.root, installDir, "lib64/libnvidia-ml.so.1"))
	if err != nil {
		return err.Error()
	}
	version := strings.TrimPrefix(string(lib), "library ")
	if version != oldVersion && version != newVersion {
		return fmt.Sprintf("libnvidia-ml.so.1 is %.40q", lib)
	}
	loaded, err := os.ReadFile(filepath.Join(n.root, "sys/module/nvidia/version"))
	if err == nil && strings.TrimSpace(string(loaded)) != version {
		return fmt.Sprintf("libraries are of %s, and loaded is %s", version, loaded)
	}
	return ""
}

type phaseRow struct {
	phase string
	boot  bool
}

// rows has the phases of a run that replaces the loaded driver, and then the phases of a run after a reboot.
var rows = []phaseRow{
	{"observe", false}, {"resolve", false}, {"verify", false}, {"fetch", false}, {"stage", false}, {"install", false},
	{"load", false}, {"validate", false},
	{"install", true}, {"load", true}, {"validate", true},
}

// TestFaults combines each phase of a run with each fault. After each fault, the next run must end with a working
// driver, whose modules and library have the same version.
func TestFaults(t *testing.T) {
	t.Parallel()
	installed.Program(t, "bwrap")
	dir, key := t.TempDir(), testkit.NewKey(t)
	older, newer := cells(t)
	lay := filepath.Join(dir, "layout")
	common := order{
		Layout: lay, Keys: filepath.Join(dir, "keys.pem"),
		Older: sample.Publish(t, "oci:"+lay, key, older).Digest, Newer: sample.Publish(t, "oci:"+lay, key, newer).Digest,
	}
	if err := os.WriteFile(common.Keys, key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[string]string{}
	t.Run("strike", func(t *testing.T) {
		for _, row := range rows {
			for _, kind := range faults {
				o := common
				o.Phase, o.Boot, o.Fault = row.phase, row.boot, kind
				t.Run(o.name()+" "+kind, func(t *testing.T) {
					t.Parallel()
					cell := o.runWithFault(t)
					mu.Lock()
					defer mu.Unlock()
					seen[o.name()+" "+kind] = cell
				})
			}
		}
	})
	if !t.Failed() {
		checkTable(t, seen)
	}
}

func (o order) name() string {
	if o.Boot {
		return o.Phase + ", after a reboot"
	}
	return o.Phase
}

// runWithFault runs an order with its fault, and returns how the run ended. Then it checks the next run.
func (o order) runWithFault(t *testing.T) string {
	o.Root = filepath.Join(t.TempDir(), "root")
	argv := []string{os.Args[0], "-test.run=^TestFaultProcess$"}
	if o.Fault == faultDisk {
		o.SetUp = true
		disk := filepath.Join(o.Root, "home") // the fake kernel's files are not on this disk
		if err := os.MkdirAll(disk, 0o755); err != nil {
			t.Fatal(err)
		}
		argv = append([]string{"bwrap", "--dev-bind", "/", "/", "--size", strconv.Itoa(128 << 20), "--tmpfs", disk,
			"--die-with-parent", "--"}, argv...)
	} else {
		o.setUp(t)
	}
	got := o.process(t, argv)
	if got == nil && o.Fault != faultKill || got != nil && !got.Struck {
		t.Fatalf("the run ended with %+v", got)
	}
	cell := "killed"
	if got != nil {
		cell = o.word(got)
		t.Logf("%s: %s", cell, got.Error)
	}
	if o.Fault != faultDamage && o.Fault != faultRead && o.Fault != faultDisk {
		// A kill after the switch of links and before the load leaves libraries and modules of different drivers. The next
		// run must repair this.
		if what := o.node(t).problem(); what != "" && (o.Fault != faultKill || !strings.HasPrefix(what, "libraries are of")) {
			t.Errorf("after the fault: %s", what)
		}
	}
	again := &outcome{}
	if got != nil && got.Again != nil {
		again = got.Again
		if got.Problem != "" {
			t.Errorf("after the fault: %s", got.Problem)
		}
	} else {
		next := o
		next.Fault = ""
		*again = next.run(t)
	}
	if again.State != gpucheck.Ready || again.Problem != "" || again.Digest != o.Older && again.Digest != o.Newer {
		t.Errorf("the next run: %+v; want a driver ready", again)
	}
	if again.Class != "" && again.Digest == o.Newer {
		t.Errorf("the next run: %+v; want no error with the wanted driver", again)
	}
	return cell
}

func (o order) word(got *outcome) string {
	driver := map[string]string{o.Older: "old", o.Newer: "new", "": "none"}[got.Digest]
	if got.Class == "" {
		return driver
	}
	return got.Class + ", " + driver
}

// process runs an order in a child process; nil means that a signal killed the child process.
func (o order) process(t *testing.T, argv []string) *outcome {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), orderVariable+"="+string(text))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		return nil
	}
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, stderr.Bytes())
	}
	_, line, ok := bytes.Cut(out, []byte("OUTCOME "))
	line, _, _ = bytes.Cut(line, []byte("\n"))
	got := &outcome{}
	if !ok || json.Unmarshal(line, got) != nil {
		t.Fatalf("no outcome in %q", out)
	}
	return got
}

// checkTable compares the results with the table in docs/reference/node-faults.md.
func checkTable(t *testing.T, seen map[string]string) {
	t.Helper()
	var names []string
	for _, row := range rows {
		names = append(names, order{Phase: row.phase, Boot: row.boot}.name())
	}
	faulttable.Table{
		File: "../../../docs/reference/node-faults.md", Head: "phase", Columns: faults, Rows: names, Seen: seen,
		Hint: "go test ./fetcher/internal/agent -run TestFaults -update", Update: *update,
	}.Check(t)
}
