// Package memorygroup limits the memory of a test's child processes with a real control group.
package memorygroup

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// New makes a control group with a memory limit in bytes. It returns the path of the group's cgroup.procs: a process
// that writes its id into this file enters the group. New skips the test if this process may not make a control group,
// or if the machine has none with a memory limit.
func New(t testing.TB, limit int64) (procs string) {
	t.Helper()
	const root = "/sys/fs/cgroup"
	top, file := filepath.Join(root, "memory"), "memory.limit_in_bytes" // for control groups of version 1
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		top, file = root, "memory.max"
		_ = write(filepath.Join(root, "cgroup.subtree_control"), "+memory") // if this fails, memory.max is missing below
	}
	dir, err := os.MkdirTemp(top, "prebake-test-*")
	if err == nil {
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil { // the kernel removes its files in the folder too
				t.Errorf("remove control group: %v", err)
			}
		})
		err = write(filepath.Join(dir, file), strconv.FormatInt(limit, 10))
	}
	for _, lack := range []error{unix.EACCES, unix.EPERM, unix.EROFS, unix.ENOENT} {
		if errors.Is(err, lack) {
			t.Skipf("no control group with a memory limit: %v; it needs root, and a hierarchy that hands memory on", err)
		}
	}
	if err != nil {
		t.Fatalf("make a control group with a memory limit: %v", err)
	}
	return filepath.Join(dir, "cgroup.procs")
}

// write writes a value to a file that the kernel made.
func write(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
