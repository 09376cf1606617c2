package gpucheck

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// fatalXids are the errors after which a GPU does nothing useful before it is reset, or the
// node is rebooted: those which NVIDIA's health checks call critical
// (docs.nvidia.com/health-validation, Xid checks, and docs.nvidia.com/deploy/xid-errors).
// What ends with the program that caused it is not among them.
var fatalXids = []int{46, 48, 62, 64, 79, 95, 110, 119, 120, 140, 143}

// recoveryXid tells that the driver wants something done to the GPU, and what.
const recoveryXid = 154

// xidLine is how the driver writes them: NVRM: Xid (PCI:0000:2b:00): 79, GPU has ...
var xidLine = regexp.MustCompile(`NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): ([0-9]{1,4})\b[, ]*(.*)`)

// recovery is what it wants: nvmlDeviceGpuRecoveryAction_t, 0 nothing, 3 no more peers.
var recovery = regexp.MustCompile(`to 0x([0-9a-fA-F]+)`)

// FatalXids returns what is fatal among the kernel's lines, one for each GPU, in the
// driver's own words.
func FatalXids(lines []string) (fatal []string) {
	var seen []string
	for _, line := range lines {
		m := xidLine.FindStringSubmatch(line)
		if m == nil || slices.Contains(seen, m[1]) {
			continue
		}
		id, err := strconv.Atoi(m[2])
		if err != nil || !slices.Contains(fatalXids, id) && (id != recoveryXid || !wantsReset(m[3])) {
			continue
		}
		seen = append(seen, m[1])
		fatal = append(fatal, fmt.Sprintf("Xid %d of GPU %s: %s", id, strings.ToLower(m[1]), clip(strings.TrimSpace(m[3]), 80)))
	}
	return fatal
}

func wantsReset(text string) bool {
	m := recovery.FindStringSubmatch(text)
	return m != nil && m[1] != "0" && m[1] != "3"
}
