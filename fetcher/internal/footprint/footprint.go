// Package footprint reduces the program's use of memory between two pieces of work. It refuses to limit memory during
// work; the code that does the work must do that.
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

// Trim returns free heap memory to the kernel and unmaps the pages of the program file. The kernel maps most of a 25 MB
// program file at start and counts these pages as the program's memory. Pages that are needed again come back from the
// page cache one by one. If the kernel refuses, nothing changes.
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

// fileMappings returns the ranges of /proc/PID/smaps (proc_pid_smaps(5)) whose pages are all in the program file. A
// page that was written to differs from the file, so its range must stay mapped. The permissions of a range do not show
// whether it was written to, because a dynamic loader writes to pages and then makes them read-only (RELRO). The counts
// of anonymous and swapped pages show it.
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

// programMapping parses the first line of a mapping. It returns the zero value if the mapping is writable, or belongs
// to another file than the program.
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
