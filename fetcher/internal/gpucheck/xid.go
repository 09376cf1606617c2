package gpucheck

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// fatalXids are the errors after which a GPU needs a reset, or the machine a restart. The source is NVIDIA's Xid
// catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html), as of 2025-10-29: the immediate actions
// RESET_GPU, RESTART_BM (79), RESTART_VM (151), and WORKFLOW_XID_48, which begins with a reset. Other errors are not
// fatal:
//
//   - RESTART_APP: a program has to be started again, such as after 13, 31, 68, or 94, a contained memory error.
//   - IGNORE: among them 43, and 63, a memory row that the next reset will remap. Until then the GPU works, and takes
//     new programs (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt, "Row-remapping pending flag").
//   - Workflows: 45 follows another error. After an NVLink error (74, 144 to 150), the driver itself asks for a reset
//     if it needs one (see recoveryXid).
//   - 155, an NVLink that is down. Its action is RESET_GPU, but it is logged for a link that was put to sleep, too. The
//     driver asks for a reset here as well, if it needs one.
var fatalXids = []int{46, 48, 62, 64, 79, 95, 109, 110, 119, 120, 136, 140, 143, 151, 156, 158}

// recoveryXid is the error by which the driver reports which recovery action a GPU needs.
const recoveryXid = 154

// firstFatalXids are the fatal errors of the first releases, which do not store their list.
var firstFatalXids = []int{46, 48, 62, 64, 79, 95, 110, 119, 120, 140, 143}

// FatalNumbers returns the numbers of the fatal errors, for [KeepJudgedXids].
func FatalNumbers() []int { return slices.Clone(fatalXids) }

// xidLine matches lines such as NVRM: Xid (PCI:0000:2b:00): 79, GPU has ... For an error of one MIG instance, the
// driver adds the instance: NVRM: Xid (PCI:0000:2b:00 GPU-I:01 GPU-CI:02): 109, ... (kernel_rc.c of NVIDIA's driver).
var xidLine = regexp.MustCompile(`NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)(?: GPU-[^)]*)?\): ([0-9]{1,4})\b[, ]*(.*)`)

// instanceMark is part of each line about one MIG instance.
const instanceMark = " GPU-I:"

// recoveryAction matches the numbers of the former and the new recovery action in a line.
var recoveryAction = regexp.MustCompile(`from 0x([0-9a-fA-F]+).* to 0x([0-9a-fA-F]+)`)

// noReset are the recovery actions that include no reset and no reboot (nvmlDeviceGpuRecoveryAction_t in nvml.h): none
// (0), to stop peer-to-peer traffic (3), and to recover the IMEX domain (5), which is a service of several nodes and
// not a part of the GPU. After action 3, the driver reports another action as soon as the traffic has stopped. If the
// new action is a reset, it counts. An action that is not known here counts as a reset.
var noReset = []int64{0, 3, 5}

// needs maps the other recovery actions to what a GPU needs. New programs can use the GPU only after that. After action
// 4, the GPU has less capacity, and programs that run may end their work. The source is NVIDIA's guide GPU Memory Error
// Management, "Error Recovery and Response Flags"
// (docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt/error-recovery-and-response-flags.html). The actions from 5 on are
// only in nvml.h.
var needs = map[int64]string{1: "a reset", 2: "a reboot of the node", 4: "a reset when its programs have ended",
	6: "a reset of its PCIe bus", 7: "a reboot of the machine"}

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

// KeepXids returns the line with the first fatal error of each GPU. A line by which the driver no longer demands a
// reset clears the error. A load of the driver clears all errors. Keep the result in place of all lines, because
// programs may cause any number of them.
func KeepXids(lines []string) []string { return keepXids(lines, fatalXids) }

// KeepJudgedXids does the same as KeepXids with lines that another release of this program may have read. list has the
// errors that are fatal for that release; nil means one of the first releases. An error that is fatal only for this
// release is left out: the other release called the GPU usable after that error, and programs have used the GPU since.
func KeepJudgedXids(lines []string, list []int) []string {
	if list == nil { // the first releases did not read lines about MIG instances
		lines = slices.DeleteFunc(slices.Clone(lines), func(line string) bool {
			return xidLine.MatchString(line) && strings.Contains(line, instanceMark)
		})
		list = firstFatalXids
	}
	return keepXids(lines, list)
}

func keepXids(lines []string, list []int) (kept []string) {
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
		case id == recoveryXid && noLongerWantsReset(m[3]):
			if at >= 0 {
				kept, gpus = slices.Delete(kept, at, at+1), slices.Delete(gpus, at, at+1)
			}
		case at < 0 && (slices.Contains(fatalXids, id) && slices.Contains(list, id) ||
			id == recoveryXid && wantsReset(m[3])):
			kept, gpus = append(kept, line), append(gpus, m[1])
		}
	}
	return kept
}

// noLongerWantsReset reports whether a change of the recovery action ends the need of a reset. The end of another
// action, such as to stop peer-to-peer traffic, says nothing about an error for which the driver asked no reset.
func noLongerWantsReset(text string) bool {
	from, to, ok := actions(text)
	return ok && !slices.Contains(noReset, from) && slices.Contains(noReset, to)
}

func wantsReset(text string) bool {
	_, to, ok := actions(text)
	return ok && !slices.Contains(noReset, to)
}

func actions(text string) (from, to int64, ok bool) {
	m := recoveryAction.FindStringSubmatch(text)
	if m == nil {
		return 0, 0, false
	}
	from, err := strconv.ParseInt(m[1], 16, 32)
	to, terr := strconv.ParseInt(m[2], 16, 32)
	return from, to, err == nil && terr == nil
}

// XidGPU returns the address of the GPU in a line of [KeepXids], as the driver writes it.
func XidGPU(line string) string {
	if m := xidLine.FindStringSubmatch(line); m != nil {
		return m[1]
	}
	return ""
}

// Answers reports whether NVML lists a GPU as healthy. The address is that of [XidGPU], which may lack the PCI
// function.
func (n NVML) Answers(gpu string) bool {
	return slices.ContainsFunc(n.Devices, func(d Device) bool {
		return d.Error == "" && d.PCIBusID != "" && slot(d.PCIBusID) == slot(gpu)
	})
}

// gpuIsLost is NVML's return value for a GPU that left the bus: NVML_ERROR_GPU_IS_LOST in nvml.h. A GPU that is back on
// the bus was reset. Other failures, such as a timeout, may end by themselves. NVML_ERROR_RESET_REQUIRED may end by
// itself, too: the driver forgets it when the last program closes the GPU (bFatalError in NVIDIA's kernel_gsp.c).
const gpuIsLost = 15

// NeedsReset reports whether a GPU is lost, or whether the driver's recovery action for it includes a reset. The driver
// keeps such an action in a register of the GPU until the reset (gpuMarkDeviceForReset in NVIDIA's gpu.c). The address
// is that of [XidGPU]. If NVML could not open a GPU, it lists the GPU without an address. If it lists several GPUs
// without an address, and not all of them are lost, NeedsReset is false.
func (n NVML) NeedsReset(gpu string) bool {
	nameless, lost := 0, 0
	for _, d := range n.Devices {
		isLost := d.Error != "" && d.Code == gpuIsLost
		switch {
		case d.PCIBusID == "":
			if nameless++; isLost {
				lost++
			}
		case slot(d.PCIBusID) == slot(gpu):
			return isLost || d.demand() != ""
		}
	}
	return nameless > 0 && lost == nameless
}

// demand returns what the driver wants done with a GPU before it is used again, or "".
func (d Device) demand() string {
	if d.Recovery == nil || slices.Contains(noReset, *d.Recovery) {
		return ""
	}
	if text, ok := needs[*d.Recovery]; ok {
		return text
	}
	return fmt.Sprintf("recovery action %d", *d.Recovery)
}

// demands returns what the driver wants done with GPUs that NVML lists as healthy otherwise, and the slots of these
// GPUs.
func (n NVML) demands() (texts, slots []string) {
	for _, d := range n.Devices {
		if what := d.demand(); what != "" && d.Error == "" {
			texts, slots = append(texts, fmt.Sprintf("GPU %s needs %s", d.PCIBusID, what)), append(slots, slot(d.PCIBusID))
		}
	}
	return texts, slots
}

// slot returns a PCI address without the number of the PCI function.
func slot(address string) string {
	slot, _, _ := strings.Cut(busAddress(address), ".")
	return slot
}
