package vm

import "strings"

// crashMarks are how the kernel begins its line about a failure of its own, in
// the order of how much each one tells. Machines run with oops=panic, so each
// of them ends the machine.
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

// crashLine returns the line of a console's text that best says why the kernel
// crashed, without its time stamp, or "". Warnings are no crash.
func crashLine(console string) string {
	for _, mark := range crashMarks {
		for line := range strings.Lines(console) {
			text := trimStamp(strings.TrimSpace(line))
			// The mark begins the text, so that a program's output about a
			// panic are not taken for one.
			if strings.HasPrefix(text, mark) {
				return text
			}
		}
	}
	return ""
}

// trimStamp removes "[    1.234567] ".
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
