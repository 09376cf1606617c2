// Package bootcfg changes the kernel command line in the boot configuration of a COS node. The next boot then loads
// modules that the kernel's maker did not sign. The package changes nothing else in the file, and never writes without
// a copy. It does not check Secure Boot: call [SecureBoot] before [Apply].
package bootcfg

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Want says which modules the kernel command line must allow.
type Want struct {
	// Unsigned allows modules that no key of the kernel signed: module.sig_enforce=0.
	Unsigned bool `json:"unsigned,omitempty"`
	// Elsewhere allows modules and firmware from other file systems than the root: loadpin.exclude=kernel-module,firmware.
	// Newer COS images set this parameter themselves.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// maxCommandLine is the longest command line of a kernel in bytes: COMMAND_LINE_SIZE of arch/x86 and arch/arm64, minus
// the terminating zero.
const maxCommandLine = 2047

// Edit adds the wanted parameters to each boot entry of a GRUB configuration, and returns the number of entries. A boot
// entry of COS is one line "linux FILE WORD…"; the words are the command line.
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
				"edit efi/boot/grub.cfg on the EFI partition by hand")
		}
		changed := editLine(line, words, want)
		if n := commandLine(changed); n > maxCommandLine {
			return nil, 0, fault.New(fault.Unsupported,
				fmt.Sprintf("edit boot entry %d: the command line would have %d bytes; a kernel reads at most %d bytes", entries, n,
					maxCommandLine),
				"remove kernel parameters that this node does not need from efi/boot/grub.cfg on the EFI partition")
		}
		edited = append(edited, changed...)
	}
	if entries == 0 {
		return nil, 0, fault.New(fault.Unsupported, "edit boot configuration: the file has no boot entry",
			"check the EFI partition: the file is not a configuration of COS's boot loader")
	}
	return edited, entries, nil
}

type word struct{ from, to int }

func (w word) of(line []byte) string { return string(line[w.from:w.to]) }

// split finds the words of a line. Double quotes protect white space.
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

// editLine changes the parameters of one boot entry. It changes every occurrence of a key, because the kernel uses the
// last one.
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
	if want.Elsewhere && !excluded { // insert it after the kernel's file name, which every entry has
		end := words[1].to
		out = slices.Concat(out[:end], []byte(" loadpin.exclude=kernel-module,firmware"), out[end:])
	}
	return out
}

// commandLine returns the length in bytes of the kernel's command line. It includes BOOT_IMAGE=NAME, which GRUB adds.
func commandLine(line []byte) int {
	words := split(line)
	text := "BOOT_IMAGE=" + words[1].of(line)
	for _, w := range words[2:] {
		text += " " + w.of(line)
	}
	return len(text)
}
