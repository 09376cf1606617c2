package modinfo

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// BuildIDNote is the section with the build ID. For a loaded module, the kernel shows it as the file
// /sys/module/<name>/notes/<BuildIDNote>.
const BuildIDNote = ".note.gnu.build-id"

// The builder adds a note to each module, in the section StampSection. The note contains the ABI fingerprint of the
// kernel for which the module was built. For a loaded module, the note is in /sys/module/<name>/notes/<StampSection>.
const (
	StampSection = ".note.prebake"
	StampOwner   = "Prebake"
	StampType    = 1
)

// The note in which modpost stores CONFIG_BUILD_SALT (include/linux/build-salt.h).
const (
	linuxNote  = ".note.Linux"
	linuxOwner = "Linux"
	saltType   = 0x100
)

// maxNote is the maximum length in bytes of a note's owner, and of its content.
const maxNote = 256

// Note returns the content of the first note with this owner and type in a note section, or nil. A note consists of:
//   - the length of the owner, the length of the content, and the type
//   - the owner with a zero byte, padded to four bytes
//   - the content, padded to four bytes
func Note(section []byte, owner string, kind uint32) []byte {
	const head = 12
	for len(section) >= head {
		nameLen, size := binary.LittleEndian.Uint32(section), binary.LittleEndian.Uint32(section[4:])
		found := binary.LittleEndian.Uint32(section[8:])
		if nameLen > maxNote || size > maxNote {
			return nil
		}
		at := head + int(nameLen+3)&^3
		end := at + int(size)
		if end > len(section) {
			return nil
		}
		if found == kind && string(section[head:head+int(nameLen)]) == owner+"\x00" {
			return section[at:end]
		}
		section = section[min((end+3)&^3, len(section)):]
	}
	return nil
}

// AppendNote appends a note in the format that [Note] reads.
func AppendNote(section []byte, owner string, kind uint32, content []byte) []byte {
	pad := func(b []byte) []byte { return append(b, make([]byte, -len(b)&3)...) }
	section = binary.LittleEndian.AppendUint32(pad(section), uint32(len(owner)+1))
	section = binary.LittleEndian.AppendUint32(section, uint32(len(content)))
	section = binary.LittleEndian.AppendUint32(section, kind)
	section = pad(append(append(section, owner...), 0))
	return pad(append(section, content...))
}

// BuildID returns the build ID in the content of the section [BuildIDNote], in hexadecimal digits. It returns "" if the
// section has no build ID, or a build ID of more than 64 bytes.
func BuildID(note []byte) string {
	const most, gnuBuildID = 64, 3
	id := Note(note, "GNU", gnuBuildID)
	if len(id) > most {
		return ""
	}
	return hex.EncodeToString(id)
}

func (m *Module) readNotes(f *elf.File) error {
	id, err := section(f, BuildIDNote, maxModinfo)
	if err != nil {
		return err
	}
	linux, err := section(f, linuxNote, maxModinfo)
	if err != nil {
		return err
	}
	stamp, err := section(f, StampSection, maxModinfo)
	if err != nil {
		return err
	}
	m.BuildID = BuildID(id)
	m.Salt = string(bytes.TrimRight(Note(linux, linuxOwner, saltType), "\x00"))
	m.MadeFor = string(Note(stamp, StampOwner, StampType))
	for _, text := range []string{m.Salt, m.MadeFor} {
		if !textPattern.MatchString(text) {
			return fmt.Errorf("the module's note %q: want printable ASCII", text[:min(len(text), 256)])
		}
	}
	return nil
}
