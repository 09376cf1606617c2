package sandbox_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm"
)

// inGuest is an environment variable. If it is set, this program prepares the virtual machine in which it runs, before
// it runs its tests. The value says in which control group the tests run:
//
//   - root: the root group of the machine
//   - unit: a separate group, as systemd makes for a service
//   - user: a separate group that is delegated to an ordinary user
const inGuest = "PREBAKE_TEST_GUEST"

// TestInVirtualMachine runs the tests that need a control group in a virtual machine, once for each value of inGuest.
func TestInVirtualMachine(t *testing.T) {
	t.Parallel()
	boot := os.Getenv("PREBAKE_BOOT")
	if boot == "" {
		t.Skip("PREBAKE_BOOT is not set: want a folder with vmlinuz and modules/; deploy/e2e makes it, and runs this test")
	}
	init := program.Build(t, "pkg/vm/guestinit", "")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := vm.Config{Boot: boot, Init: init, Timeout: 13 * time.Minute,
		Files: []vm.File{{Name: "/sandbox.test", Path: self, Mode: 0o755}}}
	var programs []string
	for _, name := range []string{"bwrap", "prlimit", "sh", "true", "cat", "cut", "df", "echo", "env", "grep", "head",
		"id", "ls", "sleep", "sort", "tail", "touch", "tr", "truncate", "uname", "unshare", "wc", "awk"} {
		path, err := filepath.EvalSymlinks("/usr/bin/" + name)
		if err != nil {
			t.Fatalf("the machine needs this host's program %s: %v", name, err)
		}
		c.Files = append(c.Files, vm.File{Name: "/usr/bin/" + name, Path: path, Mode: 0o755})
		programs = append(programs, path)
	}
	libraries, err := vm.GlibcFiles(programs...)
	if err != nil {
		t.Fatal(err)
	}
	c.Files = append(c.Files, libraries...)
	c.Files = append(c.Files, vm.File{Name: "/bin/sh", Path: programs[2], Mode: 0o755}, vm.File{Name: "/usr/local"},
		vm.File{Name: "/usr/src"})
	for _, where := range []string{"root", "unit", "user"} {
		tests := "Inside|Exit|Memory|Together|Disk|Processes|BoundsSayWhy|GroupsAreRemoved"
		if where != "user" { // an ordinary user may not make the control group that this test needs
			tests += "|MemoryLimit"
		}
		c.Steps = append(c.Steps, vm.Step{Name: where, KeepGoing: true, Env: []string{inGuest + "=" + where},
			Argv: []string{"/sandbox.test", "-test.v", "-test.timeout=4m", "-test.parallel=1", "-test.run",
				"^Test(" + tests + ")$"}})
	}
	c.Watch = func(p vm.Progress) {
		if p.State == "output" {
			t.Logf("%s: %s", p.Step, p.Data)
		}
	}
	res, err := vm.Run(t.Context(), c)
	if err != nil {
		t.Fatalf("Run() = %v\n%s", err, res.KernelLog)
	}
	for _, where := range []string{"root", "unit", "user"} {
		if s, ok := res.Step(where); !ok || s.ExitCode != 0 {
			t.Errorf("as %s: %d %s\n%s%s", where, s.ExitCode, s.Error, s.Stdout, s.Stderr)
		}
	}
}

// TestGroupsAreRemoved checks that Run leaves no control group behind. It is not parallel, because it would also find
// the control groups of other tests.
func TestGroupsAreRemoved(t *testing.T) {
	needBubblewrap(t)
	if m := sandbox.SupportedLimits(); !m.ControlGroup {
		t.Skip(m.Reason)
	}
	_, usage, err := runLimited(t, sandbox.Limits{}, `head -c 20000000 /dev/zero | tail -c 20000000 >/dev/null`)
	if err != nil || usage.PeakMemory < 20_000_000 || usage.PeakMemory > 200_000_000 {
		// Kernels before 5.19 do not report the peak of the memory.
		if err != nil || usage.PeakMemory != 0 {
			t.Errorf("Run = %v, usage %+v; want a peak of some 20 MB", err, usage)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/prebake-all-%d-*", "/sys/fs/cgroup/*/prebake-all-%d-*"} {
		left, err := filepath.Glob(fmt.Sprintf(pattern, os.Getpid()))
		if err != nil || len(left) > 0 {
			t.Errorf("control groups left: %v, %v", left, err)
		}
	}
}

// enterGuest mounts a new root file system, because bubblewrap uses pivot_root, which does not work on an initramfs.
// There it mounts the control groups, and moves this process into the group in which the tests run.
func enterGuest(where string) error {
	const root = "/new"
	steps := []error{os.MkdirAll(root, 0o755), unix.Mount("tmpfs", root, "tmpfs", 0, "mode=755")}
	for _, dir := range []string{"/usr", "/bin", "/lib", "/lib64"} {
		steps = append(steps, copyAll(dir, root+dir))
	}
	steps = append(steps, copyAll("/sandbox.test", root+"/sandbox.test"))
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"},
		{"tmpfs", "/tmp"}, {"cgroup2", "/sys/fs/cgroup"}} {
		steps = append(steps, os.MkdirAll(root+m.at, 0o755), unix.Mount(m.kind, root+m.at, m.kind, 0, ""))
	}
	steps = append(steps, os.Chmod(root+"/tmp", 0o777), unix.Chdir(root), unix.Mount(".", "/", "", unix.MS_MOVE, ""),
		unix.Chroot("."), unix.Chdir("/"))
	if err := errors.Join(steps...); err != nil || where == "root" {
		return err
	}
	unit := "/sys/fs/cgroup/" + where
	err := errors.Join(os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+memory +pids"), 0o644),
		os.Mkdir(unit, 0o755),
		os.WriteFile(unit+"/cgroup.procs", []byte("0"), 0o644))
	if err != nil || where == "unit" {
		return err
	}
	// These are the files that systemd delegates to the user of a service.
	for _, file := range []string{"", "/cgroup.procs", "/cgroup.subtree_control", "/cgroup.threads"} {
		if err := os.Chown(unit+file, 65532, 65532); err != nil {
			return err
		}
	}
	return errors.Join(syscall.Setgid(65532), syscall.Setuid(65532))
}

func copyAll(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := to + path[len(from):]
		if d.IsDir() {
			return os.MkdirAll(target, 0o755)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, raw, 0o755)
	})
}
