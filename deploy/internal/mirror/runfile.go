package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// packRunfile packs the tree with makeself: a shell script with a compressed tar after it, like NVIDIA's runfile.
// makeself writes its command line into the header. The command line has only relative names, so the bytes do not
// depend on the work folder.
func packRunfile(ctx context.Context, t tree, name, version, work string, w io.Writer) error {
	payload := filepath.Join(work, "payload")
	// Chmod makes the mode independent of the umask, which must not change the archive.
	if err := errors.Join(os.Mkdir(payload, 0o755), os.Chmod(payload, 0o755)); err != nil {
		return err
	}
	if err := t.writeDir(payload); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "makeself", "--quiet", "--tar-quietly", "--zstd", "--complevel", "6", "--sha256",
		"--nox11",
		"--packaging-date", epoch.Format(time.RFC3339),
		"--tar-extra", fmt.Sprintf("--mtime=@%d --owner=0 --group=0 --numeric-owner --sort=name", epoch.Unix()),
		"payload", name, "NVIDIA Accelerated Graphics Driver for Linux-x86_64 "+version, "./nvidia-installer")
	cmd.Dir = work
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC", "TMPDIR=" + work}
	if _, err := output(cmd); err != nil {
		return err
	}
	file, err := os.ReadFile(filepath.Join(work, name))
	if err != nil {
		return err
	}
	if file, err = fixHeader(file, t); err != nil {
		return err
	}
	_, err = w.Write(file)
	return err
}

// installer is the start-up script of the runfile, which makeself requires. It replaces NVIDIA's installer program,
// which Debian does not ship.
const installer = `#!/bin/sh
echo "This archive was put together from Debian packages; it holds no installer." >&2
echo "Use -x --target DIR to unpack it." >&2
exit 1
`
