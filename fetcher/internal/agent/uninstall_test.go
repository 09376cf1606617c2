package agent_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
)

func (n *node) uninstall() (*agent.Report, error) {
	n.parts.Line, n.kernel.calls = &timeline.Run{}, nil
	return agent.New(n.cfg, n.parts).Uninstall(n.t.Context())
}

// everything returns all files and links of the install folder, and the firmware path.
func (n *node) everything(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(filepath.Join(n.root, installDir), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if d.Type()&os.ModeSymlink != 0 {
			all[path], err = os.Readlink(path)
			return err
		}
		raw, err := os.ReadFile(path)
		all[path] = string(raw)
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(n.root, "sys/module/firmware_class/parameters/path"))
	if err != nil {
		t.Fatal(err)
	}
	all["firmware path"] = strings.Trim(string(raw), "\x00\n")
	return all
}

// TestUninstall checks that an uninstall restores the install folder, the file .cache of Google's installer, and the
// firmware path.
func TestUninstall(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n := newNode(t, older, 1, key)
	n.reboot(t)
	sample.Write(t, filepath.Join(n.root, installDir), "lib64/libcuda.so.1", "of another installer")
	sample.Write(t, filepath.Join(n.root, installDir), ".cache", "BUILD_ID=1\nDRIVER_VERSION=2\n")
	sample.Write(t, n.root, "sys/module/firmware_class/parameters/path", "/somebody/elses")
	before := n.everything(t)
	for range 2 { // the second driver has a previous one
		if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
			t.Fatal(err)
		}
		if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
			t.Fatal(err)
		}
		// A program uses the driver, so all its files must stay.
		with := n.everything(t)
		n.inUse(t, "1")
		if _, err := n.uninstall(); !fault.Is(err, fault.Busy) {
			t.Errorf("Uninstall of a driver in use = %v; want busy", err)
		}
		if diff := cmp.Diff(with, n.everything(t)); diff != "" {
			t.Errorf("a driver in use was touched (-want +got):\n%s", diff)
		}
		n.inUse(t, "0")
		r, err := n.uninstall()
		if err != nil || !r.Changed {
			t.Fatalf("Uninstall = %+v, %v", r, err)
		}
		if diff := cmp.Diff(before, n.everything(t)); diff != "" {
			t.Errorf("after Uninstall (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff([]string{"unload nvidia_modeset", "unload nvidia_uvm", "unload nvidia"},
			n.kernel.calls); diff != "" {
			t.Errorf("system calls (-want +got):\n%s", diff)
		}
		if len(n.nodes.made) != 0 {
			t.Errorf("device files %v without a driver", n.nodes.made)
		}
		if r, err := n.uninstall(); err != nil || r.Changed {
			t.Errorf("a second Uninstall = %+v, %v; want nothing done", r, err)
		}
	}
}

// TestHistory checks that the history has all events, in the order in which they happened.
func TestHistory(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENODEV
	if _, err := n.run(t, ref, pn.Digest, newer.Driver); err == nil {
		t.Fatal("no error")
	}
	delete(n.kernel.refuse, "nvidia "+newVersion)
	n.killed(t, ref, pn.Digest, newer, "nvidia_uvm")
	n.reboot(t)
	n.cfg.AllowDowngrade = true
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	events, err := agent.New(n.cfg, n.parts).History()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range events {
		if e.At.IsZero() || e.BootID == "" || e.Digest == "" {
			t.Errorf("event %+v lacks something", e)
		}
		got = append(got, e.What+" "+e.Driver.Version)
	}
	want := []string{"activated " + oldVersion, "rolled back " + newVersion, "unfinished " + newVersion,
		"activated " + oldVersion}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("history (-want +got):\n%s", diff)
	}
	if !strings.Contains(events[1].Reason, "ENODEV") {
		t.Errorf("event %+v does not say why", events[1])
	}
}

// TestLibraryCache checks that etc/ld.so.conf of the node names the folder with the driver's libraries, but only until
// the driver is uninstalled. The test runs this machine's ldconfig in the node's root.
func TestLibraryCache(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root: ldconfig runs in the node's root")
	}
	program, err := os.ReadFile("/sbin/ldconfig") // Debian's ldconfig is statically linked
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("this machine has no /sbin/ldconfig, which Debian's package libc-bin contains")
	}
	if err != nil {
		t.Fatal(err)
	}
	n, ref, c, p := bare(t)
	sample.Write(t, n.root, "sbin/ldconfig", string(program))
	if err := os.Chmod(filepath.Join(n.root, "sbin/ldconfig"), 0o755); err != nil {
		t.Fatal(err)
	}
	config := func() string {
		raw, err := os.ReadFile(filepath.Join(n.root, "etc/ld.so.conf"))
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	for _, theirs := range []string{"", "/" + installDir + "/lib64\n"} { // Google's installer leaves this line behind
		sample.Write(t, n.root, "etc/ld.so.conf", theirs)
		for range 2 {
			if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
				t.Fatal(err)
			}
			if config() != "/"+installDir+"/lib64\n" {
				t.Errorf("ld.so.conf is %q; want the folder once", config())
			}
		}
		if _, err := os.Stat(filepath.Join(n.root, "etc/ld.so.cache")); err != nil {
			t.Error(err)
		}
		if _, err := n.uninstall(); err != nil {
			t.Fatal(err)
		}
		if config() != theirs {
			t.Errorf("after the uninstall ld.so.conf is %q; want %q", config(), theirs)
		}
	}
}

// TestGPUsDescribed checks that the node has a CDI file, which describes its GPUs to container runtimes, until the
// driver is uninstalled.
func TestGPUsDescribed(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	sample.Write(t, n.root, "proc/driver/nvidia/gpus/0000:00:04.0/information",
		"GPU UUID: \t GPU-b23a4bb5-b8d2-a8d4-4cd8-78ddc638457a\nDevice Minor: \t 0\n")
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(n.root, "var/run/cdi/prebake-nvidia.json")
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"GPU-b23a4bb5-b8d2-a8d4-4cd8-78ddc638457a"`, `"/dev/nvidia-uvm"`,
		`"hostPath": "/` + installDir + `"`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("the description has no %s:\n%s", want, raw)
		}
	}
	if _, err := n.uninstall(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(name); !os.IsNotExist(err) {
		t.Errorf("after the uninstall the description is there: %v", err)
	}
}
