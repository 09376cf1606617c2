// Package modinfo reads the facts of a compiled kernel module (.ko) and of a kernel's Module.symvers. It checks whether
// the kernel would load the modules, but never loads or changes one. The files may be hostile, so every size in them is
// bounded.
package modinfo

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Module has the facts in a .ko file.
type Module struct {
	// Name is the name in /proc/modules: with underscores and without .ko.
	Name string
	// Version is MODULE_VERSION, such as 535.261.03. It may be empty.
	Version string
	// SrcVersion is a checksum over the sources. It is empty if the kernel build did not add one.
	SrcVersion string
	// Vermagic has the kernel release and the options that the kernel compares at load, without the blank at its end.
	Vermagic string
	// License is MODULE_LICENSE, such as NVIDIA or GPL v2.
	License string
	// Depends are the modules that must be loaded first. Their names are as modpost writes them, with - or _; see
	// [Canonical].
	Depends []string
	// Firmware has the names of firmware files that the module may request.
	Firmware []string
	// Namespaces are the symbol namespaces that the module imports.
	Namespaces []string
	// Imports are the undefined symbols, sorted.
	Imports []Symbol
	// Exports are the symbols that the module exports, sorted.
	Exports []string
	// ExportCRCs has the checksums of Exports, by symbol. It is empty without MODVERSIONS.
	ExportCRCs map[string]uint32
	// CRCs has the checksums that the module expects of its imports and of some other names, such as module_layout. It is
	// empty without MODVERSIONS.
	CRCs map[string]uint32
	// BuildID is the build ID that the linker made from the module's content. It may be empty.
	BuildID string
	// Salt is CONFIG_BUILD_SALT of the kernel that the module was built for. It may be empty.
	Salt string
	// MadeFor is the ABI fingerprint in the note that the builder adds (see [StampSection]). It is empty without such a
	// note.
	MadeFor string
	// StructSize is sizeof(struct module), in bytes, in the kernel that the module was built for. Linux compares it since
	// 6.4.
	StructSize uint64
	// Machine is the module's processor architecture.
	Machine elf.Machine
	// Signed is true if a signature is appended. The signature is not verified.
	Signed bool
	// Size is the length of the module in bytes, without an appended signature.
	Size int64
}

// Symbol is an undefined symbol. The kernel loads a module even if nothing exports a weak symbol.
type Symbol struct {
	Name string
	Weak bool
}

// Canonical returns a module's name as the kernel compares it: with _ for each -.
func Canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// Upper limits for a module file, in bytes or symbols. The largest real module is nvidia.ko of the open flavour: 250 MB
// as built, with 100,000 symbols.
const (
	maxFile    = 2 << 30
	maxSection = 64 << 20
	maxSymbols = 2 << 20
	maxModinfo = 1 << 20
)

// Read reads the facts of a module file of size bytes. Errors about its content are of kind fault.CheckFailed. An error
// of the reader, such as of a broken disk, gets no kind, because it says nothing about the module.
func Read(r io.ReaderAt, size int64) (*Module, error) {
	watched := &watchedReader{r: r}
	m, err := read(watched, size)
	if err != nil && watched.err != nil {
		return nil, fmt.Errorf("read module: %w", watched.err)
	}
	if err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read module: %w", err),
			"compile the module again: this file is damaged, or is not a module of a 64-bit Linux kernel")
	}
	return m, nil
}

// watchedReader keeps the first error of a reader, except io.EOF: a file that ends too early is damaged.
type watchedReader struct {
	r   io.ReaderAt
	err error
}

func (w *watchedReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := w.r.ReadAt(p, off)
	if err != nil && w.err == nil && !errors.Is(err, io.EOF) {
		w.err = err
	}
	return n, err
}

func read(r io.ReaderAt, size int64) (*Module, error) {
	if size <= 0 || size > maxFile {
		return nil, fmt.Errorf("the file has %d bytes; want 1 to %d bytes", size, int64(maxFile))
	}
	m := &Module{Size: size}
	signature, err := signatureSize(r, size)
	if err != nil {
		return nil, err
	}
	if signature > 0 {
		m.Signed, m.Size = true, size-signature
	}
	f, err := elf.NewFile(io.NewSectionReader(r, 0, m.Size))
	if err != nil {
		return nil, err
	}
	if f.Class != elf.ELFCLASS64 || f.Data != elf.ELFDATA2LSB || f.Type != elf.ET_REL {
		return nil, fmt.Errorf("the ELF file is of %v, %v and %v; want a relocatable file for a 64-bit little-endian machine",
			f.Class,
			f.Data, f.Type)
	}
	m.Machine = f.Machine
	if err := m.readInfo(f); err != nil {
		return nil, err
	}
	if err := m.readNotes(f); err != nil {
		return nil, err
	}
	if s := f.Section(".gnu.linkonce.this_module"); s != nil {
		m.StructSize = s.Size
	}
	if err := m.readVersions(f); err != nil {
		return nil, err
	}
	if err := m.readSymbols(f); err != nil {
		return nil, err
	}
	return m, nil
}

// section returns the content of a section, or nil if there is none.
func section(f *elf.File, name string, limit uint64) ([]byte, error) {
	s := f.Section(name)
	if s == nil || s.Type == elf.SHT_NOBITS {
		return nil, nil
	}
	switch {
	case s.Flags&elf.SHF_COMPRESSED != 0:
		return nil, fmt.Errorf("section %s is compressed", name)
	case s.Size > limit:
		return nil, fmt.Errorf("section %s has %d bytes; want at most %d bytes", name, s.Size, limit)
	}
	data, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("read section %s: %w", name, err)
	}
	return data, nil
}

func (m *Module) readInfo(f *elf.File) error {
	data, err := section(f, ".modinfo", maxModinfo)
	if err != nil {
		return err
	}
	if data == nil {
		return errors.New("the section .modinfo is missing")
	}
	info := parseInfo(data)
	m.Name = Canonical(first(info["name"]))
	if m.Name == "" {
		if m.Name, err = structName(f); err != nil {
			return err
		}
	}
	m.Version = first(info["version"])
	m.SrcVersion = first(info["srcversion"])
	m.Vermagic = strings.TrimSpace(first(info["vermagic"]))
	m.License = first(info["license"])
	m.Firmware = info["firmware"]
	m.Namespaces = info["import_ns"]
	for _, name := range strings.Split(first(info["depends"]), ",") {
		if name != "" {
			m.Depends = append(m.Depends, name)
		}
	}
	switch {
	case m.Name == "":
		return errors.New("the section .modinfo has no name of the module")
	case m.Vermagic == "":
		return errors.New("the section .modinfo has no vermagic")
	}
	// Callers use these texts in file names and labels, and print them to terminals.
	for _, name := range append([]string{m.Name}, m.Depends...) {
		if !namePattern.MatchString(name) {
			return fmt.Errorf("module name %q: want letters, digits, _ and -", name)
		}
	}
	for _, text := range []string{m.Version, m.SrcVersion, m.Vermagic, m.License} {
		if !textPattern.MatchString(text) {
			return fmt.Errorf("text %q in section .modinfo: want printable ASCII, at most 256 characters", text[:min(len(text),
				256)])
		}
	}
	return nil
}

var (
	namePattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,55}$`)
	textPattern = regexp.MustCompile(`^[ -~]{0,256}$`)
)

// parseInfo parses key=value strings, which are separated by zero bytes.
func parseInfo(data []byte) map[string][]string {
	info := map[string][]string{}
	for entry := range bytes.SplitSeq(data, []byte{0}) {
		if key, value, ok := bytes.Cut(entry, []byte("=")); ok && len(key) > 0 {
			info[string(key)] = append(info[string(key)], string(value))
		}
	}
	return info
}

func first(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

// structName reads the name in struct module, for modules without name= (before Linux 4.13). The name follows the state
// (an int with padding) and a list head.
func structName(f *elf.File) (string, error) {
	const offset, length = 24, 56
	data, err := section(f, ".gnu.linkonce.this_module", maxModinfo)
	if err != nil || len(data) < offset+length {
		return "", err
	}
	name, _, _ := bytes.Cut(data[offset:offset+length], []byte{0})
	return Canonical(string(name)), nil
}

// readVersions reads the checksums that the module expects. A record of the section __versions is a checksum of eight
// bytes and a name of 56. Since Linux 6.14, two other sections may hold the checksums, with longer names
// (CONFIG_EXTENDED_MODVERSIONS).
func (m *Module) readVersions(f *elf.File) error {
	const record, nameAt = 64, 8
	m.CRCs = map[string]uint32{}
	data, err := section(f, "__versions", maxSection)
	if err != nil {
		return err
	}
	if len(data)%record != 0 {
		return fmt.Errorf("section __versions has %d bytes; want a multiple of %d bytes", len(data), record)
	}
	for ; len(data) > 0; data = data[record:] {
		name, _, ended := bytes.Cut(data[nameAt:record], []byte{0})
		if !ended || len(name) == 0 {
			return errors.New("section __versions has a name that is empty or has no end")
		}
		m.CRCs[string(name)] = binary.LittleEndian.Uint32(data)
	}
	crcs, err := section(f, "__version_ext_crcs", maxSection)
	if err != nil {
		return err
	}
	names, err := section(f, "__version_ext_names", maxSection)
	if err != nil {
		return err
	}
	for ; len(crcs) >= 4; crcs = crcs[4:] {
		name, rest, ended := bytes.Cut(names, []byte{0})
		if !ended || len(name) == 0 {
			return errors.New("section __version_ext_names has fewer names than there are checksums")
		}
		m.CRCs[string(name)], names = binary.LittleEndian.Uint32(crcs), rest
	}
	return nil
}

func (m *Module) readSymbols(f *elf.File) error {
	m.ExportCRCs = map[string]uint32{}
	table := f.SectionByType(elf.SHT_SYMTAB)
	if table == nil {
		return errors.New("the symbol table is missing")
	}
	if table.Size/elf.Sym64Size > maxSymbols || int(table.Link) >= len(f.Sections) ||
		f.Sections[table.Link].Size > maxSection ||
		(table.Flags|f.Sections[table.Link].Flags)&elf.SHF_COMPRESSED != 0 {
		return errors.New("the symbol table is compressed, is too large, or has no string table")
	}
	symbols, err := f.Symbols()
	if err != nil {
		return fmt.Errorf("read the symbol table: %w", err)
	}
	crcTables := map[elf.SectionIndex][]byte{}
	for i, s := range f.Sections {
		if s.Name == "__kcrctab" || s.Name == "__kcrctab_gpl" {
			if s.Size > maxSection || s.Type == elf.SHT_NOBITS || s.Flags&elf.SHF_COMPRESSED != 0 {
				return fmt.Errorf("section %s is too large, compressed, or without content", s.Name)
			}
			if crcTables[elf.SectionIndex(i)], err = s.Data(); err != nil {
				return fmt.Errorf("read section %s: %w", s.Name, err)
			}
		}
	}
	exports := map[string]bool{}
	for _, s := range symbols {
		bind := elf.ST_BIND(s.Info)
		if s.Section == elf.SHN_UNDEF {
			if s.Name != "" && (bind == elf.STB_GLOBAL || bind == elf.STB_WEAK) {
				m.Imports = append(m.Imports, Symbol{Name: s.Name, Weak: bind == elf.STB_WEAK})
			}
			continue
		}
		if name, ok := strings.CutPrefix(s.Name, "__ksymtab_"); ok && name != "" {
			exports[name] = true
		}
		name, ok := strings.CutPrefix(s.Name, "__crc_")
		if !ok || name == "" {
			continue
		}
		if s.Section == elf.SHN_ABS { // before Linux 5.19 the symbol's value was the checksum
			m.ExportCRCs[name] = uint32(s.Value)
		} else if crcs, ok := crcTables[s.Section]; ok && s.Value+4 > s.Value && s.Value+4 <= uint64(len(crcs)) {
			m.ExportCRCs[name] = binary.LittleEndian.Uint32(crcs[s.Value:])
		}
	}
	for name := range exports {
		m.Exports = append(m.Exports, name)
	}
	slices.Sort(m.Exports)
	// Not slices.SortFunc, which adds 12 KB to each program.
	sort.Slice(m.Imports, func(i, j int) bool { return m.Imports[i].Name < m.Imports[j].Name })
	m.Imports = slices.CompactFunc(m.Imports, func(a, b Symbol) bool { return a.Name == b.Name })
	return nil
}

// SignatureMagic is the end of a signed module. The twelve bytes before it are the kernel's struct module_signature.
// Its third byte is the kind of signature (2 is PKCS #7). Its last four bytes are the signature's length in bytes,
// big-endian.
const SignatureMagic = "~Module signature appended~\n"

// signatureSize returns the number of bytes of the appended signature with its trailer, or 0 if there is none.
func signatureSize(r io.ReaderAt, size int64) (int64, error) {
	const info = 12
	trailer := make([]byte, info+len(SignatureMagic))
	if size < int64(len(trailer)) {
		return 0, nil
	}
	if _, err := r.ReadAt(trailer, size-int64(len(trailer))); err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read the trailer of the signature: %w", err)
	}
	if string(trailer[info:]) != SignatureMagic {
		return 0, nil
	}
	length := int64(binary.BigEndian.Uint32(trailer[info-4:])) + int64(len(trailer))
	if trailer[2] != 2 || length >= size {
		return 0, errors.New("the trailer says that the signature is not PKCS #7, or is longer than the file")
	}
	return length, nil
}
