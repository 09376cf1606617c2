package bootimage_test

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/bootimage"
	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
	"github.com/prebake/prebake/pkg/testkit/inputs"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// TestEntry checks that entry.bin, which the program embeds, is what as and ld make from entry.S.
func TestEntry(t *testing.T) {
	t.Parallel()
	installed.Programs(t, "as", "ld")
	inputs.Files(t, "entry.S") // as reads entry.S in another process, which Go's cache of test results does not notice
	object, flat := filepath.Join(t.TempDir(), "entry.o"), filepath.Join(t.TempDir(), "entry.bin")
	for _, argv := range [][]string{
		{"as", "--64", "-o", object, "entry.S"},
		{"ld", "-m", "elf_x86_64", "-Ttext=0x100000", "-e", "start", "--oformat", "binary", "-o", flat, object},
	} {
		if out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", argv, err, out)
		}
	}
	want, err := os.ReadFile(flat)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("entry.bin")
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("entry.bin is not what entry.S assembles to (%d and %d bytes), %v", len(got), len(want), err)
	}
}

// kernel links a small ELF file that stands for a vmlinux. The file contains the kernel's version banner
// (linux_banner), and its first segment is at the given address. By default an x86 kernel is linked to the physical
// address 0x1000000 (CONFIG_PHYSICAL_START).
func kernel(t testing.TB, banner string, at string) []byte {
	t.Helper()
	installed.Programs(t, "gcc", "ld")
	dir := t.TempDir()
	source := "const char linux_banner[] = \"" + banner +
		"\\n\";\nint data[3000] = {1};\nint _start(void) { return data[1] + linux_banner[0]; }\n"
	if err := os.WriteFile(filepath.Join(dir, "k.c"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, argv := range [][]string{
		{"gcc", "-ffreestanding", "-fno-pic", "-mcmodel=large", "-c", "-o", "k.o", "k.c"},
		{"ld", "--build-id=sha1", "-Ttext-segment=" + at, "-o", "vmlinux", "k.o"},
	} {
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", argv, err, out)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "vmlinux"))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func image(t testing.TB, vmlinux []byte, arch target.Arch) (*os.File, error) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() })
	return out, bootimage.Write(out, bytes.NewReader(vmlinux), arch)
}

const banner = "Linux version 6.6.105+ (builder@2832f747b46d) (clang) #1 SMP PREEMPT_DYNAMIC Sat Sep 27 08:48:45 " +
	"UTC 2025"

// TestWrite checks that the image has the kernel's segments, the entry code, and the PVH note with the entry's address.
func TestWrite(t *testing.T) {
	t.Parallel()
	vmlinux := kernel(t, banner, "0x1000000")
	out, err := image(t, vmlinux, target.AMD64)
	if err != nil {
		t.Fatal(err)
	}
	was, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		t.Fatal(err)
	}
	is, err := elf.NewFile(out)
	if err != nil {
		t.Fatal(err)
	}
	segments := func(f *elf.File) (all [][]byte) {
		for _, p := range f.Progs {
			if p.Type == elf.PT_LOAD && p.Paddr >= 0x1000000 {
				data := make([]byte, p.Filesz)
				if _, err := p.ReadAt(data, 0); err != nil {
					t.Fatal(err)
				}
				all = append(all, append(binary.LittleEndian.AppendUint64(nil, p.Paddr), data...))
			}
		}
		return all
	}
	if a, b := segments(was), segments(is); len(a) == 0 || !bytes.Equal(bytes.Join(a, nil), bytes.Join(b, nil)) {
		t.Errorf("%d segments became %d, or changed", len(a), len(b))
	}
	note := make([]byte, is.Progs[0].Filesz)
	if _, err := is.Progs[0].ReadAt(note, 0); err != nil || is.Progs[0].Type != elf.PT_NOTE ||
		!bytes.Contains(note, []byte("Xen\x00\x00\x00\x10\x00")) {
		t.Errorf("the first segment is %v with %x, %v", is.Progs[0].Type, note, err)
	}
	code := make([]byte, 208)
	if _, err := is.Progs[1].ReadAt(code, 0); err != nil || binary.LittleEndian.Uint64(code[200:]) != was.Entry {
		t.Errorf("the entry jumps to %x; want %x (%v)", code[200:], was.Entry, err)
	}
}

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	good := kernel(t, banner, "0x1000000")
	for name, vmlinux := range map[string][]byte{
		"nothing": nil, "text": []byte("#!/bin/sh\n"), "half": good[:len(good)/2], "too low": kernel(t, banner, "0x10000"),
		"too high": kernel(t, banner, "0x50000000"),
	} {
		if _, err := image(t, vmlinux, target.AMD64); fault.Of(err) != fault.Unsupported && !errors.Is(err, os.ErrClosed) ||
			err == nil {
			if name != "half" || err == nil { // the file "half" ends inside a segment, which is a read error
				t.Errorf("%s: Write = %v; want %v", name, err, fault.Unsupported)
			}
		}
	}
	if _, err := image(t, good, target.ARM64); fault.Of(err) != fault.Unsupported {
		t.Errorf("another processor's: Write = %v; want %v", err, fault.Unsupported)
	}
}

// part is one segment of an ELF file that stands for a vmlinux.
type part struct {
	at, memory uint64
	data       []byte
}

// linkSegments returns an ELF file for arm64 with the given segments in the given order.
func linkSegments(parts ...part) []byte {
	var out bytes.Buffer
	put := func(v any) { _ = binary.Write(&out, binary.LittleEndian, v) }
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_AARCH64), Version: 1, Entry: parts[0].at,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(parts)),
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	put(h)
	at := uint64(64 + 56*len(parts))
	for _, p := range parts {
		size := uint64(len(p.data))
		put(elf.Prog64{
			Type: uint32(elf.PT_LOAD), Off: at, Vaddr: p.at, Paddr: p.at, Filesz: size, Memsz: p.memory, Align: 1,
		})
		at += size
	}
	for _, p := range parts {
		out.Write(p.data)
	}
	return out.Bytes()
}

// arm64Head returns the beginning of an Image: a branch, the size of the memory that it needs, and the magic number.
// The format is from Documentation/arch/arm64/booting.rst in the kernel's source.
func arm64Head(memory uint64) []byte {
	b := make([]byte, 0x1000)
	copy(b, "\x01\x00\x00\x14")
	binary.LittleEndian.PutUint64(b[16:], memory)
	copy(b[56:], "ARM\x64")
	return b
}

// arm64Base is one of the addresses to which arm64 kernels are linked.
const arm64Base = 0xffff800008000000

// TestWriteFlat checks the Image, the flat file that a boot loader loads as it is. Each segment must be at its place,
// with zeros between segments. Memory without data in the ELF file, such as .bss, must not be in the Image: the kernel
// clears this memory itself.
func TestWriteFlat(t *testing.T) {
	t.Parallel()
	text, data := arm64Head(0x9000), bytes.Repeat([]byte("data"), 100)
	// The segments are not in the order of their addresses. The last segment has no data in the file.
	out, err := image(t, linkSegments(part{arm64Base + 0x3000, 0x400, data}, part{arm64Base, 0x1000, text},
		part{arm64Base + 0x4000, 0x4000, nil}), target.ARM64)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out.Name())
	want := slices.Concat(text, make([]byte, 0x2000), data)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("Write made %d bytes, %v; want these %d", len(got), err, len(want))
	}
	whole := linkSegments(part{arm64Base, 0x1000, text}, part{arm64Base + 0x3000, 0x400, data})
	for name, vmlinux := range map[string][]byte{
		"no magic":              linkSegments(part{arm64Base, 0x1000, make([]byte, 0x1000)}),
		"shorter than a header": linkSegments(part{arm64Base, 0x1000, text[:60]}),
		"something before it":   linkSegments(part{arm64Base - 0x1000, 0x1000, data}, part{arm64Base, 0x1000, text}),
		"takes less than it is": linkSegments(part{arm64Base, 0x1000, arm64Head(0xfff)}),
		"takes too much":        linkSegments(part{arm64Base, 0x1000, arm64Head(1 << 40)}),
		"too far apart":         linkSegments(part{arm64Base, 0x1000, text}, part{arm64Base + 1<<30, 0x400, data}),
		"past the end":          linkSegments(part{^uint64(0) - 0xfff, 0x2000, text}),
		"larger than memory":    linkSegments(part{arm64Base, 0x800, text}),
		"too many":              linkSegments(slices.Repeat([]part{{arm64Base, 0x1000, text}}, 17)...),
		"ends early":            whole[:len(whole)-1],
		"ends in the first":     whole[:0x800],
	} {
		if _, err := image(t, vmlinux, target.ARM64); fault.Of(err) != fault.Unsupported || fault.Hint(err) == "" {
			t.Errorf("%s: Write = %v (%v); want %v", name, err, fault.Of(err), fault.Unsupported)
		}
	}
}

// TestWriteFlatAsObjcopy compares the Image with objcopy's output for the same vmlinux. The kernel's own Makefile makes
// its Image with objcopy.
func TestWriteFlatAsObjcopy(t *testing.T) {
	t.Parallel()
	const prefix = "aarch64-linux-gnu-"
	dir := t.TempDir()
	for name, text := range map[string]string{
		"k.S": `	.section .head.text, "ax"
	.globl _text
_text:	b	start
	.zero	12
	.quad	_end - _text
	.zero	32
	.ascii	"ARM\x64"
	.zero	4
	.text
start:	wfi
	b	start
	.section .rodata, "a"
	.ascii	"Linux version"
	.data
	.fill	5000, 1, 0x55
	.bss
	.zero	70000
`,
		// As in arch/arm64/kernel/vmlinux.lds.S, each segment's physical address is its virtual address.
		"k.lds": `ENTRY(_text)
SECTIONS {
	. = 0xffff800008000000;
	.head.text : { *(.head.text) }
	. = ALIGN(0x10000);
	.text : { *(.text) }
	. = ALIGN(0x10000);
	.rodata : { *(.rodata) }
	. = ALIGN(0x10000);
	.data : { *(.data) }
	.bss : { *(.bss) }
	. = ALIGN(0x1000);
	_end = .;
}
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, argv := range [][]string{
		{"as", "-o", "k.o", "k.S"}, {"ld", "-T", "k.lds", "-o", "vmlinux", "k.o"},
		{"objcopy", "-O", "binary", "-S", "vmlinux", "Image"},
	} {
		installed.Program(t, prefix+argv[0])
		cmd := exec.CommandContext(t.Context(), prefix+argv[0], argv[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", argv, err, out)
		}
	}
	vmlinux, err := os.ReadFile(filepath.Join(dir, "vmlinux"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join(dir, "Image"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := image(t, vmlinux, target.ARM64)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(out.Name()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("Write made %d bytes, %v; objcopy makes others, %d", len(got), err, len(want))
	}
}

func FuzzWriteFlat(f *testing.F) {
	text := arm64Head(0x9000)
	f.Add(linkSegments(part{arm64Base, 0x1000, text}, part{arm64Base + 0x3000, 0x400, []byte("data")}))
	f.Add(linkSegments(part{^uint64(0) - 0xfff, 0xfff, text}))
	f.Add(linkSegments(part{arm64Base, 0x800, text}, part{arm64Base, 0x1000, text}))
	f.Fuzz(func(t *testing.T, vmlinux []byte) {
		out, err := image(t, vmlinux, target.ARM64)
		if err != nil {
			return
		}
		head := make([]byte, 64)
		info, err := out.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := out.ReadAt(head, 0); err != nil || string(head[56:60]) != "ARM\x64" {
			t.Errorf("Write made an image that begins %x, %v", head, err)
		}
		if takes := binary.LittleEndian.Uint64(head[16:]); uint64(info.Size()) > takes || takes > 512<<20 {
			t.Errorf("Write made an image of %d bytes that says it takes %d", info.Size(), takes)
		}
	})
}

func headers(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestCheck compares a vmlinux with kernel headers of the same kernel and of other kernels. The banner is one that a
// COS node printed.
func TestCheck(t *testing.T) {
	t.Parallel()
	facts, err := bootimage.ReadFacts(bytes.NewReader(kernel(t, banner, "0x1000000")))
	if err != nil {
		t.Fatal(err)
	}
	if len(facts.Banners) != 1 || facts.Banners[0] != banner || len(facts.BuildID) != 40 {
		t.Errorf("ReadFacts = %+v", facts)
	}
	const release, version, by = "include/generated/utsrelease.h", "include/generated/utsversion.h",
		"include/generated/compile.h"
	own := map[string]string{
		release:   "#define UTS_RELEASE \"6.6.105+\"\n",
		version:   "#define UTS_VERSION \"#1 SMP PREEMPT_DYNAMIC Sat Sep 27 08:48:45 UTC 2025\"\n",
		by:        "#define LINUX_COMPILE_BY \"builder\"\n#define LINUX_COMPILE_HOST \"2832f747b46d\"\n",
		".config": "CONFIG_A=y\n# CONFIG_B is not set\n",
	}
	for name, row := range map[string]struct {
		file, text string
		config     string
		want       fault.Kind
		other      bool
	}{
		"its own":               {},
		"its own configuration": {config: "CONFIG_A=y\n"},
		"another release":       {file: release, text: "#define UTS_RELEASE \"6.6.10\"\n", want: fault.Mismatch},
		"no release":            {file: release, text: "\n", want: fault.Unsupported},
		"another time": {file: version,
			text: "#define UTS_VERSION \"#1 SMP PREEMPT_DYNAMIC Sun Sep 28 08:48:45 UTC 2025\"\n", want: fault.Mismatch,
			other: true},
		"another host": {file: by,
			text: "#define LINUX_COMPILE_BY \"builder\"\n#define LINUX_COMPILE_HOST \"other\"\n", want: fault.Mismatch,
			other: true},
		"more than is read": {file: by, text: strings.Repeat("\n", 4<<20) + "#define LINUX_COMPILE_BY \"x\"\n",
			want: fault.Unsupported},
		"another configuration": {config: "CONFIG_A=m\n", want: fault.Mismatch},
		"an old kernel's own":   {file: version, text: "\n"},
		"configuration of another time": {file: version, text: "#define UTS_VERSION \"#2\"\n", config: "CONFIG_C=y\n",
			want: fault.Mismatch},
	} {
		files := map[string]string{}
		for name, text := range own {
			files[name] = text
		}
		if row.file != "" {
			files[row.file] = row.text
		}
		f := facts
		if row.config != "" {
			f.Config = []byte(row.config)
		}
		err := f.Check(headers(t, files))
		if row.want == 0 && err != nil || row.want != 0 &&
			(fault.Of(err) != row.want || errors.Is(err, bootimage.ErrOtherRun) != row.other || fault.Hint(err) == "") {
			t.Errorf("%s: Check = %v (%v); want %v, of another run: %t", name, err, fault.Of(err), row.want, row.other)
		}
	}
}

// TestConfigInside reads the configuration that CONFIG_IKCONFIG puts into a vmlinux. ReadFacts must refuse a
// configuration that is too large, because the first part alone would look like another kernel's configuration.
func TestConfigInside(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		text string
		good bool
	}{
		"small":     {"CONFIG_A=y\n", true},
		"the limit": {strings.Repeat("\n", kconfig.Max), true},
		"too large": {strings.Repeat("\n", kconfig.Max) + "CONFIG_A=y\n", false},
	} {
		var packed bytes.Buffer
		zw := gzip.NewWriter(&packed)
		if _, err := zw.Write([]byte(row.text)); err != nil {
			t.Fatal(err)
		}
		if err := zw.Close(); err != nil {
			t.Fatal(err)
		}
		f, err := bootimage.ReadFacts(bytes.NewReader(btfsample.ELF(".rodata",
			banner+"\x00IKCFG_ST"+packed.String()+"IKCFG_ED")))
		if row.good && (err != nil || string(f.Config) != row.text) || !row.good && fault.Of(err) != fault.Unsupported {
			t.Errorf("%s: ReadFacts = %d bytes of configuration, %v", name, len(f.Config), err)
		}
	}
}

func FuzzReadFacts(f *testing.F) {
	f.Add(kernel(f, banner, "0x1000000"))
	f.Fuzz(func(t *testing.T, vmlinux []byte) {
		facts, err := bootimage.ReadFacts(bytes.NewReader(vmlinux))
		if err == nil && (len(facts.Banners) == 0 || !strings.HasPrefix(facts.Banners[0], "Linux version ")) {
			t.Errorf("ReadFacts = %+v", facts)
		}
		_, _ = image(t, vmlinux, target.AMD64)
	})
}
