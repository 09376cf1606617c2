package compile

import (
	"crypto/sha256"
	"fmt"
	"os"
)

// setBuildID replaces the build id of a stripped module by a digest of the module's own bytes. debug is the path of the
// unstripped module, which gets the same build id; "" means that there is none. A module without a build id stays
// unchanged.
//
// The linker's build id also depends on the debug sections. With that build id, a stripped module would depend on
// whether the build made debug information.
func setBuildID(stripped, debug string) error {
	text, err := readHost(stripped)
	if err != nil {
		return err
	}
	at, size, err := findBuildID(stripped)
	if err != nil || size == 0 {
		return err
	}
	clear(text[at : at+size])
	h := sha256.New()
	h.Write([]byte("prebake build id 1\n"))
	h.Write(text)
	id := h.Sum(nil)[:size]
	if err := writeAt(stripped, id, at); err != nil || debug == "" {
		return err
	}
	at, other, err := findBuildID(debug)
	if err != nil {
		return err
	}
	if other != size {
		return fmt.Errorf(
			"set the build id of %s: the old build id has %d bytes; the stripped module's build id has %d bytes",
			debug, other, size)
	}
	return writeAt(debug, id, at)
}

func writeAt(path string, data []byte, at int64) error {
	return updateHost(path, os.O_WRONLY, func(f *os.File) error {
		_, err := f.WriteAt(data, at)
		return err
	})
}

// findBuildID returns the offset and the size in bytes of the GNU build id in an ELF file. size is 0 if the file has no
// build id. The ELF specification gives the layout of a note: three numbers of 4 bytes (size of the name, size of the
// content, type), the name, and the content. NT_GNU_BUILD_ID is type 3.
func findBuildID(path string) (at, size int64, err error) {
	f, err := openHostELF(path)
	if err != nil {
		return 0, 0, fmt.Errorf("read module: %w", err)
	}
	defer f.Close()
	s := f.Section(".note.gnu.build-id")
	if s == nil {
		return 0, 0, nil
	}
	const header = 16 // name size, content size, type, and the name "GNU\0"
	note, err := s.Data()
	if err != nil {
		return 0, 0, fmt.Errorf("read build id: %w", err)
	}
	if len(note) < header || string(note[12:header]) != "GNU\x00" || f.ByteOrder.Uint32(note[8:]) != 3 {
		return 0, 0, fmt.Errorf("read build id: the section .note.gnu.build-id has %d bytes, but no GNU build id",
			len(note))
	}
	size = int64(f.ByteOrder.Uint32(note[4:]))
	if size < 8 || size > sha256.Size || header+size > int64(len(note)) {
		return 0, 0, fmt.Errorf(
			"read build id: the build id has %d bytes; want 8 to %d bytes, and not more than its ELF note holds", size,
			sha256.Size)
	}
	return int64(s.Offset) + header, size, nil //nolint:gosec // the offset is inside a file that was read completely
}
