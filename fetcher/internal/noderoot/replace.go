package noderoot

import (
	"errors"
	"os"
	"path"
)

// Replace gives a file below a folder new content, with mode 0644, in one step: even after a power cut, the file has
// the former or the new content. name and tmp are relative to the folder. tmp is the path of a temporary file on the
// same file system. No other program may use that path. Replace leaves no file there.
func Replace(dir *os.Root, name, tmp string, data []byte) error {
	f, err := dir.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	// Sync before the rename: otherwise the disk may have the file's new name before its content.
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = dir.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(err, dir.Remove(tmp))
	}
	parent, err := dir.Open(path.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(parent.Sync(), parent.Close())
}
