package batch

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/prometheus/procfs"
)

// CellMemory is the memory that one cell may need, in bytes. The load test needs most: 3 GiB for its virtual machine,
// and 0.5 GiB for the programs around it.
const CellMemory = 3584 << 20

// jobsPerCell is the number of processors that one cell uses well. More processors would be idle in the single-threaded
// steps (link, pack, load test).
const jobsPerCell = 4

// Size returns how many cells to build at the same time, and the number of compilers (make -j) for each. If parallel is
// 0, Size chooses the number of cells. If jobs is 0, Size chooses the number of compilers. memory is in bytes; 0 means
// unknown.
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

// ExtraCells returns the number of cells that may run besides the cells that compile. It is 1 if parallel is 0 (the
// user gave no number of cells) and memory has room for another cell. Otherwise it is 0.
func ExtraCells(parallel, cells int, memory uint64) int {
	if parallel > 0 || memory/CellMemory <= uint64(cells) {
		return 0
	}
	return 1
}

// Cores returns the number of processors that this process may use.
func Cores() int { return runtime.GOMAXPROCS(0) }

// FreeMemory returns the memory in bytes that this process may still use: the machine's available memory, or the rest
// of the control group's limit if that is less. root is the folder with proc and sys. 0 means unknown. If the limit
// leaves no memory, FreeMemory returns 1.
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
	// The kernel frees inactive page cache before it refuses memory. So this page cache counts as free here, as it does
	// in kubelet's "working set".
	used -= min(used, inactiveFile(filepath.Join(group, "memory.stat")))
	if ok {
		left := uint64(1)
		if limit > used { // a group may use more than its limit
			left = limit - used
		}
		if free == 0 || left < free {
			free = left
		}
	}
	return free
}

// number reads a file with one number. It returns false for anything else, such as max for a control group without a
// limit.
func number(file string) (uint64, bool) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}

// inactiveFile reads inactive_file of a control group's memory.stat, in bytes (cgroup-v2.rst of the kernel's
// documentation). It returns 0 if the kernel does not report it.
func inactiveFile(file string) uint64 {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "inactive_file "); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}
