package modcheck

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
)

// Offsets of e_shoff and e_shnum in an ELF64 header, and the size of a section header, in bytes.
const (
	atShoff, atShnum = 0x28, 0x3c
	sectionHeader    = 64
)

// stampAlign is the alignment of a note in bytes.
const stampAlign = 4

// maxModule is the maximum size of a module for Stamp in bytes. The largest module has 250 MB before it is stripped.
const maxModule = 1 << 30

// Stamp copies a module to a new file and adds the stamp: an ELF note with the ABI fingerprint of the module's kernel.
// For a loaded module, the kernel shows the stamp below /sys/module/<name>/notes. Stamp refuses a signed module,
// because the signature would become invalid.
func Stamp(dst, src string, f target.Fingerprint) error {
	data, err := readModule(src)
	if err != nil {
		return fmt.Errorf("read module: %w", err) // an error of the disk says nothing about the module
	}
	if data, err = addStamp(data, f); err != nil {
		return fault.Wrap(fault.CheckFailed, fmt.Errorf("add the ABI fingerprint to %s: %w", src, err),
			"compile the module again")
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("create module with ABI fingerprint: %w", err)
	}
	_, err = out.Write(data)
	if err = errors.Join(err, out.Close()); err != nil {
		return fault.CacheDisk(fmt.Errorf("write module with ABI fingerprint: %w", err))
	}
	return nil
}

func readModule(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxModule {
		return nil, fault.Errorf(fault.CheckFailed, "the file %s has %d bytes; want at most %d bytes", path, info.Size(),
			maxModule)
	}
	return os.ReadFile(path)
}

// addStamp returns a copy of a relocatable ELF64 file with three parts appended: the note, a longer table of section
// names, and a longer table of section headers. Existing sections stay in place, so no index or offset in them changes.
func addStamp(data []byte, f target.Fingerprint) ([]byte, error) {
	if _, err := target.ParseFingerprint(string(f)); err != nil {
		return nil, err
	}
	if bytes.HasSuffix(data, []byte(modinfo.SignatureMagic)) {
		return nil, errors.New("the module is signed already")
	}
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	switch {
	case file.Class != elf.ELFCLASS64 || file.Data != elf.ELFDATA2LSB || file.Type != elf.ET_REL:
		return nil, errors.New("the file is not a module for a 64-bit little-endian machine")
	case file.Section(modinfo.StampSection) != nil:
		return nil, errors.New("the module has an ABI fingerprint already")
	}
	n := len(file.Sections)
	shoff := le.Uint64(data[atShoff:])
	// Refuse a section table outside the file. Also refuse a number of sections that, with one more, does not fit into
	// the header.
	if n == 0 || n != int(le.Uint16(data[atShnum:])) || n+1 >= int(elf.SHN_LORESERVE) || shoff > uint64(len(data)) ||
		uint64(len(data))-shoff < uint64(n*sectionHeader) {
		return nil, errors.New("the ELF section table is outside the file, or its size is wrong")
	}
	at := int(le.Uint16(data[atShnum+2:])) // e_shstrndx
	if at >= n {
		return nil, errors.New("the table of section names is missing")
	}
	names, err := file.Sections[at].Data()
	if err != nil {
		return nil, err
	}
	headers := bytes.Clone(data[shoff : shoff+uint64(n*sectionHeader)])

	out := bytes.Clone(data)
	place := func(b []byte, align int) (offset uint64) {
		out = append(out, make([]byte, -len(out)&(align-1))...)
		offset = uint64(len(out))
		out = append(out, b...)
		return offset
	}
	note := modinfo.AppendNote(nil, modinfo.StampOwner, modinfo.StampType, []byte(f))
	noteAt := place(note, stampAlign)
	nameAt := uint32(len(names))
	names = append(append(bytes.Clone(names), modinfo.StampSection...), 0)
	namesAt := place(names, 1)
	le.PutUint64(headers[at*sectionHeader+24:], namesAt)
	le.PutUint64(headers[at*sectionHeader+32:], uint64(len(names)))
	added := elf.Section64{Name: nameAt, Type: uint32(elf.SHT_NOTE), Flags: uint64(elf.SHF_ALLOC), Off: noteAt,
		Size: uint64(len(note)), Addralign: stampAlign}
	if headers, err = binary.Append(headers, le, added); err != nil {
		return nil, err
	}
	table := place(headers, 8)
	// Change the header last, because the function place may have moved the bytes of out to another array.
	le.PutUint64(out[atShoff:], table)
	le.PutUint16(out[atShnum:], uint16(n+1))
	return out, nil
}
