package vm

import "strings"

// crashMarks are the beginnings of the kernel's messages about its own failure, the best explanation first. Machines
// run with oops=panic, so each of these failures ends the machine.
var crashMarks = []string{
	"BUG: ",
	"kernel BUG at ",
	"Unable to handle kernel ",
	"general protection fault",
	"invalid opcode:",
	"divide error:",
	"stack segment:",
	"Internal error: Oops",
	"Kernel panic - not syncing",
	"Oops: ",
}

// crashLine returns the console's line that best says why the kernel crashed, without its time stamp, or "". A warning
// is not a crash.
func crashLine(console string) string {
	for _, mark := range crashMarks {
		for line := range strings.Lines(console) {
			text := trimStamp(strings.TrimSpace(line))
			// In the middle of a line, the mark may be a program's output about a panic.
			if strings.HasPrefix(text, mark) {
				return text
			}
		}
	}
	return ""
}

// trimStamp removes a time stamp such as "[    1.234567] ".
func trimStamp(line string) string {
	rest, ok := strings.CutPrefix(line, "[")
	if !ok {
		return line
	}
	stamp, text, ok := strings.Cut(rest, "] ")
	if !ok || strings.Trim(stamp, " .0123456789") != "" {
		return line
	}
	return text
}
