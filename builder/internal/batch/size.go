package batch

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/prometheus/procfs"
)

// CellMemory is the memory that one cell may need, in bytes. The virtual machine of the load test
// has 3 GiB, and the programs around it need 0.5 GiB. About four compilers fit into less.
const CellMemory = 3584 << 20

// jobsPerCell is the number of processors that one cell uses well. With more, its single-threaded
// steps (link, pack, load test) would waste more than a second cell costs.
const jobsPerCell = 4

// Size returns how many cells to make at the same time, and make's -j for each. For parallel and
// jobs, 0 means that Size chooses. memory is in bytes; 0 means unknown.
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

// ExtraCells returns the number of cells that may run in addition to the ones that compile. It is
// one if the user gave no number and memory has room for another cell, and 0 otherwise.
func ExtraCells(parallel, cells int, memory uint64) int {
	if parallel > 0 || memory/CellMemory <= uint64(cells) {
		return 0
	}
	return 1
}

// Cores returns the number of processors that this process may use.
func Cores() int { return runtime.GOMAXPROCS(0) }

// FreeMemory returns the memory in bytes that this process may still use: the machine's available
// memory, or the rest of the control group's limit if that is less. 0 means unknown.
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

// number reads a file with one number. ok is false for the text max, which control groups write if
// there is no limit.
func number(file string) (uint64, bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}
