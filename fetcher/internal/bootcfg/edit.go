// Package bootcfg changes the kernel command line in the boot configuration of a COS node,
// so that the next boot loads modules that its maker did not sign. It refuses to do so
// where Secure Boot is on, to change anything else in the file, and to write one that it
// has no copy of.
package bootcfg

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Want is what the command line is to allow.
type Want struct {
	// Unsigned loads modules that no key of the kernel's signed: module.sig_enforce=0.
	Unsigned bool `json:"unsigned,omitempty"`
	// Elsewhere loads modules and firmware from other filesystems than the root:
	// loadpin.exclude=kernel-module,firmware, as COS itself has it on newer images.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// maxCommandLine is the longest command line that a kernel takes: COMMAND_LINE_SIZE of
// arch/x86 and arch/arm64 without its end.
const maxCommandLine = 2047

// Edit returns the configuration with what is wanted in each of its boot entries, and how
// many these are. Each other byte stays. The form is GRUB's, as images of COS have it: a
// line "linux FILE WORD…" for each entry, local and verified, A and B.
func Edit(config []byte, want Want) (edited []byte, entries int, err error) {
	for line := range bytes.Lines(config) {
		words := split(line)
		if len(words) < 2 || !slices.Contains([]string{"linux", "linuxefi", "linux16"}, words[0].of(line)) {
			edited = append(edited, line...)
			continue
		}
		entries++
		if bytes.Count(line, []byte(`"`))%2 != 0 {
			return nil, 0, fault.New(fault.Unsupported, fmt.Sprintf("edit boot entry %d: a quote in it has no end", entries),
				"change the boot configuration by hand")
		}
		changed := editLine(line, words, want)
		if n := commandLine(changed); n > maxCommandLine {
			return nil, 0, fault.New(fault.Unsupported,
				fmt.Sprintf("edit boot entry %d: its command line would have %d bytes, and a kernel reads %d", entries, n,
					maxCommandLine),
				"remove parameters that this node does not need")
		}
		edited = append(edited, changed...)
	}
	if entries == 0 {
		return nil, 0, fault.New(fault.Unsupported, "edit boot configuration: it has no boot entry",
			"check the EFI partition: this is not a configuration of COS's boot loader")
	}
	return edited, entries, nil
}

// word is where a word of a line is.
type word struct{ from, to int }

func (w word) of(line []byte) string { return string(line[w.from:w.to]) }

// split finds the words of a line. White space within double quotes parts no words.
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

// editLine changes the words of one entry. Of words that say the same a kernel takes the
// last, so that each is changed.
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
	if want.Elsewhere && !excluded { // right behind the kernel's name, which is a place that each entry has
		end := words[1].to
		out = slices.Concat(out[:end], []byte(" loadpin.exclude=kernel-module,firmware"), out[end:])
	}
	return out
}

// commandLine is the length of what a kernel gets of a line: the words behind its name, and
// before them BOOT_IMAGE=NAME, which GRUB adds.
func commandLine(line []byte) int {
	words := split(line)
	text := "BOOT_IMAGE=" + words[1].of(line)
	for _, w := range words[2:] {
		text += " " + w.of(line)
	}
	return len(text)
}
