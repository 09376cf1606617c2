// Package memorygroup limits the memory of a test's child processes by a real control group.
package memorygroup

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// New makes a control group with a memory limit in bytes. It returns the file into which a process writes its id to
// enter the group. It skips the test if this process may not make a group.
func New(t testing.TB, limit int64) (procs string) {
	t.Helper()
	const root = "/sys/fs/cgroup"
	top, file := filepath.Join(root, "memory"), "memory.limit_in_bytes" // version 1
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		top, file = root, "memory.max"
		_ = write(filepath.Join(root, "cgroup.subtree_control"), "+memory") // after an error, the file is missing below
	}
	dir, err := os.MkdirTemp(top, "prebake-test-*")
	if err == nil {
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil { // the kernel's files in the folder go with it
				t.Errorf("remove control group: %v", err)
			}
		})
		err = write(filepath.Join(dir, file), strconv.FormatInt(limit, 10))
	}
	if err != nil {
		t.Skipf("no control group with a memory limit: %v; it needs root, and a hierarchy that hands memory on", err)
	}
	return filepath.Join(dir, "cgroup.procs")
}

// write writes a file that the kernel made.
func write(name, value string) error {
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
