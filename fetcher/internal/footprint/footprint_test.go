package footprint

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// smaps has the mappings of a dynamic program that was linked with -z relro, as Linux 6.12 printed them in
// /proc/PID/smaps. The lines between Rss and Anonymous are left out.
const smaps = `5595d8764000-5595d8766000 r--p 00000000 fe:00 247026                     /usr/bin/cat
Rss:                   8 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd mr mw me 
5595d8766000-5595d876b000 r-xp 00002000 fe:00 247026                     /usr/bin/cat
Rss:                  20 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex mr mw me 
5595d876b000-5595d876e000 r--p 00007000 fe:00 247026                     /usr/bin/cat
Rss:                  12 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd mr mw me 
5595d876e000-5595d876f000 r--p 00009000 fe:00 247026                     /usr/bin/cat
Rss:                   4 kB
Anonymous:             4 kB
Swap:                  0 kB
VmFlags: rd mr mw me ac 
5595d876f000-5595d8770000 rw-p 0000a000 fe:00 247026                     /usr/bin/cat
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd wr mr mw me ac 
55960a4bc000-55960a4dd000 rw-p 00000000 00:00 0                          [heap]
Rss:                  16 kB
Anonymous:            16 kB
Swap:                  0 kB
VmFlags: rd wr mr mw me ac 
`

func TestFileMappings(t *testing.T) {
	t.Parallel()
	const relro = "\nAnonymous:             4 kB\nSwap:                  0 kB"
	code := []mapping{{0x5595d8764000, 0x5595d8766000}, {0x5595d8766000, 0x5595d876b000}, {0x5595d876b000, 0x5595d876e000}}
	for _, row := range []struct {
		name, text string
		want       []mapping
	}{
		{"RELRO", smaps, code},
		{"RELRO in swap", strings.Replace(smaps, relro, "\nAnonymous: 0 kB\nSwap: 4 kB", 1), code},
		{"a library", strings.ReplaceAll(smaps, "/usr/bin/cat", "/usr/lib/libc.so.6"), nil},
		{"empty", "", nil},
		{"no numbers", "zz-10 r-xp 0 fe:00 7 /usr/bin/cat\nAnonymous: 0 kB\nSwap: 0 kB\n", nil},
		{"backwards", "20-10 r-xp 0 fe:00 7 /usr/bin/cat\nAnonymous: 0 kB\nSwap: 0 kB\n", nil},
		{"not said what was written", "10-20 r-xp 0 fe:00 7 /usr/bin/cat\nSwap: 0 kB\n", nil},
	} {
		got := fileMappings(strings.NewReader(row.text), "/usr/bin/cat")
		if !cmp.Equal(got, row.want, cmp.AllowUnexported(mapping{})) {
			t.Errorf("%s: fileMappings(%q) = %x; want %x", row.name, row.text, got, row.want)
		}
	}
}

// TestTrim checks that Trim reduces the memory of mapped files, and that the program still runs afterwards.
func TestTrim(t *testing.T) {
	before := resident(t)
	Trim()
	if after := resident(t); after >= before {
		t.Errorf("Trim() left %d KiB of the program's file mapped; want less than the %d KiB before", after, before)
	}
}

// resident returns the size in KiB of the mapped files that are in this program's memory (RssFile in
// proc_pid_status(5)).
func resident(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`RssFile:\s+([0-9]+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("status = %q; want a line RssFile", status)
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
