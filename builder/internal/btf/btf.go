// Package btf reads BTF, the description of types that kernels and modules contain for tracers. It extracts the BTF of
// a kernel from vmlinux and compares a module's BTF with it.
//
// The BTF of a module is split: the numbers of its types and strings continue where the kernel's numbers end. Under the
// BTF of another kernel, these numbers mean other types. A kernel with CONFIG_MODULE_ALLOW_BTF_MISMATCH ignores the BTF
// of this module. A kernel without it refuses the module.
//
// The package does not interpret types. It visits each type once and follows no reference to another type, so no input
// causes deep recursion or long run times.
package btf

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Section is the name of the ELF section with the types of a kernel or a module.
const Section = ".BTF"

// maxSize is the maximum size of the BTF in one file, in bytes. A distribution's kernel has 6 MB.
const maxSize = 64 << 20

// ErrNone means that a file has no BTF.
var ErrNone = errors.New("the file has no section " + Section)

// Read returns the BTF of an ELF file: its section .BTF. If this section is missing, the error is [ErrNone].
func Read(r io.ReaderAt) ([]byte, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, err
	}
	s := f.Section(Section)
	switch {
	case s == nil:
		return nil, ErrNone
	case s.Type != elf.SHT_PROGBITS || s.Flags&elf.SHF_COMPRESSED != 0:
		return nil, fmt.Errorf("section %s has type %v and flags %v; want type SHT_PROGBITS, not compressed", Section, s.Type,
			s.Flags)
	case s.FileSize > maxSize:
		return nil, fmt.Errorf("section %s has %d bytes; want at most %d bytes", Section, s.FileSize, maxSize)
	}
	return s.Data()
}

// Types has the facts about a kernel's types that are needed to check the BTF of a module.
type Types struct {
	count   uint32 // the highest type number; number 0 is void
	strings []byte
}

// Count returns the number of types.
func (t *Types) Count() int { return int(t.count) }

// Parse reads a kernel's own BTF. A module's BTF is checked by [Types.Check].
func Parse(data []byte) (*Types, error) { return parse(data, &Types{}) }

// Check returns an error if a module's BTF does not fit a kernel with these types.
func (t *Types) Check(module []byte) error {
	_, err := parse(module, t)
	return err
}

// The format of BTF is described in the kernel's Documentation/bpf/btf.rst.
const (
	magic      = 0xeb9f
	headerSize = 24 // bytes
	typeSize   = 12 // bytes of a type's head; the data of the type follows the head
)

// The kinds of types, from include/uapi/linux/btf.h.
const (
	kindInt       = 1
	kindPtr       = 2
	kindArray     = 3
	kindStruct    = 4
	kindUnion     = 5
	kindEnum      = 6
	kindFwd       = 7
	kindTypedef   = 8
	kindVolatile  = 9
	kindConst     = 10
	kindRestrict  = 11
	kindFunc      = 12
	kindFuncProto = 13
	kindVar       = 14
	kindDatasec   = 15
	kindFloat     = 16
	kindDeclTag   = 17
	kindTypeTag   = 18
	kindEnum64    = 19
)

// form describes the data of one kind of type. Every type begins with a head of three 4-byte words; the first is its
// name. The parts of a type are members, enumerators, arguments or variables.
type form struct {
	refers bool // the third word of the head is the number of a type
	tail   int  // bytes after the head of a type that has no parts
	each   int  // bytes after the head for each part of the type
	// name and types are the positions of the name and of the type numbers within a part or the tail, in words. If name
	// is -1, there is no name.
	name  int
	types []int
}

func formOf(kind uint32) (form, bool) {
	f := form{name: -1}
	switch kind {
	case kindInt:
		f.tail = 4
	case kindPtr, kindTypedef, kindVolatile, kindConst, kindRestrict, kindFunc, kindTypeTag:
		f.refers = true
	case kindArray:
		f.tail, f.types = 12, []int{0, 1}
	case kindStruct, kindUnion:
		f.each, f.name, f.types = 12, 0, []int{1}
	case kindEnum:
		f.each, f.name = 8, 0
	case kindFwd, kindFloat:
	case kindFuncProto:
		f.refers, f.each, f.name, f.types = true, 8, 0, []int{1}
	case kindVar, kindDeclTag:
		f.refers, f.tail = true, 4
	case kindDatasec:
		f.each, f.types = 12, []int{0}
	case kindEnum64:
		f.each, f.name = 12, 0
	default:
		return f, false
	}
	return f, true
}

// parse reads BTF whose type and string numbers continue those of base. It checks type numbers as strictly as the
// kernel, and names more strictly: a name must begin at the start of a string.
func parse(data []byte, base *Types) (*Types, error) {
	le := binary.LittleEndian
	if len(data) < headerSize || le.Uint16(data) != magic || data[2] != 1 {
		return nil, errors.New("the section .BTF does not have BTF of version 1 for a little-endian machine")
	}
	size := le.Uint32(data[4:])
	if size < headerSize || uint64(size) > uint64(len(data)) {
		return nil, fmt.Errorf("the BTF header says that the header has %d bytes; the whole section has %d bytes", size,
			len(data))
	}
	part := func(at int) ([]byte, error) {
		off, n := uint64(le.Uint32(data[at:])), uint64(le.Uint32(data[at+4:]))
		rest := data[size:]
		if off+n > uint64(len(rest)) {
			return nil, fmt.Errorf(
				"the BTF header names a table of %d bytes at offset %d, but the section ends inside this table", n, off)
		}
		return rest[off : off+n], nil
	}
	types, err := part(8)
	if err != nil {
		return nil, fmt.Errorf("read the table of types: %w", err)
	}
	own, err := part(16)
	if err != nil {
		return nil, fmt.Errorf("read the table of strings: %w", err)
	}
	switch n := len(own); {
	case n == 0 && len(base.strings) > 0: // the BTF of a module need not contain names of its own
	case n == 0 || own[n-1] != 0 || len(base.strings) == 0 && own[0] != 0:
		return nil, errors.New("the table of strings is missing, or does not begin and end with a zero byte")
	}
	t := &Types{count: base.count, strings: own}
	starts, err := t.scan(types)
	if err != nil {
		return nil, err
	}
	for i, at := range starts {
		if err := t.checkType(types[at:], base); err != nil {
			return nil, fmt.Errorf("check type %d: %w", base.count+uint32(i)+1, err) //nolint:gosec // at most maxSize/typeSize
		}
	}
	return t, nil
}

// scan returns the offset of each type, and adds the number of types to t.count.
func (t *Types) scan(types []byte) (starts []int, err error) {
	for at := 0; at < len(types); t.count++ {
		if len(types)-at < typeSize {
			return nil, fmt.Errorf("type %d is cut off by the end of the section", t.count+1)
		}
		starts = append(starts, at)
		kind, parts := head(types[at:])
		f, ok := formOf(kind)
		if !ok {
			return nil, fmt.Errorf("type %d has the unknown kind %d", t.count+1, kind)
		}
		if at += typeSize + f.tail + parts*f.each; at > len(types) {
			return nil, fmt.Errorf("type %d is cut off by the end of the section", t.count+1)
		}
	}
	return starts, nil
}

func head(typ []byte) (kind uint32, parts int) {
	info := binary.LittleEndian.Uint32(typ[4:])
	return info >> 24 & 0x1f, int(info & 0xffff)
}

// checkType returns an error if one type refers to a name or to a type number that does not exist.
func (t *Types) checkType(typ []byte, base *Types) error {
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(typ[4*i:]) }
	kind, parts := head(typ)
	f, _ := formOf(kind)
	if err := t.checkName(word(0), base); err != nil {
		return err
	}
	if f.refers {
		if err := t.checkID(word(2)); err != nil {
			return err
		}
	}
	step := f.each / 4
	if f.tail > 0 {
		parts = 1
	}
	for i := range parts {
		first := typeSize/4 + i*step
		if f.name >= 0 {
			if err := t.checkName(word(first+f.name), base); err != nil {
				return fmt.Errorf("check member %d: %w", i, err)
			}
		}
		for _, at := range f.types {
			if err := t.checkID(word(first + at)); err != nil {
				return fmt.Errorf("check member %d: %w", i, err)
			}
		}
	}
	return nil
}

func (t *Types) checkID(id uint32) error {
	if id > t.count {
		return fmt.Errorf("a reference names type %d, but the last type is %d", id, t.count)
	}
	return nil
}

// checkName returns an error if no string begins at an offset. The strings of t continue after the strings of base.
func (t *Types) checkName(offset uint32, base *Types) error {
	table, i := base.strings, uint64(offset)
	if i >= uint64(len(table)) {
		table, i = t.strings, i-uint64(len(table))
	}
	switch {
	case i >= uint64(len(table)):
		return fmt.Errorf("the name at offset %d is after the end of the table of strings", offset)
	case i > 0 && table[i-1] != 0:
		within := stringAt(table, int(i)) //nolint:gosec // within table
		return fmt.Errorf("the name at offset %d begins inside another name, %q", offset, within)
	}
	return nil
}

// stringAt returns the string that contains an offset.
func stringAt(table []byte, offset int) []byte {
	from := bytes.LastIndexByte(table[:offset], 0) + 1
	return table[from : from+bytes.IndexByte(table[from:], 0)]
}
