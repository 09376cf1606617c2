package gpucheck

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// fatalXids are the errors after which a GPU needs a reset, or the node a reboot. NVIDIA's health checks call them
// critical (docs.nvidia.com/health-validation, Xid checks, and docs.nvidia.com/deploy/xid-errors).
var fatalXids = []int{46, 48, 62, 64, 79, 95, 110, 119, 120, 140, 143}

// recoveryXid is the error by which the driver reports which recovery action a GPU needs.
const recoveryXid = 154

// xidLine matches lines such as NVRM: Xid (PCI:0000:2b:00): 79, GPU has ...
var xidLine = regexp.MustCompile(`NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): ([0-9]{1,4})\b[, ]*(.*)`)

// recoveryAction matches the number of the recovery action in a line (nvmlDeviceGpuRecoveryAction_t). 0 means none; 3
// means to stop peer-to-peer traffic.
var recoveryAction = regexp.MustCompile(`to 0x([0-9a-fA-F]+)`)

// FatalXids returns the first fatal error of each GPU, in the driver's own text. A line that demands no recovery action
// clears the error.
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
		found[gpu] = fmt.Sprintf("Xid %d of GPU %s: %s", id, strings.ToLower(gpu), Clip(strings.TrimSpace(m[3]), 80))
	}
	for _, gpu := range order {
		fatal = append(fatal, found[gpu])
	}
	return fatal
}

// Significant reports whether [FatalXids] uses a line of the kernel log. Drop other lines, because programs may cause
// any number of them.
func Significant(line string) bool {
	m := xidLine.FindStringSubmatch(line)
	if m == nil {
		return false
	}
	id, err := strconv.Atoi(m[2])
	return err == nil && (id == recoveryXid || slices.Contains(fatalXids, id))
}

func wantsNothing(text string) bool {
	m := recoveryAction.FindStringSubmatch(text)
	return m != nil && m[1] == "0"
}

func wantsReset(text string) bool {
	m := recoveryAction.FindStringSubmatch(text)
	return m != nil && m[1] != "0" && m[1] != "3"
}
