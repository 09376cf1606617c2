// Package btf reads BTF, the description of types that a kernel and its modules
// carry for tracers: it takes a kernel's out of vmlinux, and compares a module's with it. A module's is split: it goes
// on counting types and strings where the kernel's ends, so that with another kernel's it means something else, and
// kernels refuse it or, where they are configured so, load the module without.
//
// It refuses to interpret: it walks over the types once and follows none, so
// that no input makes it deep or slow. What a type says is the kernel's and
// the tracer's business.
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

// maxSize bounds one description. A distribution's kernel with all that it has
// built in has 6 MB.
const maxSize = 64 << 20

// ErrNone says that a file has no BTF.
var ErrNone = errors.New("it has no section " + Section)

// Read returns the BTF of an ELF file, which it reads no more of than the
// headers and that section. Without one it is [ErrNone].
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
		return nil, fmt.Errorf("section %s: %v, flags %v; want plain content", Section, s.Type, s.Flags)
	case s.FileSize > maxSize:
		return nil, fmt.Errorf("section %s: %d bytes are more than %d", Section, s.FileSize, maxSize)
	}
	return s.Data()
}

// Types are those of a kernel, as far as a module's are checked against them.
type Types struct {
	count   uint32 // the highest number of a type; 0 means void
	strings []byte
}

// Count is how many types there are.
func (t *Types) Count() int { return int(t.count) }

// Parse reads a kernel's own BTF.
func Parse(data []byte) (*Types, error) { return parse(data, &Types{}) }

// Check reports what makes a module's BTF unfit for a kernel of these types.
func (t *Types) Check(module []byte) error {
	_, err := parse(module, t)
	return err
}

const (
	magic      = 0xeb9f
	headerSize = 24
	typeSize   = 12 // of a type without what follows it
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

// form says what a kind of type has beside its name.
type form struct {
	refers bool // the third word of the head is a type
	tail   int  // bytes that follow once
	each   int  // bytes that follow for each of the type's parts
	// Where a part, or the tail, has a name and types, in words; -1 is nowhere.
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

// parse reads BTF that goes on where base ends. It is as strict as the kernel
// about numbers, and stricter about names: each has to be a whole string.
func parse(data []byte, base *Types) (*Types, error) {
	le := binary.LittleEndian
	if len(data) < headerSize || le.Uint16(data) != magic || data[2] != 1 {
		return nil, errors.New("no BTF of version 1 for a little-endian machine")
	}
	size := le.Uint32(data[4:])
	if size < headerSize || uint64(size) > uint64(len(data)) {
		return nil, fmt.Errorf("the header has %d bytes, the section %d", size, len(data))
	}
	part := func(at int) ([]byte, error) {
		off, n := uint64(le.Uint32(data[at:])), uint64(le.Uint32(data[at+4:]))
		rest := data[size:]
		if off+n > uint64(len(rest)) {
			return nil, fmt.Errorf("%d bytes at offset %d are missing", n, off)
		}
		return rest[off : off+n], nil
	}
	types, err := part(8)
	if err != nil {
		return nil, fmt.Errorf("types: %w", err)
	}
	own, err := part(16)
	if err != nil {
		return nil, fmt.Errorf("strings: %w", err)
	}
	switch n := len(own); {
	case n == 0 && len(base.strings) > 0: // a module may have no name of its own
	case n == 0 || own[n-1] != 0 || len(base.strings) == 0 && own[0] != 0:
		return nil, errors.New("strings: no table of strings")
	}
	t := &Types{count: base.count, strings: own}
	starts, err := t.scan(types)
	if err != nil {
		return nil, err
	}
	for i, at := range starts {
		if err := t.checkType(types[at:], base); err != nil {
			return nil, fmt.Errorf("type %d: %w", base.count+uint32(i)+1, err) //nolint:gosec // at most maxSize/typeSize
		}
	}
	return t, nil
}

// scan finds where each type begins, and counts them.
func (t *Types) scan(types []byte) (starts []int, err error) {
	for at := 0; at < len(types); t.count++ {
		if len(types)-at < typeSize {
			return nil, fmt.Errorf("type %d: cut off", t.count+1)
		}
		starts = append(starts, at)
		kind, parts := head(types[at:])
		f, ok := formOf(kind)
		if !ok {
			return nil, fmt.Errorf("type %d: kind %d is not known", t.count+1, kind)
		}
		if at += typeSize + f.tail + parts*f.each; at > len(types) {
			return nil, fmt.Errorf("type %d: cut off", t.count+1)
		}
	}
	return starts, nil
}

func head(typ []byte) (kind uint32, parts int) {
	info := binary.LittleEndian.Uint32(typ[4:])
	return info >> 24 & 0x1f, int(info & 0xffff)
}

// checkType checks the names and types that one type refers to.
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
				return fmt.Errorf("part %d: %w", i, err)
			}
		}
		for _, at := range f.types {
			if err := t.checkID(word(first + at)); err != nil {
				return fmt.Errorf("part %d: %w", i, err)
			}
		}
	}
	return nil
}

func (t *Types) checkID(id uint32) error {
	if id > t.count {
		return fmt.Errorf("it refers to type %d of %d", id, t.count)
	}
	return nil
}

// checkName refuses a name that does not begin where a string begins, in the kernel's
// table or, for offsets beyond its end, in that of t.
func (t *Types) checkName(at uint32, base *Types) error {
	table, i := base.strings, uint64(at)
	if i >= uint64(len(table)) {
		table, i = t.strings, i-uint64(len(table))
	}
	switch {
	case i >= uint64(len(table)):
		return fmt.Errorf("check name at offset %d: it is after the end of the strings", at)
	case i > 0 && table[i-1] != 0:
		within := whole(table, int(i)) //nolint:gosec // within table
		return fmt.Errorf("check name at offset %d: it begins within another, %q", at, within)
	}
	return nil
}

// whole is the string around an offset.
func whole(table []byte, at int) []byte {
	from := bytes.LastIndexByte(table[:at], 0) + 1
	return table[from : from+bytes.IndexByte(table[from:], 0)]
}
