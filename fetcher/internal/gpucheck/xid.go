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

// loadLine is part of the line that the driver writes when it is loaded.
const loadLine = "NVRM: loading NVIDIA UNIX"

// FatalXids returns the fatal errors that still count (see [KeepXids]), in the driver's own text.
func FatalXids(lines []string) (fatal []string) {
	for _, line := range KeepXids(lines) {
		m := xidLine.FindStringSubmatch(line)
		fatal = append(fatal,
			fmt.Sprintf("Xid %s of GPU %s: %s", m[2], strings.ToLower(m[1]), Clip(strings.TrimSpace(m[3]), 80)))
	}
	return fatal
}

// KeepXids returns the line with the first fatal error of each GPU. A line that demands no recovery action clears the
// error. A load of the driver clears all errors. Keep the result in place of all lines, because programs may cause any
// number of them.
func KeepXids(lines []string) (kept []string) {
	var gpus []string // the GPU of each kept line
	for _, line := range lines {
		if strings.Contains(line, loadLine) {
			kept, gpus = nil, nil
			continue
		}
		m := xidLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		id, err := strconv.Atoi(m[2])
		at := slices.Index(gpus, m[1])
		switch {
		case err != nil:
		case id == recoveryXid && wantsNothing(m[3]):
			if at >= 0 {
				kept, gpus = slices.Delete(kept, at, at+1), slices.Delete(gpus, at, at+1)
			}
		case at < 0 && (slices.Contains(fatalXids, id) || id == recoveryXid && wantsReset(m[3])):
			kept, gpus = append(kept, line), append(gpus, m[1])
		}
	}
	return kept
}

func wantsNothing(text string) bool {
	m := recoveryAction.FindStringSubmatch(text)
	return m != nil && m[1] == "0"
}

func wantsReset(text string) bool {
	m := recoveryAction.FindStringSubmatch(text)
	return m != nil && m[1] != "0" && m[1] != "3"
}

// XidGPU returns the address of the GPU in a line of [KeepXids], as the driver writes it.
func XidGPU(line string) string {
	if m := xidLine.FindStringSubmatch(line); m != nil {
		return m[1]
	}
	return ""
}

// Answers reports whether NVML lists a GPU as healthy. The address is that of [XidGPU], which lacks the function.
func (n NVML) Answers(gpu string) bool {
	slot := func(address string) string {
		slot, _, _ := strings.Cut(busAddress(address), ".")
		return slot
	}
	return slices.ContainsFunc(n.Devices, func(d Device) bool {
		return d.Error == "" && d.PCIBusID != "" && slot(d.PCIBusID) == slot(gpu)
	})
}
