// Package bootimage makes a bootable image for a virtual machine from the vmlinux of a COS build. It also checks
// whether a vmlinux belongs to a tree of kernel headers.
//
// The package never guesses. An unknown layout, or the version text of another COS build, is an error.
package bootimage

import (
	"bytes"
	"debug/elf"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Recipe is the version of this package's code, and a part of cache keys. Raise its number with any change after which
// Write makes another image from the same vmlinux.
const Recipe = "bootimage-1"

// entryCode is the assembled entry.S. A test assembles entry.S again and compares the result with entry.bin.
//
//go:embed entry.bin
var entryCode []byte

// The machine loads the entry code, boot_params and the page tables together at entryAt, below the segments of the
// kernel. All sizes are in bytes.
const (
	page      = 0x1000
	entryAt   = 1 << 20
	zeroPage  = 0x1000 // offset of boot_params from entryAt
	tables    = 0x2000 // offset of the page tables from entryAt
	entrySize = 0x8000 // size of entry code, boot_params and page tables

	maxMemory   = 512 << 20 // largest memory of a kernel
	maxSegments = 16
	lowMemory   = 1 << 30 // the segments of an x86 kernel end below this address
)

const hintImage = "check that vmlinux in the bucket is the unchanged output of the linker: an ELF file with program " +
	"segments"

func badVMLinux(format string, args ...any) error {
	return fault.New(fault.Unsupported, "read vmlinux: "+fmt.Sprintf(format, args...), hintImage)
}

// Write writes an image that qemu's -kernel accepts:
//
//   - for amd64 an ELF file with the kernel's segments and Prebake's entry code, whose address is in the PVH note. So
//     every kernel boots, even a kernel without a PVH entry of its own;
//   - for arm64 the kernel's Image, as objcopy -O binary makes it from vmlinux.
//
// If vmlinux is not a kernel for the architecture, the error has the kind [fault.Unsupported].
func Write(out *os.File, vmlinux io.ReaderAt, arch target.Arch) error {
	f, err := elf.NewFile(vmlinux)
	if err != nil {
		return badVMLinux("%v", err)
	}
	want := map[target.Arch]elf.Machine{target.AMD64: elf.EM_X86_64, target.ARM64: elf.EM_AARCH64}[arch]
	if f.Class != elf.ELFCLASS64 || f.Machine != want {
		return badVMLinux("the file has class %v for machine %v; want class %v for machine %v", f.Class, f.Machine,
			elf.ELFCLASS64, want)
	}
	var load []*elf.Prog
	low, high := ^uint64(0), uint64(0)
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD || p.Memsz == 0 {
			continue
		}
		if p.Filesz > p.Memsz || p.Memsz > maxMemory || p.Paddr+p.Memsz < p.Paddr {
			return badVMLinux("the segment at %#x has an impossible size: %d bytes, %d of them in the file",
				p.Paddr, p.Memsz, p.Filesz)
		}
		load, low, high = append(load, p), min(low, p.Paddr), max(high, p.Paddr+p.Memsz)
	}
	if len(load) == 0 || len(load) > maxSegments || high-low > maxMemory {
		return badVMLinux("the %d segments take %d bytes of memory; want 1 to %d segments of at most %d bytes in all",
			len(load), high-low, maxSegments, maxMemory)
	}
	if arch == target.ARM64 {
		return writeFlat(out, load, low, high)
	}
	if low < entryAt+entrySize || high > lowMemory || f.Entry < low || f.Entry >= high {
		return badVMLinux("the segments are from %#x to %#x, and the entry point is at %#x; want segments inside %#x to "+
			"%#x, and the entry point inside the segments", low, high, f.Entry, entryAt+entrySize, lowMemory)
	}
	return writeELF(out, f.Entry, load)
}

// Offsets in the header of an arm64 Image (Documentation/arm64/booting.rst). The linked kernel begins with the same
// header.
const (
	atImageSize  = 16 // 8 bytes: the memory that the kernel needs
	atImageMagic = 56
)

// writeFlat writes each segment at its place in memory. An incomplete segment is an error, because the kernel would
// start and then hang.
func writeFlat(out *os.File, load []*elf.Prog, low, high uint64) error {
	for _, p := range load {
		n, err := io.Copy(io.NewOffsetWriter(out, int64(p.Paddr-low)), p.Open()) //nolint:gosec // bounded by maxMemory
		if err != nil {
			return err
		}
		if uint64(n) != p.Filesz { //nolint:gosec // never negative
			return badVMLinux("the file ends inside the segment for address %#x: it has %d of the segment's %d bytes",
				p.Paddr, n, p.Filesz)
		}
	}
	head := make([]byte, 64)
	if _, err := out.ReadAt(head, 0); err != nil || string(head[atImageMagic:][:4]) != "ARM\x64" {
		return badVMLinux("the first segment does not begin with the header of an arm64 Image")
	}
	if size := binary.LittleEndian.Uint64(head[atImageSize:]); size < high-low || size > maxMemory {
		return badVMLinux("the Image header says that the kernel takes %d bytes of memory; the segments take %d bytes",
			size, high-low)
	}
	return nil
}

// entry returns the content of the memory at entryAt:
//
//   - the entry code, with the address of the kernel's own entry;
//   - the constants of boot_params (Documentation/x86/boot.rst);
//   - page tables that map 4 GiB one to one.
func entry(kernel uint64) []byte {
	le, b := binary.LittleEndian, make([]byte, entrySize)
	le.PutUint64(b[copy(b, entryCode)-8:], kernel)
	zero, t := b[zeroPage:], b[tables:]
	le.PutUint16(zero[0x1fe:], 0xaa55) // boot_flag
	copy(zero[0x202:], "HdrS")
	le.PutUint16(zero[0x206:], 0x20c) // protocol 2.12
	zero[0x210] = 0xff                // type_of_loader: a loader without a number
	zero[0x211] = 0x01                // LOADED_HIGH
	const present = 0x3               // and writable
	le.PutUint64(t, entryAt+tables+page|present)
	for i := range uint64(4) {
		le.PutUint64(t[page+8*i:], entryAt+tables+(2+i)*page|present)
	}
	for i := range uint64(2048) {
		le.PutUint64(t[2*page+8*i:], i<<21|present|0x80) // 2 MiB each
	}
	return b
}

func writeELF(out *os.File, kernel uint64, load []*elf.Prog) error {
	var head bytes.Buffer
	var failed error
	put := func(v any) { failed = errors.Join(failed, binary.Write(&head, binary.LittleEndian, v)) }
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: entryAt,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(load) + 2), //nolint:gosec // bounded by maxSegments
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	put(h)
	put(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: 64 + 56*uint64(h.Phnum), Filesz: 24, Memsz: 24, Align: 4})
	at := uint64(page)
	segment := func(to, size, memory uint64, from io.Reader) error {
		put(elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X), Off: at, Vaddr: to,
			Paddr: to, Filesz: size, Memsz: memory, Align: page})
		n, err := io.Copy(io.NewOffsetWriter(out, int64(at)), from) //nolint:gosec // bounded by maxMemory
		if err == nil && uint64(n) != size {                        //nolint:gosec // never negative
			err = io.ErrUnexpectedEOF
		}
		at = (at + size + page - 1) &^ (page - 1)
		return err
	}
	if err := segment(entryAt, entrySize, entrySize, bytes.NewReader(entry(kernel))); err != nil {
		return err
	}
	for _, p := range load {
		if err := segment(p.Paddr, p.Filesz, p.Memsz, p.Open()); err != nil {
			return err
		}
	}
	put([3]uint32{4, 8, 18}) // sizes of name and content; XEN_ELFNOTE_PHYS32_ENTRY
	put([4]byte{'X', 'e', 'n'})
	put(uint64(entryAt))
	if failed != nil {
		return failed
	}
	_, err := out.WriteAt(head.Bytes(), 0)
	return err
}
