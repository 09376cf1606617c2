// Package footprint reduces the program's memory between two pieces of work. It sets no limits during the work.
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

// Trim returns free heap memory to the kernel and unmaps the pages of the program file. Pages that are needed again
// come back from the page cache.
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

type mapping struct{ start, end uintptr }

// fileMappings returns the ranges that the caller can unmap safely, because all their pages can be read again from the
// program file. It parses /proc/PID/smaps (proc_pid_smaps(5)). A range with a written page is not returned. A written
// page may be read-only now (RELRO), but counts as anonymous or swapped.
func fileMappings(smaps io.Reader, program string) (found []mapping) {
	var m mapping // the zero value is not returned
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

// programMapping parses the first line of a mapping. It returns the zero value for a writable mapping, or for another
// file.
func programMapping(line, program string) (m mapping) {
	// An example of such a line:
	//	00400000-00ec7000 r-xp 00000000 fe:00 1314                      /usr/bin/fetcher
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
