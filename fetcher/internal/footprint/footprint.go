// Package footprint makes the program's share of a node's memory small between two pieces of
// work. It refuses to bound what work takes: that is for whoever does it.
package footprint

import (
	"bufio"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Trim gives back what the heap no longer holds, and unmaps the pages of the program file: the
// kernel maps most of a program of 25 MB while it starts, and counts that as the program's. What
// is still needed of them comes back out of the page cache, page by page. A kernel that refuses
// leaves everything as it is.
func Trim() {
	debug.FreeOSMemory()
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return
	}
	defer maps.Close()
	for _, m := range fileMappings(maps) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// fileMappings returns the ranges of /proc/PID/maps (proc_pid_maps(5)) that a file backs and
// nothing can have written to: of what may be written, the file has no copy.
func fileMappings(maps io.Reader) (found []mapping) {
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		// 00400000-00ec7000 r-xp 00000000 fe:00 1314 /usr/bin/fetcher
		field := strings.Fields(lines.Text())
		if len(field) < 6 || field[4] == "0" || len(field[1]) != 4 || field[1][0] != 'r' || field[1][1] != '-' {
			continue
		}
		from, to, _ := strings.Cut(field[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && start < end {
			found = append(found, mapping{uintptr(start), uintptr(end)})
		}
	}
	return found
}
