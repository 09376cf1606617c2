package compile

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
)

// stage copies a source tree, so that the build can write to the copy. The copied files belong to
// the user that runs the builder. Their time is the time of the copy. Their mode is 0755 if the
// original is executable, else 0644. stage copies a link only if the link's target is inside the
// tree. It refuses every other kind of file.
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
				return fault.Errorf(fault.Usage, "%s: link to %s leaves the source folder", name, link)
			}
			return os.Symlink(link, to)
		}
		return fault.Errorf(fault.Usage, "%s: neither a file, a folder nor a link", name)
	})
}

// diskFull gives fault.DiskFull and a hint to an error of the host's file system that means a full
// disk.
func diskFull(err error) error {
	return fault.Disk(err, hintDisk)
}
