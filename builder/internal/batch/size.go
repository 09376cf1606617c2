package batch

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/prometheus/procfs"
)

// CellMemory is the memory that one cell may need, in bytes: the test machine
// has 3 GiB, and half a gigabyte goes to the programs around it. Compilers need
// less, up to some four of them.
const CellMemory = 3584 << 20

// jobsPerCell is how many compilers a cell keeps busy before its single steps
// (link, pack, test machine) waste more than another cell beside it.
const jobsPerCell = 4

// Size divides a machine: how many cells side by side, and make's -j for each.
// 0 for either picks it; memory is in bytes, 0 is unknown.
func Size(parallel, jobs, cores int, memory uint64) (cells, each int) {
	cores = max(cores, 1)
	if parallel <= 0 {
		parallel = (cores + jobsPerCell - 1) / jobsPerCell
		if memory > 0 {
			parallel = min(parallel, int(memory/CellMemory))
		}
		parallel = max(parallel, 1)
	}
	if jobs <= 0 {
		jobs = max(cores/parallel, 1)
	}
	return parallel, jobs
}

// ExtraCells is how many cells may be running beside those that compile: one, where
// nobody said how many, and memory has room for it.
func ExtraCells(parallel, cells int, memory uint64) int {
	if parallel > 0 || memory/CellMemory <= uint64(cells) {
		return 0
	}
	return 1
}

// Cores returns how many processors this process may use.
func Cores() int { return runtime.GOMAXPROCS(0) }

// FreeMemory returns how much memory this process may still take, in bytes: what
// the machine has available, or what is left of the control group's limit. 0 is
// unknown.
func FreeMemory(root string) uint64 {
	var free uint64
	if fs, err := procfs.NewFS(filepath.Join(root, "proc")); err == nil {
		if info, err := fs.Meminfo(); err == nil && info.MemAvailableBytes != nil {
			free = *info.MemAvailableBytes
		}
	}
	group := filepath.Join(root, "sys", "fs", "cgroup")
	limit, ok := number(filepath.Join(group, "memory.max"))
	used, _ := number(filepath.Join(group, "memory.current"))
	if ok && limit > used && (free == 0 || limit-used < free) {
		return limit - used
	}
	return free
}

// number reads a file with one number; control groups write max for none.
func number(file string) (uint64, bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}
