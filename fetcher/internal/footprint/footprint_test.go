package footprint

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// maps is what Linux 6.12 wrote of a static Go program, and a library's mapping besides.
const maps = `00400000-00ec7000 r-xp 00000000 fe:00 1446207                            /usr/bin/fetcher
00ec7000-01b0e000 r--p 00ac7000 fe:00 1446207                            /usr/bin/fetcher
01b0e000-01bd6000 rw-p 0170e000 fe:00 1446207                            /usr/bin/fetcher
01bd6000-03c25000 rw-p 00000000 00:00 0
2c9e72c00000-2c9e75c00000 rw-p 00000000 00:00 0                          [anon: Go: heap]
7f50da40d000-7f50da413000 r--p 00000000 00:00 0                          [vvar]
7f50da413000-7f50da415000 r-xp 00000000 00:00 0                          [vdso]
7f50da500000-7f50da501000 ---p 00000000 fe:00 7                          /lib/guard
`

func TestFileMappings(t *testing.T) {
	t.Parallel()
	want := []mapping{{0x400000, 0xec7000}, {0xec7000, 0x1b0e000}}
	if got := fileMappings(strings.NewReader(maps)); !cmp.Equal(got, want, cmp.AllowUnexported(mapping{})) {
		t.Errorf("fileMappings(%q) = %v; want %v", maps, got, want)
	}
	for _, text := range []string{"", "x", "zz-10 r-xp 0 fe:00 7 /a", "20-10 r-xp 0 fe:00 7 /a", "10 r-xp 0 fe:00 7 /a"} {
		if got := fileMappings(strings.NewReader(text)); got != nil {
			t.Errorf("fileMappings(%q) = %v; want nil", text, got)
		}
	}
}

// TestTrim runs on after its own pages were unmapped, with less of them than before.
func TestTrim(t *testing.T) {
	before := resident(t)
	Trim()
	if after := resident(t); after >= before {
		t.Errorf("Trim() left %d KiB of the program's file mapped; want less than the %d KiB before", after, before)
	}
}

// resident is how much of mapped files counts as this program's, in KiB (proc_pid_status(5)).
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
