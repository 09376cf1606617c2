// Package bootcfg changes the kernel command line in the boot configuration of a COS node, so that the next boot loads
// modules that the kernel's maker did not sign. It refuses to do so where Secure Boot is on. It refuses to change
// anything else in the file, and to write a file of which it has no copy.
package bootcfg

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Want lists what the command line shall allow.
type Want struct {
	// Unsigned allows modules without a signature by a key of the kernel: module.sig_enforce=0.
	Unsigned bool `json:"unsigned,omitempty"`
	// Elsewhere allows modules and firmware from other file systems than the root: loadpin.exclude=kernel-module,firmware.
	// COS itself sets this on newer images.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// maxCommandLine is the longest command line that a kernel accepts, in bytes. It is COMMAND_LINE_SIZE of arch/x86 and
// arch/arm64, minus the terminating zero.
const maxCommandLine = 2047

// Edit returns the configuration with the wanted words in each boot entry, and the number of entries. All other bytes
// stay. The form is GRUB's, as COS images have it: a line "linux FILE WORD…" for each entry, local and verified, A and
// B.
func Edit(config []byte, want Want) (edited []byte, entries int, err error) {
	for line := range bytes.Lines(config) {
		words := split(line)
		if len(words) < 2 || !slices.Contains([]string{"linux", "linuxefi", "linux16"}, words[0].of(line)) {
			edited = append(edited, line...)
			continue
		}
		entries++
		if bytes.Count(line, []byte(`"`))%2 != 0 {
			return nil, 0, fault.New(fault.Unsupported,
				fmt.Sprintf("edit boot entry %d: a quotation mark is not closed", entries),
				"change the boot configuration by hand")
		}
		changed := editLine(line, words, want)
		if n := commandLine(changed); n > maxCommandLine {
			return nil, 0, fault.New(fault.Unsupported,
				fmt.Sprintf("edit boot entry %d: its command line would have %d bytes; a kernel reads at most %d", entries, n,
					maxCommandLine),
				"remove parameters that this node does not need")
		}
		edited = append(edited, changed...)
	}
	if entries == 0 {
		return nil, 0, fault.New(fault.Unsupported, "edit boot configuration: it has no boot entry",
			"check the EFI partition: the file is not a configuration of COS's boot loader")
	}
	return edited, entries, nil
}

// word is the position of a word in a line.
type word struct{ from, to int }

func (w word) of(line []byte) string { return string(line[w.from:w.to]) }

// split finds the words of a line. White space within double quotes does not end a word.
func split(line []byte) (words []word) {
	from, quoted := -1, false
	for i, c := range line {
		space := (c == ' ' || c == '\t' || c == '\n' || c == '\r') && !quoted
		if c == '"' {
			quoted = !quoted
		}
		switch {
		case space && from >= 0:
			words, from = append(words, word{from, i}), -1
		case !space && from < 0:
			from = i
		}
	}
	if from >= 0 {
		words = append(words, word{from, len(line)})
	}
	return words
}

// editLine changes the words of one entry. A kernel takes the last of several words with the same key, so editLine
// changes each of them.
func editLine(line []byte, words []word, want Want) []byte {
	var out []byte
	at, excluded := 0, false
	replace := func(w word, text string) {
		out = append(append(out, line[at:w.from]...), text...)
		at = w.to
	}
	for _, w := range words[2:] {
		key, value, _ := strings.Cut(w.of(line), "=")
		switch {
		case key == "module.sig_enforce" && want.Unsigned:
			replace(w, "module.sig_enforce=0")
		case key == "loadpin.exclude" && want.Elsewhere:
			kinds := strings.Split(value, ",")
			for _, kind := range []string{"kernel-module", "firmware"} {
				if !slices.Contains(kinds, kind) {
					kinds = append(kinds, kind)
				}
			}
			replace(w, "loadpin.exclude="+strings.Join(slices.DeleteFunc(kinds, func(k string) bool { return k == "" }), ","))
			excluded = true
		}
	}
	out = append(out, line[at:]...)
	if want.Elsewhere && !excluded { // after the kernel's name, because every entry has that place
		end := words[1].to
		out = slices.Concat(out[:end], []byte(" loadpin.exclude=kernel-module,firmware"), out[end:])
	}
	return out
}

// commandLine returns the length in bytes of the command line that the kernel gets. It has the words after the kernel's
// name, and BOOT_IMAGE=NAME before them, which GRUB adds.
func commandLine(line []byte) int {
	words := split(line)
	text := "BOOT_IMAGE=" + words[1].of(line)
	for _, w := range words[2:] {
		text += " " + w.of(line)
	}
	return len(text)
}
