package batch_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/builder/internal/batch"
)

func TestSize(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	rows := []struct {
		parallel, jobs, cores int
		memory                uint64
		cells, each           int
	}{
		{0, 0, 1, 0, 1, 1},
		{0, 0, 2, 8 * gib, 1, 2},
		{0, 0, 8, 64 * gib, 2, 4},
		{0, 0, 16, 64 * gib, 4, 4},
		{0, 0, 16, 8 * gib, 2, 8}, // memory limits the number of cells
		{0, 0, 16, gib, 1, 16},
		{3, 0, 8, gib, 3, 2}, // the user's number of cells is used as it is
		{0, 6, 16, 0, 4, 6},
		{9, 0, 2, 0, 9, 1},
	}
	for _, row := range rows {
		if c, e := batch.Size(row.parallel, row.jobs, row.cores, row.memory); c != row.cells || e != row.each {
			t.Errorf("Size(%d, %d, %d, %d) = %d, %d; want %d, %d", row.parallel, row.jobs, row.cores, row.memory, c, e,
				row.cells, row.each)
		}
	}
}

func TestAhead(t *testing.T) {
	t.Parallel()
	const gib = 1 << 30
	for _, row := range []struct {
		parallel, cells int
		memory          uint64
		want            int
	}{
		{0, 1, 8 * gib, 1},
		{0, 1, 6 * gib, 0}, // memory has no room for a second cell
		{0, 1, 0, 0},       // memory is unknown
		{1, 1, 64 * gib, 0},
		{0, 4, 18 * gib, 1},
		{0, 4, 17 * gib, 0},
	} {
		if got := batch.ExtraCells(row.parallel, row.cells, row.memory); got != row.want {
			t.Errorf("ExtraCells(%d, %d, %d) = %d; want %d", row.parallel, row.cells, row.memory, got, row.want)
		}
	}
}

func TestFreeMemory(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	write := func(name, text string) {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := func(n uint64) {
		t.Helper()
		if got := batch.FreeMemory(root); got != n {
			t.Errorf("FreeMemory = %d; want %d", got, n)
		}
	}
	want(0)
	write("proc/meminfo", "MemTotal: 8192 kB\nMemAvailable: 4096 kB\n")
	want(4096 << 10)
	write("sys/fs/cgroup/memory.max", "max\n")
	write("sys/fs/cgroup/memory.current", "1000\n")
	want(4096 << 10)
	write("sys/fs/cgroup/memory.max", "3000\n")
	want(2000)
	// The format is from Documentation/admin-guide/cgroup-v2.rst in the kernel's source.
	stat := "anon 500\nfile 400\ninactive_anon 0\nactive_anon 500\ninactive_file 300\nactive_file 100\n"
	write("sys/fs/cgroup/memory.stat", stat)
	want(2300)
	// inactive_file exceeds memory.current, because the two files were read at different moments.
	write("sys/fs/cgroup/memory.stat", "inactive_file 5000\n")
	want(3000)
	write("sys/fs/cgroup/memory.stat", "anon 500\n")
	for _, used := range []string{"3000\n", "4000\n"} { // no memory is left: 1 byte, because 0 would mean unknown
		write("sys/fs/cgroup/memory.current", used)
		want(1)
	}
}
