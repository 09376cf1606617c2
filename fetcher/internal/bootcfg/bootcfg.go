package bootcfg

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// These are the names on the EFI partition. Its file system, FAT, ignores case.
const (
	file   = "efi/boot/grub.cfg"
	backup = file + ".prebake"
	fresh  = file + ".new"
)

// maxConfig is the maximum size of the file in bytes. A real file has about three kilobytes.
const maxConfig = 1 << 20

// Apply changes the configuration on an EFI partition and keeps a copy of the original. It returns the number of boot
// entries, or 0 if nothing had to change.
func Apply(esp *os.Root, want Want) (entries int, err error) {
	have, err := read(esp, file)
	if err != nil {
		return 0, err
	}
	edited, entries, err := Edit(have, want)
	if err != nil {
		return 0, err
	}
	if bytes.Equal(edited, have) {
		return 0, nil
	}
	// Keep the configuration of an updated operating system as the copy, for Undo. Never keep a configuration that this
	// program edited.
	kept, err := read(esp, backup)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	if err != nil || !ours(kept, have) {
		if err := write(esp, backup, have); err != nil {
			return 0, err
		}
	}
	return entries, write(esp, file, edited)
}

// Undo restores the configuration from before [Apply]. If somebody else has changed it since, the error is of kind
// Mismatch. If there is no copy, the error is of kind NoArtifact.
func Undo(esp *os.Root) error {
	kept, err := read(esp, backup)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NoArtifact,
			"undo the change of the boot configuration: fetcher has not changed the boot configuration", "")
	}
	if err != nil {
		return err
	}
	have, err := read(esp, file)
	if err != nil {
		return err
	}
	if !bytes.Equal(have, kept) {
		if !ours(kept, have) {
			return fault.New(fault.Mismatch,
				"undo the change of the boot configuration: somebody else changed "+file+" after fetcher's change",
				"correct "+file+" on the EFI partition by hand; "+backup+" has the content from before the change")
		}
		if err := write(esp, file, kept); err != nil {
			return err
		}
	}
	if err := esp.Remove(backup); err != nil {
		return fmt.Errorf("remove %s: %w", backup, err)
	}
	return flush(esp)
}

// ours reports whether this program may have made the edited configuration from the former one.
func ours(before, edited []byte) bool {
	for _, want := range []Want{{Unsigned: true}, {Elsewhere: true}, {Unsigned: true, Elsewhere: true}} {
		if out, _, err := Edit(before, want); err == nil && bytes.Equal(out, edited) {
			return true
		}
	}
	return false
}

func read(esp *os.Root, name string) ([]byte, error) {
	f, err := esp.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(raw) > maxConfig {
		err = fault.New(fault.Unsupported, fmt.Sprintf("the file has more than %d bytes", maxConfig),
			"check the EFI partition: the file is not a configuration of COS's boot loader")
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return raw, nil
}

// write writes a file under a temporary name, syncs it, renames it, and compares it.
func write(esp *os.Root, name string, data []byte) error {
	f, err := esp.OpenFile(fresh, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return fault.Disk(fmt.Errorf("write %s: %w", name, err), "make space on the EFI partition")
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = esp.Rename(fresh, name)
	}
	if err == nil {
		err = flush(esp)
	}
	if err != nil {
		return fault.Disk(errors.Join(fmt.Errorf("write %s: %w", name, err), esp.RemoveAll(fresh)),
			"make space on the EFI partition")
	}
	got, err := read(esp, name)
	if err == nil && !bytes.Equal(got, data) {
		err = errors.New("the file does not have the content that fetcher wrote")
	}
	if err != nil {
		return fault.Wrap(fault.Internal, fmt.Errorf("check %s after the write: %w", name, err),
			"before this node reboots, restore "+file+" from "+backup)
	}
	return nil
}

func flush(esp *os.Root) error {
	d, err := esp.Open(path.Dir(file))
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

// SecureBoot reports whether the firmware checks what it boots, and whether this is known. With Secure Boot on, a
// changed command line has no effect or prevents the boot.
func SecureBoot(root fs.FS, kernelLog []string) (on, known bool) {
	if _, err := fs.Stat(root, "sys/firmware/efi"); errors.Is(err, fs.ErrNotExist) {
		return false, true // no EFI
	}
	// The value follows four bytes of attributes (UEFI specification, "Globally Defined Variables").
	raw, err := fs.ReadFile(root, "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
	if err == nil && len(raw) == 5 {
		return raw[4] == 1, true
	}
	// Without mounted EFI variables, the kernel log has the state (efi_set_secure_boot in drivers/firmware/efi).
	for _, line := range kernelLog {
		switch {
		case strings.Contains(line, "Secure boot enabled"):
			return true, true
		case strings.Contains(line, "Secure boot disabled"):
			return false, true
		}
	}
	return false, false
}
