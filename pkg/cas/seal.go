package cas

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// A seal is a file with the digest of a tree. The seal is written before the tree gets its name. If the tree is damaged
// later, it no longer matches its seal. Without seals, changed bytes would be compiled, signed and published.

func (c *Cache) sealPath(kind, key string) string {
	return filepath.Join(c.dir, sealsDir, kind, key)
}

// seal writes the seal of the finished tree in dir.
func (c *Cache) seal(ctx context.Context, kind, key, dir string) error {
	digest, err := DigestTree(ctx, dir, nil)
	if err != nil {
		return fmt.Errorf("make the cached tree %s/%s: %w", kind, key, err)
	}
	return c.writeFile(c.sealPath(kind, key), []byte(digest))
}

// intact reports whether the tree exists and matches its seal. For an existing tree, trouble says why it does not
// match. An error means that the check was not possible: ctx has ended, or the tree belongs to another user.
func (c *Cache) intact(ctx context.Context, kind, key, path string) (ok bool, trouble string, err error) {
	if !isDir(path) {
		return false, "", nil
	}
	want, err := os.ReadFile(c.sealPath(kind, key))
	if errors.Is(err, fs.ErrNotExist) {
		return false, "the cache has no digest of the tree", nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return false, "", foreign(kind, key, err)
	}
	if err != nil {
		return false, err.Error(), nil
	}
	now, quiet := inodes(path)
	c.mu.Lock()
	known := now != "" && c.read[path] == now+string(want)
	c.mu.Unlock()
	if known {
		return true, "", nil
	}
	got, err := DigestTree(ctx, path, nil)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return false, "", fmt.Errorf("check the cached tree %s/%s: %w", kind, key, cause)
	}
	if errors.Is(err, fs.ErrPermission) {
		return false, "", foreign(kind, key, err)
	}
	if err != nil {
		return false, err.Error(), nil
	}
	if got != string(want) {
		return false, fmt.Sprintf("the tree has digest %s; the digest in the cache is %.80s", got, want), nil
	}
	if again, _ := inodes(path); quiet && again == now { // no file changed during the check
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.read == nil {
			c.read = map[string]string{}
		}
		c.read[path] = now + string(want)
	}
	return true, "", nil
}

// inodes returns a digest of the metadata of all files in a tree: device, inode, size, and the inode's change time,
// which no program can set. While the digest stays the same, only the disk itself can have changed the files; see
// [Cache.Reread]. state is "" if the metadata cannot be read. quiet is true if no file changed within the last tick.
// Otherwise a further change could get the same change time, and the digest would not show it.
func inodes(dir string) (state string, quiet bool) {
	h, begin, newest := sha256.New(), time.Now(), time.Time{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		s, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return errors.ErrUnsupported
		}
		if changed := time.Unix(s.Ctim.Sec, s.Ctim.Nsec); changed.After(newest) {
			newest = changed
		}
		fmt.Fprintf(h, "%s\x00%d %d %d %d.%d\n", path, s.Dev, s.Ino, s.Size, s.Ctim.Sec, s.Ctim.Nsec)
		return nil
	})
	if err != nil {
		return "", false
	}
	return hex.EncodeToString(h.Sum(nil)), begin.Sub(newest) > tick
}

// tick is far longer than one step of any file system's clock. The longest step is 10 ms: ext4, xfs and btrfs on
// kernels before 6.13 use the time of the last timer interrupt.
const tick = time.Second

func foreign(kind, key string, err error) error {
	return fault.Wrap(fault.Usage, fmt.Errorf("check the cached tree %s/%s: %w", kind, key, err), hintOwner)
}

// discard reports a damaged tree and removes it.
func (c *Cache) discard(kind, key, path, trouble string) error {
	if c.Notify != nil {
		c.Notify(fmt.Sprintf("the cached tree %s/%s is damaged (%s), and is made again; check the disk of %s", kind, key,
			trouble,
			c.dir))
	}
	grave, err := os.MkdirTemp(c.tmp(), "damaged-*")
	if err == nil {
		err = os.Rename(path, filepath.Join(grave, "tree"))
	}
	if err != nil {
		return fmt.Errorf("discard the damaged tree %s/%s of the cache: %w", kind, key, err)
	}
	return os.RemoveAll(grave)
}
