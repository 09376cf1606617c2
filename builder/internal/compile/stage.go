package compile

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
)

// stage copies the folders, regular files and links of a source tree. A link whose target is outside the tree is an
// error, and so is every other kind of file.
func stage(ctx context.Context, src, dst string) error {
	return filepath.WalkDir(src, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		name, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, name)
		switch entry.Type() {
		case fs.ModeDir:
			return os.Mkdir(to, 0o755)
		case 0:
			return hostfile.Copy(to, path)
		case fs.ModeSymlink:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if !filepath.IsLocal(filepath.Join(filepath.Dir(name), link)) || filepath.IsAbs(link) {
				return fault.Errorf(fault.Usage, "%s is a link to %s, which is outside the source folder", name, link)
			}
			return os.Symlink(link, to)
		}
		return fault.Errorf(fault.Usage, "%s is neither a file nor a folder nor a link", name)
	})
}

// diskFull adds fault.DiskFull and a hint to an error that means a full disk.
func diskFull(err error) error {
	return fault.Disk(err, hintDisk)
}
