// Package cas is a content-addressed cache in one folder. Any number of processes of one machine may share it. Several
// machines may share the folder over a network only if flock works on its file system.
//
// The cache has three kinds of entries:
//
//   - A blob is a file; its name is its SHA-256. It is verified when it is stored, and again only by Verify.
//   - A tree is a folder; its name is a kind and a key, which is computed from the inputs of the tree. A process
//     verifies the content at its first use of a tree, and then only the metadata. A damaged tree is made again.
//   - A fact is a small value that was expensive to find out. It is verified at each use. A damaged fact counts as
//     missing.
//
// A rename makes each entry visible, after the entry is complete. The next Open removes the incomplete files of a
// killed process.
//
// A caller must not write to a path that the cache returned. Trim removes entries that were unused for a long time, but
// no entry that a living process still uses; see [Cache.Begin].
//
// The package does not download, and does not decide which entries are worth keeping.
package cas

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/gofrs/flock"
	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/fault"
)

// Names of folders below the cache's folder.
const (
	blobsDir  = "blobs/sha256"
	treesDir  = "trees"
	sealsDir  = "seals" // seals/<kind>/<key> has the digest of the tree of that name
	factsDir  = "facts"
	tmpDir    = "tmp"    // tmp/<owner>/… has blobs and trees before their rename
	workDir   = "work"   // work/<owner>/… has the folders of TempDir
	ownersDir = "owners" // <owner>.lock is locked by flock while the owner's process lives
	locksDir  = "locks"  // one lock file for each tree that was ever made
	usesDir   = "uses"   // <kind>@<key> records the last use of a blob or tree; see use.go
	logsDir   = "logs"   // <name>.log is a build's log, which the builder writes
)

// maxFact is the maximum size in bytes of the value of a fact.
const maxFact = 1 << 20

// lockPoll is the interval at which a process checks whether another process has finished a tree.
const lockPoll = 100 * time.Millisecond

var (
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	keyPattern    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$`)
)

// Cache is an open cache. Its methods may be called concurrently.
type Cache struct {
	// Notify receives a line of text about each damaged tree that is made again. It may be nil. Set it before the first
	// use.
	Notify func(text string)
	// Count is called for each lookup. The kind is "blob", a tree's kind, or "fact:" and a fact's kind. A hit means that
	// the cache had the entry. Count may be nil. Set it before the first use. It may be called concurrently.
	Count func(kind string, hit bool)

	dir   string
	owner string
	lock  *flock.Flock // held until Close or the end of the process

	mu    sync.Mutex
	count uint64            // number of pieces of work and uses of entries so far
	read  map[string]string // trees that this process has verified, with the state of their inodes
	works map[uint64]bool   // pieces of work that have not ended, by the value of count when they began
	pins  map[string]*pin
}

// Close removes this cache's temporary folders and releases its locks.
func (c *Cache) Close() error {
	c.unpin()
	return errors.Join(os.RemoveAll(c.tmp()), os.RemoveAll(c.work()), os.Remove(c.lock.Path()), c.lock.Close())
}

// Dir returns the cache's folder as an absolute path.
func (c *Cache) Dir() string { return c.dir }

func (c *Cache) countLookup(kind string, hit bool) {
	if c.Count != nil {
		c.Count(kind, hit)
	}
}

func (c *Cache) tmp() string  { return filepath.Join(c.dir, tmpDir, c.owner) }
func (c *Cache) work() string { return filepath.Join(c.dir, workDir, c.owner) }

func (c *Cache) blobPath(digest string) string {
	return filepath.Join(c.dir, blobsDir, strings.TrimPrefix(digest, "sha256:"))
}

// PutBlob stores the bytes of r, and returns their digest and size. If want is not empty and the digest is another one,
// nothing is stored, and the error is of kind Checksum. If the cache has the wanted blob, PutBlob does not read r.
func (c *Cache) PutBlob(ctx context.Context, r io.Reader, want string) (digest string, size int64, err error) {
	if want != "" {
		if !digestPattern.MatchString(want) {
			return "", 0, fault.New(fault.Usage, fmt.Sprintf(
				"store a blob in the cache: digest %q: want sha256: and 64 hex digits", want), "")
		}
		if path, ok := c.Blob(want); ok {
			if fi, err := os.Stat(path); err == nil {
				return want, fi.Size(), nil
			}
		}
	}
	f, err := os.CreateTemp(c.tmp(), "blob-*")
	if err != nil {
		return "", 0, disk(fmt.Errorf("store a blob in the cache: %w", err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	h := sha256.New()
	size, err = io.CopyBuffer(io.MultiWriter(f, h), &ctxReader{ctx, r}, make([]byte, 256<<10))
	if err == nil {
		err = f.Chmod(0o444)
	}
	if err == nil {
		err = f.Sync() // the bytes must survive a power cut, because Blob does not check them again
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", 0, disk(fmt.Errorf("store a blob in the cache: %w", err))
	}
	digest = ocidigest.NewDigest(ocidigest.SHA256, h).String()
	if want != "" && digest != want {
		return "", 0, fault.New(fault.Checksum, fmt.Sprintf("store a blob in the cache: the content has digest %s; want %s",
			digest, want),
			"")
	}
	err = c.markUsed(useName(blobKind, strings.TrimPrefix(digest, "sha256:")))
	if err == nil {
		err = os.Rename(f.Name(), c.blobPath(digest))
	}
	if err != nil {
		return "", 0, disk(fmt.Errorf("store a blob in the cache: %w", err))
	}
	return digest, size, nil
}

// Blob returns the path of a stored blob. Trim does not remove the blob during the present piece of work; see Begin.
func (c *Cache) Blob(digest string) (path string, ok bool) {
	defer func() { c.countLookup(blobKind, ok) }()
	if !digestPattern.MatchString(digest) {
		return "", false
	}
	path = c.blobPath(digest)
	if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() {
		return path, false
	}
	if err := c.markUsed(useName(blobKind, strings.TrimPrefix(digest, "sha256:"))); err != nil {
		return path, false
	}
	fi, err := os.Lstat(path) // Trim may have removed the blob before the call of markUsed
	return path, err == nil && fi.Mode().IsRegular()
}

// Verify reads a stored blob again. If its digest is wrong, Verify removes the blob and returns an error of kind
// Checksum.
func (c *Cache) Verify(ctx context.Context, digest string) (err error) {
	path, ok := c.Blob(digest)
	if !ok {
		return fmt.Errorf("verify the cached blob %s: %w", digest, fs.ErrNotExist)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, &ctxReader{ctx, f}); err != nil {
		return fmt.Errorf("verify the cached blob %s: %w", digest, err)
	}
	if got := ocidigest.NewDigest(ocidigest.SHA256, h).String(); got != digest {
		bad := fault.New(fault.Checksum, fmt.Sprintf("verify the cached blob %s: the content has digest %s", digest, got),
			"run the command again: the damaged blob was removed; check the disk of "+c.dir)
		return errors.Join(bad, os.Remove(path))
	}
	return nil
}

// Tree returns the folder of this kind and key. If the cache has no such tree, or the tree's content has changed, Tree
// passes an empty folder to fill, and then renames that folder to the tree's path. If several processes need the same
// tree at once, one makes it, and the others wait.
//
// cached is true if this call did not make the tree. Kind and key are file names of at most 200 characters. The prefix
// "sha256:" is removed from the key.
func (c *Cache) Tree(ctx context.Context, kind, key string,
	fill func(ctx context.Context, dir string) error) (path string, cached bool, err error) {
	key = strings.TrimPrefix(key, "sha256:")
	if !keyPattern.MatchString(kind) || !keyPattern.MatchString(key) {
		return "", false, fault.New(fault.Internal, fmt.Sprintf("make a cached tree: kind %q and key %q: want two file names",
			kind,
			key), "")
	}
	defer func() {
		if err == nil {
			c.countLookup(kind, cached)
		}
	}()
	path = filepath.Join(c.dir, treesDir, kind, key)
	if err := c.markUsed(useName(kind, key)); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			err = foreign(kind, key, err)
		}
		return "", false, disk(err)
	}
	if ok, _, err := c.intact(ctx, kind, key, path); ok || err != nil {
		return path, ok, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", false, disk(fmt.Errorf("make a cached tree: %w", err))
	}
	lock := flock.New(filepath.Join(c.dir, locksDir, kind+"@"+key+".lock"))
	if _, err := lock.TryLockContext(ctx, lockPoll); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return "", false, fmt.Errorf("make the cached tree %s/%s: wait for the lock of the tree: %w", kind, key, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	ok, trouble, err := c.intact(ctx, kind, key, path)
	if ok || err != nil { // ok: another process made the tree first
		return path, ok, err
	}
	if trouble != "" {
		if err := c.discard(kind, key, path, trouble); err != nil {
			return "", false, err
		}
	}
	tmp, err := os.MkdirTemp(c.tmp(), "tree-*")
	if err != nil {
		return "", false, disk(fmt.Errorf("make a cached tree: %w", err))
	}
	if err = os.Chmod(tmp, 0o755); err == nil {
		err = fill(ctx, tmp)
	}
	if err == nil {
		err = c.seal(ctx, kind, key, tmp)
	}
	if err == nil {
		err = syncTree(tmp)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return "", false, errors.Join(disk(err), os.RemoveAll(tmp))
	}
	return path, false, nil
}

// PutFact stores a value of at most maxFact bytes under a key. The kind must be a file name; the key may be any text.
func (c *Cache) PutFact(kind, key string, value []byte) error {
	if !keyPattern.MatchString(kind) || len(value) > maxFact {
		return fault.New(fault.Internal,
			fmt.Sprintf("store a value in the cache: kind %q is not a file name, or the value of %d bytes is too large", kind,
				len(value)), "")
	}
	if err := c.writeFile(c.factPath(kind, key), append(factSum(value), value...)); err != nil {
		return disk(fmt.Errorf("store a value in the cache: %w", err))
	}
	return nil
}

// writeFile replaces the content of path atomically and durably.
func (c *Cache) writeFile(path string, value []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(c.tmp(), "file-*")
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// factSum returns the line before a fact's value: the value's SHA-256 in hex.
func factSum(value []byte) []byte {
	sum := sha256.Sum256(value)
	return append(hex.AppendEncode(nil, sum[:]), '\n')
}

// Fact returns the value that was stored under the key. A damaged fact counts as missing.
func (c *Cache) Fact(kind, key string) (value []byte, ok bool) {
	if !keyPattern.MatchString(kind) {
		return nil, false
	}
	defer func() { c.countLookup(factKind+kind, ok) }()
	path := c.factPath(kind, key)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, false
	}
	if fi, err := os.Stat(path); err == nil && time.Since(fi.ModTime()) > time.Hour {
		now := time.Now()
		_ = os.Chtimes(path, now, now) // otherwise Trim counts the fact as unused
	}
	_, value, _ = bytes.Cut(text, []byte("\n"))
	return value, bytes.HasPrefix(text, factSum(value))
}

func (c *Cache) factPath(kind, key string) string {
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(c.dir, factsDir, kind, hex.EncodeToString(sum[:]))
}

// TempDir makes an empty folder on the cache's file system. The caller removes it with cleanup.
func (c *Cache) TempDir(prefix string) (dir string, cleanup func() error, err error) {
	dir, err = os.MkdirTemp(c.work(), strings.TrimSuffix(prefix, "-")+"-*")
	if err != nil {
		return "", nil, disk(fmt.Errorf("make work folder: %w", err))
	}
	return dir, func() error { return os.RemoveAll(dir) }, nil
}

func isDir(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.IsDir()
}

// disk adds the kind DiskFull to the error of a full disk, unless the error has a kind already.
func disk(err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fault.CacheDisk(err)
}

// ctxReader is a reader whose Read fails after its context has ended.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *ctxReader) Read(b []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}
