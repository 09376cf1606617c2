package modcheck

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
)

// Unstamped returns the bytes that a module had before [Stamp] added the ABI fingerprint. Google's signatures are over
// these bytes.
func Unstamped(path string) ([]byte, error) {
	data, err := readModule(path)
	if err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	if data, err = removeStamp(data); err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("remove the ABI fingerprint from %s: %w", path, err),
			"compile the module again")
	}
	return data, nil
}

// removeStamp undoes addStamp. The old offset of the section table is known, because linkers and strip put the table at
// the end of the file. To prove the result, removeStamp adds the stamp again and compares.
func removeStamp(data []byte) ([]byte, error) {
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	stamp := file.Section(modinfo.StampSection)
	if stamp == nil {
		return nil, fmt.Errorf("the module has no section %s", modinfo.StampSection)
	}
	note, err := stamp.Data()
	if err != nil {
		return nil, err
	}
	f := target.Fingerprint(modinfo.Note(note, modinfo.StampOwner, modinfo.StampType))
	le := binary.LittleEndian
	n := len(file.Sections) - 1
	for padding := range uint64(stampAlign) {
		size := stamp.Offset - padding
		if size > uint64(len(data)) || size < uint64(atShnum+2+n*sectionHeader) {
			break
		}
		plain := bytes.Clone(data[:size])
		le.PutUint64(plain[atShoff:], size-uint64(n*sectionHeader))
		le.PutUint16(plain[atShnum:], uint16(n))
		if again, err := addStamp(plain, f); err == nil && bytes.Equal(again, data) {
			return plain, nil
		}
	}
	return nil, errors.New(
		"the module changed after its ABI fingerprint was added, or its section table was not at the file's end before")
}
