package modinfo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Export is a symbol that a kernel or one of its modules exports.
type Export struct {
	// CRC is the checksum of the symbol's type. It is 0 without MODVERSIONS.
	CRC uint32
	// Module is vmlinux, or the path of the module that exports the symbol.
	Module string
	// GPL is true if only modules with a compatible licence may use the symbol.
	GPL bool
	// Namespace is the namespace that a module must import to use the symbol. Most symbols have none: then it is "".
	Namespace string
}

// Symvers has the exports in a kernel's Module.symvers, by symbol name.
type Symvers map[string]Export

// HasCRCs reports whether the kernel has MODVERSIONS. Without MODVERSIONS, every checksum is 0.
func (s Symvers) HasCRCs() bool {
	for _, e := range s {
		if e.CRC != 0 {
			return true
		}
	}
	return false
}

// modules returns the names of all modules that export symbols, and vmlinux.
func (s Symvers) modules() map[string]bool {
	names := map[string]bool{}
	for _, e := range s {
		names[e.provider()] = true
	}
	return names
}

func (e Export) provider() string { return Canonical(path.Base(e.Module)) }

// Upper limits for Module.symvers. A distribution's kernel has 25,000 lines.
const (
	maxSymversLines = 1 << 20
	maxSymversLine  = 4 << 10
)

// ReadSymvers reads Module.symvers. Tabs separate the fields of a line: checksum, symbol, module, kind of export and,
// since Linux 5.4, a namespace.
func ReadSymvers(r io.Reader) (Symvers, error) {
	all := Symvers{}
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, maxSymversLine), maxSymversLine)
	n := 0
	for lines.Scan() {
		if n++; n > maxSymversLines {
			return nil, symversFault(n, errors.New("the file has too many lines"))
		}
		if lines.Text() == "" {
			continue
		}
		name, export, err := parseExport(lines.Text())
		if err != nil {
			return nil, symversFault(n, err)
		}
		if old, ok := all[name]; ok && old != export {
			return nil, symversFault(n, fmt.Errorf("symbol %s is exported twice, by %s and by %s", name, old.Module,
				export.Module))
		}
		all[name] = export
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return nil, symversFault(n+1, err)
	} else if err != nil {
		return nil, fmt.Errorf("read Module.symvers: %w", err)
	}
	return all, nil
}

func symversFault(line int, err error) error {
	return fault.Wrap(fault.Usage, fmt.Errorf("read Module.symvers: line %d: %w", line, err),
		"take Module.symvers from the headers of exactly this kernel; the file has lines such as "+
			"0x4c9d28b0<tab>phys_base<tab>vmlinux<tab>EXPORT_SYMBOL<tab>")
}

func parseExport(line string) (string, Export, error) {
	fields := strings.Split(line, "\t")
	if len(fields) < 4 || len(fields) > 5 {
		return "", Export{}, fmt.Errorf("the line has %d fields; want 4 or 5 fields", len(fields))
	}
	digits, ok := strings.CutPrefix(fields[0], "0x")
	crc, err := strconv.ParseUint(digits, 16, 32)
	if !ok || err != nil || digits[0] == '+' {
		return "", Export{}, fmt.Errorf("checksum %q: want 0x and 8 hex digits", fields[0])
	}
	e := Export{CRC: uint32(crc), Module: fields[2]}
	if len(fields) == 5 {
		e.Namespace = fields[4]
	}
	switch kind := fields[3]; kind {
	case "EXPORT_SYMBOL", "EXPORT_UNUSED_SYMBOL":
	case "EXPORT_SYMBOL_GPL", "EXPORT_SYMBOL_GPL_FUTURE", "EXPORT_UNUSED_SYMBOL_GPL":
		e.GPL = true
	default:
		// The first releases of Linux 5.4 and 5.5 wrote the namespace before the module, so this field may be the module.
		return "", Export{}, fmt.Errorf("kind of export %q: want EXPORT_SYMBOL or EXPORT_SYMBOL_GPL", kind)
	}
	if fields[1] == "" || fields[2] == "" {
		return "", Export{}, errors.New("the name of the symbol or of the module is empty")
	}
	return fields[1], e, nil
}
