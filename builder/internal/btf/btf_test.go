package btf_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/btf"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
)

var kernel = []string{"int", "task_struct"}

func TestRead(t *testing.T) {
	t.Parallel()
	got, err := btf.Read(bytes.NewReader(btfsample.ELF(".text", "code", ".BTF", "types", ".BTF.ext", "more")))
	if err != nil || string(got) != "types" {
		t.Errorf("Read = %q, %v; want the section .BTF", got, err)
	}
	if _, err := btf.Read(bytes.NewReader(btfsample.ELF(".text", "code"))); !errors.Is(err, btf.ErrNone) {
		t.Errorf("Read of a file without = %v; want ErrNone", err)
	}
	if _, err := btf.Read(strings.NewReader("no ELF file")); err == nil || errors.Is(err, btf.ErrNone) {
		t.Errorf("Read of a text = %v; want another error", err)
	}
}

// edit returns a copy of data in which the 32-bit word with the given index has the given value.
func edit(data []byte, index int, value uint32) []byte {
	out := bytes.Clone(data)
	binary.LittleEndian.PutUint32(out[4*index:], value)
	return out
}

// first and pointer are indexes of 32-bit words in the test data. The first type begins at first, after the header. It
// is an int of four words: name, kind with number of parts, size, bits. The second type, a pointer, begins at pointer.
const first, pointer = 6, 10

func TestCheck(t *testing.T) {
	t.Parallel()
	types, err := btf.Parse(btfsample.Kernel(kernel...))
	if err != nil || types.Count() != 4 {
		t.Fatalf("Parse = %+v, %v; want 4 types", types, err)
	}
	good := btfsample.Module(kernel, "nv_state", "os_mutex")
	withKind := func(kind, parts uint32, words ...uint32) []byte {
		out := edit(good, 3, uint32(len(good)-24-len("nv_state.os_mutex.")+4*len(words)))
		out = edit(out, 4, binary.LittleEndian.Uint32(out[12:]))
		head := []uint32{17, kind<<24 | parts, 5}
		var added bytes.Buffer
		if err := binary.Write(&added, binary.LittleEndian, append(head, words...)); err != nil {
			t.Fatal(err)
		}
		// The new type replaces the type at index pointer, which has three words, as many as the new type's head.
		return append(out[:4*pointer:4*pointer], append(added.Bytes(), out[4*pointer+12:]...)...)
	}
	for _, row := range []struct {
		name string
		data []byte
		want string // "" means no error
	}{
		{"good", good, ""},
		{"no types of its own", btfsample.Module(kernel), ""},
		{"the kernel's type and name", edit(edit(good, first, 1), pointer+2, 4), ""},
		{"for a kernel with more types", btfsample.Module(append(kernel, "file"), "nv_state", "os_mutex"),
			"type 5: the name at offset "},
		{"for a kernel with fewer", btfsample.Module(kernel[:1], "nv_state", "os_mutex"),
			"begins inside another name, \"task_struct\""},
		{"for a kernel of longer names", btfsample.Module([]string{"int", "task_struct_of_another_kernel"}, "a"),
			"after the end of the table of strings"},
		{"a type beyond all", edit(good, pointer+2, 9), "type 6: a reference names type 9, but the last type is 8"},
		{"struct", withKind(4, 2, 17, 1, 0, 26, 8, 32), ""},
		{"struct whose member has no type", withKind(4, 2, 17, 1, 0, 26, 9, 32), "member 1: a reference names type 9"},
		{"struct whose member has no name", withKind(4, 1, 18, 1, 0), "member 0: the name at offset "},
		{"array", withKind(3, 0, 9, 1, 4), "member 0: a reference names type 9"},
		{"enum", withKind(6, 1, 99, 1), "member 0: the name at offset "},
		{"enum of 64 bits", withKind(19, 1, 17, 1, 0), ""},
		{"function's arguments", withKind(13, 1, 0, 9), "member 0: a reference names type 9"},
		{"variable", withKind(14, 0, 1), ""},
		{"section", withKind(15, 1, 9, 0, 4), "member 0: a reference names type 9"},
		{"parts that are not there", withKind(4, 1000), "type 6 is cut off"},
		{"unknown kind", edit(good, first+1, 20<<24), "type 5 has the unknown kind 20"},
		{"cut off", good[:len(good)-1], "read the table of strings: "},
		{"types cut off", edit(good, 3, 50), "type 8 is cut off"},
		{"another version", edit(good, 0, 0x0002eb9f), "does not have BTF of version 1"},
		{"big-endian", edit(good, 0, 0x00019feb), "does not have BTF of version 1"},
		{"header beyond the end", edit(good, 1, 4096), "the BTF header says that the header has 4096 bytes"},
		{"strings without an end", append(good[:len(good)-1:len(good)-1], 'x'), "the table of strings is missing"},
		{"nothing", nil, "does not have BTF"},
	} {
		err := types.Check(row.data)
		if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
			t.Errorf("%s: Check = %v; want %q", row.name, err, row.want)
		}
	}
}

func FuzzCheck(f *testing.F) {
	f.Add(btfsample.Kernel(kernel...), btfsample.Module(kernel, "nv_state"))
	f.Add(btfsample.Kernel(), btfsample.Module(nil, "nv_state"))
	f.Fuzz(func(t *testing.T, base, module []byte) {
		types, err := btf.Parse(base)
		if err != nil {
			return
		}
		if types.Count() > len(base)/12 {
			t.Errorf("%d types in %d bytes", types.Count(), len(base))
		}
		_ = types.Check(module) // any result is fine; Check must end
	})
}

func FuzzRead(f *testing.F) {
	f.Add(btfsample.ELF(".BTF", string(btfsample.Kernel("int"))))
	f.Fuzz(func(t *testing.T, file []byte) {
		data, err := btf.Read(bytes.NewReader(file))
		if err == nil && len(data) > len(file) {
			t.Errorf("Read took %d bytes out of %d", len(data), len(file))
		}
	})
}
