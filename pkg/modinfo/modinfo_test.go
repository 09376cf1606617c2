package modinfo_test

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
)

func read(t *testing.T, data []byte) *modinfo.Module {
	t.Helper()
	m, err := modinfo.Read(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestRead(t *testing.T) {
	t.Parallel()
	want := &modinfo.Module{
		Name: "nvidia", Version: "535.261.03", License: "NVIDIA",
		Vermagic:   "6.1.0-50-cloud-amd64 SMP preempt mod_unload modversions",
		Firmware:   []string{"nvidia/535.261.03/gsp_tu10x.bin"},
		Imports:    []modinfo.Symbol{{Name: "_printk"}, {Name: "maybe", Weak: true}, {Name: "vmalloc"}},
		Exports:    []string{"nvidia_get_rm_ops"},
		ExportCRCs: map[string]uint32{"nvidia_get_rm_ops": 0xabc},
		CRCs:       map[string]uint32{"_printk": 1, "vmalloc": 2, "module_layout": 3},
		Machine:    elf.EM_X86_64,
	}
	plain := goodModule().bytes()
	rows := []struct {
		name string
		data []byte
		edit func(*modinfo.Module)
	}{
		{"plain", plain, func(m *modinfo.Module) {}},
		{"signed", withSignature(plain, "signature"), func(m *modinfo.Module) { m.Signed = true }},
		{"dash in the name", goodBytes(func(s *sample) { s.info[4] = "name=nvidia-x" }),
			func(m *modinfo.Module) { m.Name = "nvidia_x" }},
		{"name in the struct only", goodBytes(func(s *sample) { s.info, s.this = slices.Delete(s.info, 4, 5), "nvidia" }),
			func(m *modinfo.Module) { m.StructSize = 0x380 }},
		{"two dependencies", goodBytes(func(s *sample) { s.info[2] = "depends=drm,i2c-core" }),
			func(m *modinfo.Module) { m.Depends = []string{"drm", "i2c-core"} }},
		{"namespaces", goodBytes(func(s *sample) { s.info = append(s.info, "import_ns=DMA_BUF", "import_ns=VFIO") }),
			func(m *modinfo.Module) { m.Namespaces = []string{"DMA_BUF", "VFIO"} }},
		{"no MODVERSIONS", goodBytes(func(s *sample) { s.versions = nil }), func(m *modinfo.Module) { m.CRCs = nil }},
		{"extended versions", goodBytes(func(s *sample) { s.extended, s.versions = s.versions, nil }),
			func(m *modinfo.Module) {}},
		{"build id", goodBytes(func(s *sample) {
			s.note = "\x04\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd"
		}),
			func(m *modinfo.Module) { m.BuildID = "abcd" }},
		{"build id cut short", goodBytes(func(s *sample) {
			s.note = "\x04\x00\x00\x00\x03\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd"
		}), func(m *modinfo.Module) {}},
		{"stamp and salt", goodBytes(func(s *sample) {
			s.linux = string(modinfo.AppendNote(modinfo.AppendNote(nil, "Linux", 0x101, make([]byte, 4)), "Linux", 0x100,
				[]byte("6.1.0-50\x00")))
			s.stamp = string(modinfo.AppendNote(nil, modinfo.StampOwner, modinfo.StampType, []byte("sha256:ab")))
		}), func(m *modinfo.Module) { m.Salt, m.MadeFor = "6.1.0-50", "sha256:ab" }},
		{"absolute checksums", goodBytes(func(s *sample) { s.absolute, s.exports = s.exports, nil }),
			func(m *modinfo.Module) {}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			got, want := read(t, row.data), *want
			want.Size = int64(len(row.data))
			if got.Signed {
				want.Size = int64(len(plain))
			}
			row.edit(&want)
			if diff := cmp.Diff(&want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("Read differs (-want +got):\n%s", diff)
			}
		})
	}
}

// goodBytes applies an edit to goodModule, and returns the module's file.
func goodBytes(edit func(*sample)) []byte {
	s := goodModule()
	edit(&s)
	return s.bytes()
}

func TestReadRefuses(t *testing.T) {
	t.Parallel()
	plain := goodModule().bytes()
	rows := []struct {
		name, want string
		data       []byte
	}{
		{"empty", "0 bytes", nil},
		{"no ELF", "bad magic", []byte("#!/bin/sh\n" + strings.Repeat("# text\n", 20))},
		{"cut short", "", plain[:len(plain)/2]},
		{"32 bits", "", append([]byte("\x7fELF\x01"), plain[5:]...)},
		{"program, not module", "relocatable", slices.Concat(plain[:16], []byte{2}, plain[17:])},
		{"no modinfo", ".modinfo is missing", goodBytes(func(s *sample) { s.info = nil })},
		{"no name", "has no name", goodBytes(func(s *sample) { s.info = slices.Delete(s.info, 4, 5) })},
		{"no vermagic", "has no vermagic", goodBytes(func(s *sample) { s.info = s.info[:5] })},
		{"path as a name", "module name", goodBytes(func(s *sample) { s.info[4] = "name=../nvidia" })},
		{"path as a dependency", "module name", goodBytes(func(s *sample) { s.info[2] = "depends=a,/b" })},
		{"control characters", "printable", goodBytes(func(s *sample) { s.info[0] = "version=\x1b[2J" })},
		{"no symbols", "the symbol table is missing", goodBytes(func(s *sample) { s.noTable = true })},
		{"versions of a wrong size", "a multiple of", goodBytes(func(s *sample) { s.cutVersions = 1 })},
		{"version without a name", "a name that is empty or has no end",
			goodBytes(func(s *sample) { s.versions = map[string]uint32{"": 1} })},
		{"version with a name too long", "a name that is empty or has no end",
			goodBytes(func(s *sample) { s.versions = map[string]uint32{strings.Repeat("x", 56): 1} })},
		{"signature longer than the file", "signature",
			[]byte("\x00\x00\x02\x00\x00\x00\x00\x00\x7f\xff\xff\xff" + modinfo.SignatureMagic)},
		{"signature of another kind", "signature",
			bytes.Replace(withSignature(plain, "s"), []byte{0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1},
				[]byte{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 1)},
	}
	for _, row := range rows {
		m, err := modinfo.Read(bytes.NewReader(row.data), int64(len(row.data)))
		if !fault.Is(err, fault.CheckFailed) || fault.Hint(err) == "" || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: Read = %v, %v; want check-failed with %q and a hint", row.name, m, err, row.want)
		}
	}
}

// brokenReader fails if a read touches the byte at offset at, as a disk with a broken sector does.
type brokenReader struct {
	r  io.ReaderAt
	at int64
}

func (b brokenReader) ReadAt(p []byte, off int64) (int, error) {
	if off <= b.at && b.at < off+int64(len(p)) {
		return 0, &fs.PathError{Op: "read", Path: "nvidia.ko", Err: syscall.EIO}
	}
	return b.r.ReadAt(p, off)
}

// TestReadBrokenDisk checks that an error of the disk does not count as a failed check, because it says nothing about
// the module.
func TestReadBrokenDisk(t *testing.T) {
	t.Parallel()
	plain := goodModule().bytes()
	size := int64(len(plain))
	for _, at := range []int64{0, int64(bytes.Index(plain, []byte("vermagic="))), size - 1} {
		m, err := modinfo.Read(brokenReader{bytes.NewReader(plain), at}, size)
		if !errors.Is(err, syscall.EIO) || !fault.Is(err, fault.Internal) {
			t.Errorf("a disk that is broken at byte %d: Read = %v, %v (%v); want its error, of no kind", at, m, err,
				fault.Of(err))
		}
	}
	// io.EOF is no error of the disk: the file is shorter than its size says, so the check fails.
	if _, err := modinfo.Read(bytes.NewReader(plain[:size/2]), size); !fault.Is(err, fault.CheckFailed) {
		t.Errorf("a file that was cut: Read = %v; want check-failed", err)
	}
}

func TestSymvers(t *testing.T) {
	t.Parallel()
	got, err := modinfo.ReadSymvers(strings.NewReader(symversText + "\n0x00000000\told\tvmlinux\tEXPORT_SYMBOL\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := modinfo.Symvers{
		"_printk": {CRC: 1, Module: "vmlinux"}, "vmalloc": {CRC: 2, Module: "vmlinux"},
		"module_layout": {CRC: 3, Module: "vmlinux"},
		"mmu_gpl":       {CRC: 4, Module: "vmlinux", GPL: true}, "drm_open": {CRC: 5, Module: "drivers/gpu/drm/drm"},
		"dma_buf_get": {CRC: 6, Module: "vmlinux", GPL: true, Namespace: "DMA_BUF"}, "old": {Module: "vmlinux"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ReadSymvers differs (-want +got):\n%s", diff)
	}
	if !got.HasCRCs() || (modinfo.Symvers{"old": got["old"]}).HasCRCs() {
		t.Error("HasCRCs is wrong")
	}
	for name, text := range map[string]string{
		"fields":     "0x1\tname\tvmlinux",
		"checksum":   "12345678\tname\tvmlinux\tEXPORT_SYMBOL\t",
		"sign":       "0x+1\tname\tvmlinux\tEXPORT_SYMBOL\t",
		"too large":  "0x123456789\tname\tvmlinux\tEXPORT_SYMBOL\t",
		"no digits":  "0x\tname\tvmlinux\tEXPORT_SYMBOL\t",
		"kind":       "0x00000001\tname\tvmlinux\tIMPORT\t",
		"no name":    "0x00000001\t\tvmlinux\tEXPORT_SYMBOL\t",
		"twice":      "0x00000001\ta\tvmlinux\tEXPORT_SYMBOL\t\n0x00000002\ta\tvmlinux\tEXPORT_SYMBOL\t",
		"long line":  strings.Repeat("x", 5000),
		"not tabbed": "0x00000001 a vmlinux EXPORT_SYMBOL",
	} {
		if got, err := modinfo.ReadSymvers(strings.NewReader(text)); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("%s: ReadSymvers = %v, %v; want usage with a hint", name, got, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(goodModule().bytes())
	f.Add(sibling().bytes())
	f.Add(withSignature(goodModule().bytes(), "signature"))
	f.Add(goodBytes(func(s *sample) { s.extended, s.absolute = s.versions, s.exports }))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := modinfo.Read(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		if m.Name == "" || m.Vermagic == "" || m.Size > int64(len(data)) || strings.Contains(m.Name, "-") {
			t.Errorf("Read accepted %+v", m)
		}
		// Check must end for every module that Read accepts.
		_ = modinfo.Check([]*modinfo.Module{m}, modinfo.Rules{Release: "6.1", ModVersions: true})
	})
}

func FuzzNote(f *testing.F) {
	f.Add([]byte("content"), "Prebake", uint32(1), []byte("\x04\x00\x00\x00\xff\xff\xff\xff\x03\x00\x00\x00GNU\x00"))
	f.Fuzz(func(t *testing.T, content []byte, owner string, kind uint32, before []byte) {
		if len(content) > 200 || len(owner) > 200 || strings.ContainsRune(owner, 0) {
			return
		}
		if got := modinfo.Note(before, owner, kind); len(got) > len(before) {
			t.Errorf("Note(%x) = %x", before, got)
		}
		if got := modinfo.Note(modinfo.AppendNote(nil, owner, kind, content), owner, kind); !bytes.Equal(got, content) {
			t.Errorf("Note(AppendNote(%q, %d, %x)) = %x", owner, kind, content, got)
		}
	})
}

func FuzzBuildID(f *testing.F) {
	f.Add([]byte("\x04\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd"))
	f.Add([]byte("\x04\x00\x00\x00\xff\xff\xff\xff\x03\x00\x00\x00GNU\x00"))
	f.Fuzz(func(t *testing.T, note []byte) {
		if id := modinfo.BuildID(note); len(id) > 128 {
			t.Errorf("BuildID(%x) = %s; want at most 64 bytes", note, id)
		}
	})
}

func FuzzReadSymvers(f *testing.F) {
	f.Add(symversText)
	f.Add("0x00000000\told\tvmlinux\tEXPORT_SYMBOL\n")
	f.Add("\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := modinfo.ReadSymvers(strings.NewReader(text))
		if err != nil {
			return
		}
		for name, e := range got {
			if name == "" || e.Module == "" {
				t.Errorf("ReadSymvers accepted %q: %+v", name, e)
			}
		}
	})
}

// FuzzModinfoSection varies the .modinfo section of a module. The rest of the module is valid.
func FuzzModinfoSection(f *testing.F) {
	f.Add("name=nvidia\x00vermagic=6.1 SMP\x00depends=a,b")
	f.Add("name=\x00=x\x00\x00vermagic")
	f.Fuzz(func(t *testing.T, text string) {
		data := goodBytes(func(s *sample) { s.info = []string{text} })
		m, err := modinfo.Read(bytes.NewReader(data), int64(len(data)))
		if err == nil && (m.Name == "" || m.Vermagic == "" || slices.Contains(m.Depends, "")) {
			t.Errorf("Read accepted %+v", m)
		}
	})
}
