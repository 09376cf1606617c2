package modinfo_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"maps"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/modinfo"
)

// sample describes a small module. Method bytes makes an ELF file of it.
type sample struct {
	info     []string // .modinfo entries
	versions map[string]uint32
	extended map[string]uint32 // checksums in the two sections that Linux 6.14 added
	imports  []string
	weak     []string
	exports  map[string]uint32 // exports with their checksums in __kcrctab
	absolute map[string]uint32 // exports with their checksums in absolute symbols, as before Linux 5.19
	this     string            // name in .gnu.linkonce.this_module
	noTable  bool              // the file has no symbol table
	note     string            // content of the section with the build ID
	linux    string            // content of the section with the kernel's own notes
	stamp    string            // content of the section with the builder's stamp

	cutVersions int // number of bytes to cut off at the end of __versions
}

// goodModule returns a module nvidia that exports one symbol.
func goodModule() sample {
	return sample{
		info: []string{"version=535.261.03", "license=NVIDIA", "depends=", "retpoline=Y", "name=nvidia",
			"firmware=nvidia/535.261.03/gsp_tu10x.bin", "vermagic=6.1.0-50-cloud-amd64 SMP preempt mod_unload modversions "},
		imports:  []string{"_printk", "vmalloc"},
		weak:     []string{"maybe"},
		versions: map[string]uint32{"_printk": 0x1, "vmalloc": 0x2, "module_layout": 0x3},
		exports:  map[string]uint32{"nvidia_get_rm_ops": 0xabc},
	}
}

// sibling returns a module nvidia-uvm, which needs the symbol that goodModule exports.
func sibling() sample {
	return sample{
		info: []string{"license=Dual MIT/GPL", "depends=nvidia", "name=nvidia_uvm",
			"vermagic=6.1.0-50-cloud-amd64 SMP preempt mod_unload modversions "},
		imports:  []string{"_printk", "nvidia_get_rm_ops", "mmu_gpl"},
		versions: map[string]uint32{"_printk": 0x1, "nvidia_get_rm_ops": 0xabc, "mmu_gpl": 0x4, "module_layout": 0x3},
	}
}

const symversText = "0x00000001\t_printk\tvmlinux\tEXPORT_SYMBOL\t\n" +
	"0x00000002\tvmalloc\tvmlinux\tEXPORT_SYMBOL\t\n" +
	"0x00000003\tmodule_layout\tvmlinux\tEXPORT_SYMBOL\t\n" +
	"0x00000004\tmmu_gpl\tvmlinux\tEXPORT_SYMBOL_GPL\t\n" +
	"0x00000005\tdrm_open\tdrivers/gpu/drm/drm\tEXPORT_SYMBOL\t\n" +
	"0x00000006\tdma_buf_get\tvmlinux\tEXPORT_SYMBOL_GPL\tDMA_BUF\n"

// bytes returns the module as a relocatable ELF64 file.
func (s sample) bytes() []byte {
	le := binary.LittleEndian
	type sect struct {
		name    string
		kind    elf.SectionType
		data    []byte
		link    uint32
		entsize uint64
	}
	sects := []sect{{}}
	add := func(x sect) int { sects = append(sects, x); return len(sects) - 1 }
	if s.info != nil {
		add(sect{name: ".modinfo", kind: elf.SHT_PROGBITS, data: []byte(strings.Join(s.info, "\x00") + "\x00")})
	}
	if s.versions != nil {
		var data []byte
		for _, name := range slices.Sorted(maps.Keys(s.versions)) {
			record := make([]byte, 64)
			le.PutUint32(record, s.versions[name])
			copy(record[8:], name)
			data = append(data, record...)
		}
		add(sect{name: "__versions", kind: elf.SHT_PROGBITS, data: data[:len(data)-s.cutVersions]})
	}
	if s.extended != nil {
		var crcs, names []byte
		for _, name := range slices.Sorted(maps.Keys(s.extended)) {
			crcs = le.AppendUint32(crcs, s.extended[name])
			names = append(names, name+"\x00"...)
		}
		add(sect{name: "__version_ext_crcs", kind: elf.SHT_PROGBITS, data: crcs})
		add(sect{name: "__version_ext_names", kind: elf.SHT_PROGBITS, data: names})
	}
	if s.note != "" {
		add(sect{name: modinfo.BuildIDNote, kind: elf.SHT_NOTE, data: []byte(s.note)})
	}
	if s.linux != "" {
		add(sect{name: ".note.Linux", kind: elf.SHT_NOTE, data: []byte(s.linux)})
	}
	if s.stamp != "" {
		add(sect{name: modinfo.StampSection, kind: elf.SHT_NOTE, data: []byte(s.stamp)})
	}
	if s.this != "" {
		data := make([]byte, 0x380)
		copy(data[24:], s.this)
		add(sect{name: ".gnu.linkonce.this_module", kind: elf.SHT_PROGBITS, data: data})
	}
	var crcs []byte
	for _, name := range slices.Sorted(maps.Keys(s.exports)) {
		crcs = le.AppendUint32(crcs, s.exports[name])
	}
	kcrctab := add(sect{name: "__kcrctab", kind: elf.SHT_PROGBITS, data: crcs})

	symtab, strtab := make([]byte, elf.Sym64Size), []byte{0}
	symbol := func(name string, bind elf.SymBind, section elf.SectionIndex, value uint64) {
		symtab = le.AppendUint32(symtab, uint32(len(strtab)))
		symtab = append(symtab, elf.ST_INFO(bind, elf.STT_NOTYPE), 0)
		symtab = le.AppendUint16(symtab, uint16(section))
		symtab = le.AppendUint64(symtab, value)
		symtab = le.AppendUint64(symtab, 0)
		strtab = append(strtab, name+"\x00"...)
	}
	for i, name := range slices.Sorted(maps.Keys(s.exports)) {
		symbol("__crc_"+name, elf.STB_LOCAL, elf.SectionIndex(kcrctab), uint64(4*i))
		symbol("__ksymtab_"+name, elf.STB_LOCAL, 1, 0)
	}
	for name, crc := range s.absolute {
		symbol("__crc_"+name, elf.STB_GLOBAL, elf.SHN_ABS, uint64(crc))
		symbol("__ksymtab_"+name, elf.STB_LOCAL, 1, 0)
	}
	for _, name := range s.imports {
		symbol(name, elf.STB_GLOBAL, elf.SHN_UNDEF, 0)
	}
	for _, name := range s.weak {
		symbol(name, elf.STB_WEAK, elf.SHN_UNDEF, 0)
	}
	if !s.noTable {
		strings := add(sect{name: ".strtab", kind: elf.SHT_STRTAB, data: strtab})
		add(sect{name: ".symtab", kind: elf.SHT_SYMTAB, data: symtab, link: uint32(strings), entsize: elf.Sym64Size})
	}
	names := []byte{0}
	sects = append(sects, sect{name: ".shstrtab", kind: elf.SHT_STRTAB})
	nameAt := make([]uint32, len(sects))
	for i, x := range sects {
		nameAt[i] = uint32(len(names))
		names = append(names, x.name+"\x00"...)
	}
	nameAt[0] = 0
	sects[len(sects)-1].data = names

	var body bytes.Buffer
	const headerSize = 64
	headers := make([]elf.Section64, len(sects))
	for i, x := range sects {
		headers[i] = elf.Section64{Name: nameAt[i], Type: uint32(x.kind), Off: uint64(headerSize + body.Len()),
			Size: uint64(len(x.data)), Link: x.link, Entsize: x.entsize, Addralign: 1}
		body.Write(x.data)
	}
	var out bytes.Buffer
	header := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff: uint64(headerSize + body.Len()), Ehsize: headerSize, Shentsize: 64, Shnum: uint16(len(sects)),
		Shstrndx: uint16(len(sects) - 1)}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] =
		byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	for _, part := range []any{header, body.Bytes(), headers} {
		if err := binary.Write(&out, le, part); err != nil {
			panic(err)
		}
	}
	return out.Bytes()
}

// withSignature appends a signature in the format that the kernel's sign-file writes.
func withSignature(module []byte, signature string) []byte {
	out := append(bytes.Clone(module), signature...)
	out = append(out, 0, 0, 2, 0, 0, 0, 0, 0)
	out = binary.BigEndian.AppendUint32(out, uint32(len(signature)))
	return append(out, "~Module signature appended~\n"...)
}
