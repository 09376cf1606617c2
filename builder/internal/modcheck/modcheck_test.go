package modcheck

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
)

const (
	ours    = target.Fingerprint("sha256:1111111111111111111111111111111111111111111111111111111111111111")
	theirs  = target.Fingerprint("sha256:2222222222222222222222222222222222222222222222222222222222222222")
	release = "6.6.105+" // as on COS, where sibling kernels share a release
	magic   = release + " SMP mod_unload"
)

// module returns the smallest relocatable file that the kernel's loader accepts as a module. more has the names and
// contents of further sections, in turn.
func module(vermagic string, more ...string) []byte {
	names := []byte("\x00.modinfo\x00.symtab\x00.strtab\x00.gnu.linkonce.this_module\x00.shstrtab\x00")
	for i := 0; i < len(more); i += 2 {
		names = append(append(names, more[i]...), 0)
	}
	at := func(name string) uint32 { return uint32(bytes.Index(names, append([]byte(name), 0))) }
	var body []byte
	headers := []elf.Section64{{}}
	add := func(name string, kind elf.SectionType, data []byte, link uint32) {
		headers = append(headers,
			elf.Section64{Name: at(name), Type: uint32(kind), Off: uint64(64 + len(body)), Size: uint64(len(data)), Link: link,
				Addralign: 1})
		body = append(body, data...)
	}
	add(".modinfo", elf.SHT_PROGBITS, []byte("name=nvidia\x00version=1.2.3\x00license=GPL\x00vermagic="+vermagic+" \x00"),
		0)
	add(".symtab", elf.SHT_SYMTAB, make([]byte, elf.Sym64Size), 3)
	headers[2].Entsize = elf.Sym64Size
	add(".strtab", elf.SHT_STRTAB, []byte{0}, 0)
	add(".gnu.linkonce.this_module", elf.SHT_PROGBITS, make([]byte, 0x380), 0)
	for i := 0; i < len(more); i += 2 {
		add(more[i], elf.SHT_PROGBITS, []byte(more[i+1]), 0)
	}
	add(".shstrtab", elf.SHT_STRTAB, names, 0)
	header := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Shoff:  uint64(64 + len(body)),
		Ehsize: 64, Shentsize: 64, Shnum: uint16(len(headers)), Shstrndx: uint16(len(headers) - 1)}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] =
		byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var out bytes.Buffer
	for _, part := range []any{header, body, headers} {
		if err := binary.Write(&out, binary.LittleEndian, part); err != nil {
			panic(err)
		}
	}
	return out.Bytes()
}

// kernel writes the files of a header tree that Check reads. Their content is like that of COS's headers.
func kernel(t *testing.T) Kernel {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, ".config"),
		[]byte("CONFIG_SMP=y\nCONFIG_MODULE_UNLOAD=y\nCONFIG_BUILD_SALT=\"\"\n# CONFIG_MODVERSIONS is not set\n"))
	write(t, filepath.Join(dir, "Module.symvers"), []byte("0x00000000\t_printk\tvmlinux\tEXPORT_SYMBOL\t\n"))
	return Kernel{Headers: dir, Release: release, Arch: target.AMD64, Fingerprint: ours, Version: "1.2.3"}
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func stampFile(t *testing.T, data []byte, f target.Fingerprint) string {
	t.Helper()
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "in.ko"), filepath.Join(dir, "nvidia.ko")
	write(t, src, data)
	if err := Stamp(dst, src, f); err != nil {
		t.Fatal(err)
	}
	return dst
}

func TestStamp(t *testing.T) {
	t.Parallel()
	plain := module(magic)
	path := stampFile(t, plain, ours)
	m, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if m.MadeFor != string(ours) || m.Vermagic != magic || m.StructSize != 0x380 {
		t.Errorf("Read of a stamped module = %+v; want it made for %s, and all else as before", m, ours)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, after := sections(t, plain), sections(t, data)
	if diff := cmp.Diff(before, after[:len(before)]); diff != "" || len(after) != len(before)+1 {
		t.Errorf("Stamp changed sections (-before +after):\n%s", diff)
	}
	added := after[len(after)-1]
	if added.Name != modinfo.StampSection || added.Type != elf.SHT_NOTE || added.Flags != elf.SHF_ALLOC ||
		added.Offset%4 != 0 {
		t.Errorf("the stamp is %+v; want an allocated note, which a loaded module shows in /sys", added)
	}
	if again := stampFile(t, plain, ours); !sameFile(t, path, again) {
		t.Error("two stamps of one module differ")
	}
}

// sections returns all section headers except the header of .shstrtab, which Stamp moves and enlarges.
func sections(t *testing.T, data []byte) []elf.SectionHeader {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var all []elf.SectionHeader
	for _, s := range f.Sections {
		if s.Name != ".shstrtab" {
			all = append(all, s.SectionHeader)
		}
	}
	return all
}

func sameFile(t *testing.T, a, b string) bool {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(x, y)
}

func TestStampRefuses(t *testing.T) {
	t.Parallel()
	plain := module(magic)
	twice, err := addStamp(plain, ours)
	if err != nil {
		t.Fatal(err)
	}
	cut := bytes.Clone(plain)
	binary.LittleEndian.PutUint64(cut[atShoff:], uint64(len(cut)-64))
	for name, row := range map[string]struct {
		data []byte
		f    target.Fingerprint
		want string
	}{
		"signed":            {append(bytes.Clone(plain), modinfo.SignatureMagic...), ours, "signed"},
		"stamped":           {twice, theirs, "has an ABI fingerprint"},
		"no fingerprint":    {plain, "17800.0.50", ""},
		"no ELF":            {[]byte("#!/bin/sh\n"), ours, ""},
		"cut short":         {cut, ours, ""},
		"program":           {append(append(bytes.Clone(plain[:16]), 2), plain[17:]...), ours, "not a module"},
		"nothing":           {nil, ours, ""},
		"too many sections": {append(append(bytes.Clone(plain[:atShnum]), 0xff, 0xfe), plain[atShnum+2:]...), ours, ""},
	} {
		if out, err := addStamp(row.data, row.f); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: addStamp() = %d bytes, %v; want an error with %q", name, len(out), err, row.want)
		}
	}
	err = Stamp(filepath.Join(t.TempDir(), "out"), filepath.Join(t.TempDir(), "in"), ours)
	if err == nil || fault.Is(err, fault.CheckFailed) { // a builder would store a failure of this kind
		t.Errorf("Stamp of no file = %v; want an error that is not about the module", err)
	}
	if _, err := Unstamped(filepath.Join(t.TempDir(), "in")); err == nil || fault.Is(err, fault.CheckFailed) {
		t.Errorf("Unstamped of no file = %v; want an error that is not about the module", err)
	}
}

func FuzzStamped(f *testing.F) {
	f.Add(module(magic))
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, err := addStamp(data, ours)
		if err != nil {
			return
		}
		file, err := elf.NewFile(bytes.NewReader(out))
		if err != nil {
			t.Fatalf("addStamp() made a file that is not ELF: %v", err)
		}
		last := file.Sections[len(file.Sections)-1]
		note, err := last.Data()
		if err != nil || string(modinfo.Note(note, modinfo.StampOwner, modinfo.StampType)) != string(ours) {
			t.Errorf("addStamp() left the note %x, %v", note, err)
		}
	})
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		magic  string
		stamp  target.Fingerprint
		change func(t *testing.T, k *Kernel)
		want   string // "" means no error
	}{
		{"fits", magic, ours, func(*testing.T, *Kernel) {}, ""},
		// On COS, sibling kernels have the same release, no symbol checksums and no build salt. Only the stamp shows for
		// which of them a module was compiled.
		{"sibling kernel", magic, theirs, func(*testing.T, *Kernel) {}, "made for ABI fingerprint " + string(theirs)},
		{"sibling kernel, somebody else's module", magic, theirs, func(_ *testing.T, k *Kernel) { k.Fingerprint = "" }, ""},
		{"other options", release + " SMP preempt mod_unload", ours, func(*testing.T, *Kernel) {},
			`this kernel wants "` + magic + `"`},
		{"other release", "6.6.111+ SMP mod_unload", ours, func(*testing.T, *Kernel) {},
			"made for kernel release 6.6.111+; this kernel has release 6.6.105+"},
		{"other processor", magic, ours, func(_ *testing.T, k *Kernel) { k.Arch = target.ARM64 }, "EM_X86_64"},
		{"other driver", magic, ours, func(_ *testing.T, k *Kernel) { k.Version = "1.2.4" },
			"has driver version 1.2.3; want 1.2.4"},
		{"struct module of another size", magic, ours, func(t *testing.T, k *Kernel) {
			k.Boot = t.TempDir()
			own := bytes.ReplaceAll(module(magic), []byte{0x80, 3, 0, 0, 0, 0, 0, 0}, []byte{0x40, 3, 0, 0, 0, 0, 0, 0})
			write(t, filepath.Join(k.Boot, "modules/virtio_net.ko"), own)
		}, "struct module has 896 bytes in this module, and 832 bytes in this kernel"},
		{"struct module of this size", magic, ours, func(t *testing.T, k *Kernel) {
			k.Boot = t.TempDir()
			write(t, filepath.Join(k.Boot, "modules/virtio_net.ko"), module(magic))
		}, ""},
		{"boot folder without modules", magic, ours, func(t *testing.T, k *Kernel) { k.Boot = t.TempDir() }, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			k := kernel(t)
			row.change(t, &k)
			got, err := Check(map[string]string{"nvidia": stampFile(t, module(row.magic), row.stamp)}, k)
			if row.want == "" {
				if err != nil || got != row.magic {
					t.Errorf("Check = %q, %v; want %q", got, err, row.magic)
				}
				return
			}
			if !fault.Is(err, fault.CheckFailed) || fault.Hint(err) == "" || !strings.Contains(err.Error(), row.want) {
				t.Errorf("Check = %v (%v, hint %q); want check-failed with %q", err, fault.Of(err), fault.Hint(err), row.want)
			}
		})
	}
}

func TestCheckRefusesWithoutFacts(t *testing.T) {
	t.Parallel()
	k := kernel(t)
	modules := map[string]string{"nvidia": stampFile(t, module(magic), ours)}
	if _, err := Check(nil, k); !fault.Is(err, fault.CheckFailed) {
		t.Errorf("Check of nothing = %v; want check-failed", err)
	}
	if _, err := Check(map[string]string{"nvidia-uvm": modules["nvidia"]}, k); !fault.Is(err, fault.CheckFailed) ||
		!strings.Contains(err.Error(), "a module with another name: nvidia") {
		t.Errorf("Check of a file under another name = %v; want check-failed", err)
	}
	for _, name := range []string{"Module.symvers", ".config"} {
		if err := os.Remove(filepath.Join(k.Headers, name)); err != nil {
			t.Fatal(err)
		}
		if _, err := Check(modules, k); !fault.Is(err, fault.InputMissing) || fault.Hint(err) == "" {
			t.Errorf("Check without %s = %v; want input-missing with a hint", name, err)
		}
	}
}

// TestVermagic compares vermagicOf with vermagic strings of real kernels.
func TestVermagic(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, config string
		arch         target.Arch
		want         string
	}{
		{"Debian, amd64", "CONFIG_SMP=y\nCONFIG_PREEMPT_BUILD=y\nCONFIG_MODULE_UNLOAD=y\nCONFIG_MODVERSIONS=y\n",
			target.AMD64, "6.1 SMP preempt mod_unload modversions"},
		{"Debian, arm64", "CONFIG_SMP=y\nCONFIG_MODULE_UNLOAD=y\nCONFIG_MODVERSIONS=y\n", target.ARM64,
			"6.1 SMP mod_unload modversions aarch64"},
		{"before 5.16", "CONFIG_SMP=y\nCONFIG_PREEMPT=y\n", target.AMD64, "6.1 SMP preempt"},
		{"real time", "CONFIG_SMP=y\nCONFIG_PREEMPT_RT=y\n", target.AMD64, "6.1 SMP preempt_rt"},
		{"secret layout", "CONFIG_SMP=y\nCONFIG_RANDSTRUCT=y\n", target.AMD64, ""},
	} {
		config, err := kconfig.Parse([]byte(row.config))
		if err != nil {
			t.Fatal(err)
		}
		if got := vermagicOf(config, "6.1", row.arch); got != row.want {
			t.Errorf("%s: vermagicOf() = %q; want %q", row.name, got, row.want)
		}
	}
}
