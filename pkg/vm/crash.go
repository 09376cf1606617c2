package vm

import "strings"

// crashMarks are the beginnings of the kernel's messages about its own failure. The message that explains the failure
// best comes first. Machines run with oops=panic, so each of these failures ends the machine.
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

// crashLine returns the line of the console's text that best says why the kernel crashed, without its time stamp. It
// returns "" if there is no crash. A warning is not a crash.
func crashLine(console string) string {
	for _, mark := range crashMarks {
		for line := range strings.Lines(console) {
			text := trimStamp(strings.TrimSpace(line))
			// The mark must be at the beginning of the text. Otherwise the output of a program about a panic would
			// count as a crash.
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
