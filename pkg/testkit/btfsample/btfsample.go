// Package btfsample makes small samples of BTF (BPF Type Format), the kernel's format for the description of types, and
// ELF files that contain BTF. Only test files import it.
package btfsample

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// Kernel returns the BTF of a kernel. For each name it has an integer type of that name, and a pointer to the type.
func Kernel(names ...string) []byte { return describe(0, 1, names) }

// Module returns the BTF of a module with types of the given names. It continues the BTF of Kernel(kernel...).
func Module(kernel []string, names ...string) []byte {
	size := uint32(1)
	for _, name := range kernel {
		size += uint32(len(name)) + 1 //nolint:gosec // the names in tests are short
	}
	return describe(2*uint32(len(kernel)), size, names) //nolint:gosec // as above
}

// describe returns BTF whose type ids begin after lastID. If lastID is not 0, its string offsets begin at firstString.
func describe(lastID, firstString uint32, names []string) []byte {
	var types []uint32
	var text []byte
	if lastID == 0 {
		text = []byte{0}
		firstString = 0
	}
	for _, name := range names {
		at := firstString + uint32(len(text)) //nolint:gosec // the names in tests are short
		types = append(types, at, 1<<24, 4, 32)
		lastID++
		types = append(types, 0, 2<<24, lastID)
		lastID++
		text = append(append(text, name...), 0)
	}
	size := uint32(4 * len(types)) //nolint:gosec // as above
	var out bytes.Buffer
	put(&out, []uint32{0x0001eb9f, 24, 0, size, size, uint32(len(text))}, types, text) //nolint:gosec // as above
	return out.Bytes()
}

// ELF returns an ELF file that has only sections. The arguments are, in turn, the name of a section and its content.
func ELF(sections ...string) []byte {
	names, body := []byte{0}, []byte{}
	headers := []elf.Section64{{}}
	add := func(name string, kind elf.SectionType, content []byte) {
		headers = append(headers, elf.Section64{Name: uint32(len(names)), Type: uint32(kind), Off: uint64(64 + len(body)), Size: uint64(len(content)), Addralign: 1}) //nolint:gosec // as above
		names = append(append(names, name...), 0)
		body = append(body, content...)
	}
	for i := 0; i+1 < len(sections); i += 2 {
		add(sections[i], elf.SHT_PROGBITS, []byte(sections[i+1]))
	}
	add(".shstrtab", elf.SHT_STRTAB, append(bytes.Clone(names), ".shstrtab\x00"...))
	header := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff:  uint64(64 + len(body)),
		Ehsize: 64, Shentsize: 64, Shnum: uint16(len(headers)), Shstrndx: uint16(len(headers) - 1)} //nolint:gosec // as above
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] =
		byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var out bytes.Buffer
	put(&out, header, body, headers)
	return out.Bytes()
}

func put(out *bytes.Buffer, parts ...any) {
	for _, part := range parts {
		if err := binary.Write(out, binary.LittleEndian, part); err != nil {
			panic(err)
		}
	}
}
