// Package ondisk checks that a program has flushed files to the disk, so that a power cut does not lose them.
package ondisk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Check fails the test if a part of a file is only in memory. If the kernel or the file system cannot tell, Check skips
// the rest of the test. Call it directly after the write, because the kernel flushes every file after some seconds.
func Check(t testing.TB, path string) {
	t.Helper()
	// A new file that nobody flushed shows whether the file system counts such pages. A tmpfs does not count them.
	control := filepath.Join(t.TempDir(), "control")
	if err := os.WriteFile(control, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if pages, err := unflushed(control); err != nil || pages == 0 {
		t.Skipf("the kernel counts %d pages of a new file that are not on the disk, %v: the test needs Linux 6.5 "+
			"(cachestat), and a TMPDIR on a disk, so no tmpfs", pages, err)
	}
	if pages, err := unflushed(path); err != nil || pages > 0 {
		t.Errorf("%s has %d pages that are not on the disk, %v; want none", path, pages, err)
	}
}

// unflushed returns the number of pages of a file that are not on the disk. It needs Linux 6.5 (cachestat(2)).
func unflushed(path string) (pages uint64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	var st unix.Cachestat_t
	err = unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0)
	return st.Dirty + st.Writeback, errors.Join(err, f.Close())
}
