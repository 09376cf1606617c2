package mirror

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ulikunitz/xz"
)

// module returns the smallest ELF file that has a .modinfo section.
func module(modinfo string) []byte {
	names := "\x00.modinfo\x00.shstrtab\x00"
	const header, section = 64, 64
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: header,
		Shoff: uint64(header + len(modinfo) + len(names)), Shentsize: section, Shnum: 3, Shstrndx: 2,
	}
	sections := []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: header, Size: uint64(len(modinfo)), Addralign: 1},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(header + len(modinfo)), Size: uint64(len(names)), Addralign: 1},
	}
	var out bytes.Buffer
	for _, v := range []any{h, []byte(modinfo), []byte(names), sections} {
		if err := binary.Write(&out, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return out.Bytes()
}

func xzOf(t testing.TB, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestLoadOrder(t *testing.T) {
	t.Parallel()
	in := tree{
		"k/virtio_net.ko":   {data: module("license=GPL\x00depends=net_failover,virtio-ring\x00")},
		"k/net_failover.ko": {data: module("depends=failover\x00")},
		"k/failover.ko":     {data: module("depends=\x00")},
		"k/virtio-ring.ko":  {data: module("")},
		"k/other.ko":        {data: module("depends=nothing_here\x00")},
		"vmlinuz":           {data: []byte("x")},
	}
	got, err := loadOrder(in, "built_in", "virtio_net", "failover")
	want := []string{"k/failover.ko", "k/net_failover.ko", "k/virtio-ring.ko", "k/virtio_net.ko"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("loadOrder: %v (-want +got)\n%s", err, diff)
	}
	packed := tree{"k/net-failover.ko.xz": {data: xzOf(t, module("depends=failover\x00"))},
		"k/failover.ko.xz": {data: xzOf(t, module(""))}, "k/bad.ko.xz": {data: []byte("text")}}
	got, err = loadOrder(packed, "net_failover")
	if diff := cmp.Diff([]string{"k/failover.ko.xz", "k/net-failover.ko.xz"}, got); err != nil || diff != "" {
		t.Errorf("loadOrder(compressed modules): %v (-want +got)\n%s", err, diff)
	}
	if !bytes.Equal(packed["k/failover.ko.xz"].data, module("")) {
		t.Error("loadOrder left a module compressed")
	}
	if _, err := loadOrder(packed, "bad"); err == nil {
		t.Error("loadOrder(what is no xz) succeeded")
	}
	if _, err := loadOrder(in, "other"); err == nil {
		t.Error("loadOrder(module with a dependency that is not there) succeeded")
	}
	if _, err := loadOrder(tree{"x.ko": {data: module("depends=y\x00")}, "y.ko": {data: module("depends=x\x00")}},
		"x"); err == nil {
		t.Error("loadOrder(two modules that need each other) succeeded")
	}
	if _, err := loadOrder(tree{"x.ko": {data: []byte("text")}}, "x"); err == nil {
		t.Error("loadOrder(not an ELF file) succeeded")
	}
}

func FuzzModuleDepends(f *testing.F) {
	f.Add(module("depends=a,b-c\x00"))
	f.Add(module(""))
	f.Add([]byte(elf.ELFMAG))
	f.Fuzz(func(t *testing.T, ko []byte) {
		if len(ko) > 1<<16 {
			return
		}
		if deps, err := moduleDepends(ko); err == nil && len(deps) > len(ko) {
			t.Errorf("moduleDepends found %d names in %d bytes", len(deps), len(ko))
		}
	})
}
