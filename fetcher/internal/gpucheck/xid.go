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

// FatalXids returns what is fatal among the kernel's lines, the first for each GPU, in the
// driver's own text. That the driver wants nothing done to a GPU any more ends it.
func FatalXids(lines []string) (fatal []string) {
	var order []string
	found := map[string]string{}
	for _, line := range lines {
		m := xidLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		gpu := m[1]
		id, err := strconv.Atoi(m[2])
		if err == nil && id == recoveryXid && wantsNothing(m[3]) {
			delete(found, gpu)
			order = slices.DeleteFunc(order, func(g string) bool { return g == gpu })
			continue
		}
		if _, ok := found[gpu]; ok || err != nil || !slices.Contains(fatalXids, id) &&
			(id != recoveryXid || !wantsReset(m[3])) {
			continue
		}
		order = append(order, gpu)
		found[gpu] = fmt.Sprintf("Xid %d of GPU %s: %s", id, strings.ToLower(gpu), clip(strings.TrimSpace(m[3]), 80))
	}
	for _, gpu := range order {
		fatal = append(fatal, found[gpu])
	}
	return fatal
}

// Significant reports whether a line of the kernel's says something to [FatalXids]. Programs
// cause other errors as often as they like.
func Significant(line string) bool {
	m := xidLine.FindStringSubmatch(line)
	if m == nil {
		return false
	}
	id, err := strconv.Atoi(m[2])
	return err == nil && (id == recoveryXid || slices.Contains(fatalXids, id))
}

func wantsNothing(text string) bool {
	m := recovery.FindStringSubmatch(text)
	return m != nil && m[1] == "0"
}

func wantsReset(text string) bool {
	m := recovery.FindStringSubmatch(text)
	return m != nil && m[1] != "0" && m[1] != "3"
}
