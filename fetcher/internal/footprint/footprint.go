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
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	smaps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return
	}
	defer smaps.Close()
	for _, m := range fileMappings(smaps, program) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// fileMappings returns the ranges of /proc/PID/smaps (proc_pid_smaps(5)) that hold nothing but
// what the program's file has: of a page that was written to, the file has no copy. A dynamic
// loader writes to pages and makes them read-only then (RELRO), so the permissions do not tell;
// the anonymous pages of a mapping do, and those of them that were swapped out.
func fileMappings(smaps io.Reader, program string) (found []mapping) {
	var m mapping // 0 to 0 for one that stays
	anonymous := false
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		field := strings.Fields(lines.Text())
		if len(field) < 2 {
			continue
		}
		switch field[0] {
		case "Anonymous:":
			anonymous = field[1] == "0"
		case "Swap:":
			if anonymous && field[1] == "0" && m.start < m.end {
				found = append(found, m)
			}
			m, anonymous = mapping{}, false
		default:
			if !strings.HasSuffix(field[0], ":") {
				m, anonymous = programMapping(lines.Text(), program), false
			}
		}
	}
	return found
}

// programMapping reads the first line of a mapping; 0 to 0 stands for one that may be written
// to, or that is not of the program's file.
func programMapping(line, program string) (m mapping) {
	// 00400000-00ec7000 r-xp 00000000 fe:00 1314                      /usr/bin/fetcher
	field := strings.Fields(line)
	if len(field) < 6 || !strings.HasPrefix(field[1], "r-") || !strings.HasSuffix(line, " "+program) {
		return m
	}
	from, to, _ := strings.Cut(field[0], "-")
	start, err1 := strconv.ParseUint(from, 16, 64)
	end, err2 := strconv.ParseUint(to, 16, 64)
	if err1 != nil || err2 != nil {
		return m
	}
	return mapping{uintptr(start), uintptr(end)}
}
