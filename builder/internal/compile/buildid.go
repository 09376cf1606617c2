package compile

import (
	"crypto/sha256"
	"fmt"
	"os"
)

// setBuildID gives a stripped module a build id that is a digest of its own
// bytes, and debug, where named, the same one. A linker's own id covers the
// debug sections, so that compiling with and without them would give two
// modules that differ in nothing else. Modules without an id stay as they are.
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
		return fmt.Errorf("%s: a build id of %d bytes, the stripped file's has %d", debug, other, size)
	}
	return writeAt(debug, id, at)
}

func writeAt(path string, data []byte, at int64) error {
	return updateHost(path, os.O_WRONLY, func(f *os.File) error {
		_, err := f.WriteAt(data, at)
		return err
	})
}

// findBuildID returns where the GNU build id of an ELF file lies; size is 0
// where it has none.
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
	const header = 16 // sizes of name and content, the type, "GNU\0"
	note, err := s.Data()
	if err != nil {
		return 0, 0, fmt.Errorf("read build id: %w", err)
	}
	if len(note) < header || string(note[12:header]) != "GNU\x00" || f.ByteOrder.Uint32(note[8:]) != 3 {
		return 0, 0, fmt.Errorf("read build id: a note of %d bytes of another kind", len(note))
	}
	size = int64(f.ByteOrder.Uint32(note[4:]))
	if size < 8 || size > sha256.Size || header+size > int64(len(note)) {
		return 0, 0, fmt.Errorf("read build id: %d bytes long", size)
	}
	return int64(s.Offset) + header, size, nil //nolint:gosec // within a file that was read whole
}
