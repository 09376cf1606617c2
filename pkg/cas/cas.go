// Package cas is a content-addressed cache in one folder, shared safely by
// any number of processes of one machine.
//
// A blob is a file named by its sha256, a tree is a folder named by what it
// was made from, a fact is a small value that was expensive to learn. All
// three appear complete, by rename, or not at all; what a killed process left
// half done is removed at the next Open. Blobs are verified as they come in and
// not again when they are asked for: Verify does that on demand. A tree is
// read and verified when a process asks for it first, looked over each time after
// that, and made again when it is not what it was; so is a fact, which is then
// forgotten. A caller that gets a path must not
// write to it. Trim removes what was not used for long, and never what a living
// process was handed out.
//
// It refuses to download, to decide what is worth keeping, and to serve a
// folder that machines share over a network without working flock.
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

// Names below the cache's folder.
const (
	blobsDir  = "blobs/sha256"
	treesDir  = "trees"
	sealsDir  = "seals" // seals/<kind>/<key>: the digest of the tree of that name
	factsDir  = "facts"
	tmpDir    = "tmp"    // tmp/<owner>/…: blobs and trees before their rename
	workDir   = "work"   // work/<owner>/…: TempDir
	ownersDir = "owners" // <owner>.lock, flocked while its process lives
	locksDir  = "locks"  // one lock for each tree that was ever made
	usesDir   = "uses"   // <kind>@<key>: when a blob or tree was last used, and by whom
)

// maxFact bounds a fact's value.
const maxFact = 1 << 20

// lockPoll is how often a process looks whether another one has finished the
// tree that it waits for.
const lockPoll = 100 * time.Millisecond

var (
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	keyPattern    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$`)
)

// Cache is an open cache. Its methods may be called concurrently.
type Cache struct {
	// Notify receives a line about a damaged tree that is rebuilt; nil means silent. It is set before the first use, if at
	// all.
	Notify func(text string)
	// Count is called for each question by kind ("blob", a tree's kind, "fact:" and a
	// fact's), and whether the answer was there; nil means deaf. It is set before the
	// first use, and may be called concurrently.
	Count func(kind string, hit bool)

	dir   string
	owner string
	lock  *flock.Flock // held until Close or the end of the process

	mu    sync.Mutex
	count uint64            // of pieces of work begun and entries used
	read  map[string]string // trees that this process has read whole, and how their inodes were
	works map[uint64]bool   // pieces of work that have not ended, by count
	pins  map[string]*pin
}

// Open opens the cache in dir, makes it where there is none, and removes what
// dead processes left unfinished.
func Open(dir string) (*Cache, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	for _, d := range []string{blobsDir, treesDir, sealsDir, factsDir, tmpDir, workDir, ownersDir, locksDir, usesDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, disk(fmt.Errorf("open cache: %w", err))
		}
	}
	// One Open at a time, so that nobody sees an owner file whose process has
	// made it but not locked it yet.
	gate := flock.New(filepath.Join(dir, "open.lock"))
	if err := gate.Lock(); err != nil {
		return nil, disk(fmt.Errorf("open cache %s: lock: %w", dir, err))
	}
	c, err := open(dir)
	return c, errors.Join(err, gate.Close())
}

func open(dir string) (*Cache, error) {
	if err := sweep(dir); err != nil {
		return nil, fmt.Errorf("open cache %s: clean up: %w", dir, err)
	}
	f, err := os.CreateTemp(filepath.Join(dir, ownersDir), fmt.Sprintf("%d-*.lock", os.Getpid()))
	if err != nil {
		return nil, disk(fmt.Errorf("open cache: %w", err))
	}
	if err := f.Close(); err != nil {
		return nil, disk(fmt.Errorf("open cache: %w", err))
	}
	c := &Cache{dir: dir, owner: strings.TrimSuffix(filepath.Base(f.Name()), ".lock"), lock: flock.New(f.Name())}
	if ok, err := c.lock.TryLock(); err != nil || !ok {
		return nil, fmt.Errorf("open cache %s: lock own owner file: %t, %w", dir, ok, err)
	}
	for _, d := range []string{c.tmp(), c.work()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, disk(fmt.Errorf("open cache: %w", err))
		}
	}
	return c, nil
}

// sweep removes the unfinished work of owners whose lock nobody holds.
func sweep(dir string) error {
	owners, err := os.ReadDir(filepath.Join(dir, ownersDir))
	if err != nil {
		return err
	}
	alive := map[string]bool{}
	var dead []string
	for _, e := range owners {
		file := filepath.Join(dir, ownersDir, e.Name())
		lock := flock.New(file, flock.SetFlag(os.O_RDWR))
		ok, err := lock.TryLock()
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed since ReadDir, its folders gone before
		}
		if err != nil {
			return err
		}
		if !ok {
			alive[strings.TrimSuffix(e.Name(), ".lock")] = true
			continue
		}
		dead = append(dead, file)
		if err := lock.Close(); err != nil {
			return err
		}
	}
	for _, d := range []string{tmpDir, workDir} {
		entries, err := os.ReadDir(filepath.Join(dir, d))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if alive[e.Name()] {
				continue
			}
			if err := os.RemoveAll(filepath.Join(dir, d, e.Name())); err != nil {
				return err
			}
		}
	}
	// Owner files go last: killed in between, the next sweep starts over.
	for _, file := range dead {
		// One that closed between ReadDir and the lock has removed its own.
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Close removes this cache's temporary folders and gives up its locks.
func (c *Cache) Close() error {
	c.unpin()
	return errors.Join(os.RemoveAll(c.tmp()), os.RemoveAll(c.work()), os.Remove(c.lock.Path()), c.lock.Close())
}

// Dir returns the cache's folder as an absolute path.
func (c *Cache) Dir() string { return c.dir }

func (c *Cache) counted(kind string, hit bool) {
	if c.Count != nil {
		c.Count(kind, hit)
	}
}

func (c *Cache) tmp() string  { return filepath.Join(c.dir, tmpDir, c.owner) }
func (c *Cache) work() string { return filepath.Join(c.dir, workDir, c.owner) }

func (c *Cache) blobPath(digest string) string {
	return filepath.Join(c.dir, blobsDir, strings.TrimPrefix(digest, "sha256:"))
}

// PutBlob stores what r yields and returns its digest and size. With a digest
// in want, other bytes are fault.Checksum and nothing is stored; a blob that is
// there already is not read again.
func (c *Cache) PutBlob(ctx context.Context, r io.Reader, want string) (digest string, size int64, err error) {
	if want != "" {
		if !digestPattern.MatchString(want) {
			return "", 0, fault.New(fault.Usage, fmt.Sprintf("store blob: digest %q: want sha256: and 64 hex digits", want), "")
		}
		if path, ok := c.Blob(want); ok {
			if fi, err := os.Stat(path); err == nil {
				return want, fi.Size(), nil
			}
		}
	}
	f, err := os.CreateTemp(c.tmp(), "blob-*")
	if err != nil {
		return "", 0, disk(fmt.Errorf("store blob: %w", err))
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
		err = f.Sync() // Blob never examines the bytes again
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", 0, disk(fmt.Errorf("store blob: %w", err))
	}
	digest = ocidigest.NewDigest(ocidigest.SHA256, h).String()
	if want != "" && digest != want {
		return "", 0, fault.New(fault.Checksum, fmt.Sprintf("store blob: content is %s; want %s", digest, want), "")
	}
	err = c.use(useName(blobKind, strings.TrimPrefix(digest, "sha256:")))
	if err == nil {
		err = os.Rename(f.Name(), c.blobPath(digest))
	}
	if err != nil {
		return "", 0, disk(fmt.Errorf("store blob: %w", err))
	}
	return digest, size, nil
}

// Blob returns the path of a stored blob, which stays until the work ends; see Begin.
func (c *Cache) Blob(digest string) (path string, ok bool) {
	defer func() { c.counted(blobKind, ok) }()
	if !digestPattern.MatchString(digest) {
		return "", false
	}
	path = c.blobPath(digest)
	if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() {
		return path, false
	}
	if err := c.use(useName(blobKind, strings.TrimPrefix(digest, "sha256:"))); err != nil {
		return path, false
	}
	fi, err := os.Lstat(path) // it may have been evicted before this use
	return path, err == nil && fi.Mode().IsRegular()
}

// Verify reads a stored blob again. One that no longer has its digest is
// removed and reported as fault.Checksum.
func (c *Cache) Verify(ctx context.Context, digest string) (err error) {
	path, ok := c.Blob(digest)
	if !ok {
		return fmt.Errorf("verify blob %s: %w", digest, fs.ErrNotExist)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, &ctxReader{ctx, f}); err != nil {
		return fmt.Errorf("verify blob %s: %w", digest, err)
	}
	if got := ocidigest.NewDigest(ocidigest.SHA256, h).String(); got != digest {
		bad := fault.New(fault.Checksum, fmt.Sprintf("verify blob %s: content is %s", digest, got),
			"run the command again: the damaged blob was removed; check the disk of "+c.dir)
		return errors.Join(bad, os.Remove(path))
	}
	return nil
}

// Tree returns the folder of this kind and key. Where there is none, make
// fills an empty folder, which then takes the name; of several processes that
// ask at once, one makes it and the others wait. cached tells that it was there
// already, and that its content is what it was when it was made: a tree that
// was changed since is made again. Kind and key are file names of at most 200 characters; a digest's
// "sha256:" is dropped.
func (c *Cache) Tree(ctx context.Context, kind, key string,
	make func(ctx context.Context, dir string) error) (path string, cached bool, err error) {
	key = strings.TrimPrefix(key, "sha256:")
	if !keyPattern.MatchString(kind) || !keyPattern.MatchString(key) {
		return "", false, fault.New(fault.Internal, fmt.Sprintf("make tree: kind %q, key %q: not file names", kind, key), "")
	}
	defer func() {
		if err == nil {
			c.counted(kind, cached)
		}
	}()
	path = filepath.Join(c.dir, treesDir, kind, key)
	if err := c.use(useName(kind, key)); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			err = foreign(kind, key, err)
		}
		return "", false, disk(err)
	}
	if ok, _, err := c.intact(ctx, kind, key, path); ok || err != nil {
		return path, ok, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", false, disk(fmt.Errorf("make tree: %w", err))
	}
	lock := flock.New(filepath.Join(c.dir, locksDir, kind+"@"+key+".lock"))
	if _, err := lock.TryLockContext(ctx, lockPoll); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return "", false, fmt.Errorf("make tree %s/%s: wait for its lock: %w", kind, key, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	ok, trouble, err := c.intact(ctx, kind, key, path)
	if ok || err != nil { // ok: another process was faster
		return path, ok, err
	}
	if trouble != "" {
		if err := c.discard(kind, key, path, trouble); err != nil {
			return "", false, err
		}
	}
	tmp, err := os.MkdirTemp(c.tmp(), "tree-*")
	if err != nil {
		return "", false, disk(fmt.Errorf("make tree: %w", err))
	}
	if err = os.Chmod(tmp, 0o755); err == nil {
		err = make(ctx, tmp)
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

// PutFact keeps a small value under a key of any text.
func (c *Cache) PutFact(kind, key string, value []byte) error {
	if !keyPattern.MatchString(kind) || len(value) > maxFact {
		return fault.New(fault.Internal,
			fmt.Sprintf("remember %q: not a file name, or %d bytes are too many", kind, len(value)), "")
	}
	if err := c.writeFile(c.factPath(kind, key), append(factSum(value), value...)); err != nil {
		return disk(fmt.Errorf("remember: %w", err))
	}
	return nil
}

// writeFile gives path its new content in one step, durably.
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

// factSum is what comes before a fact's value, in hex.
func factSum(value []byte) []byte {
	sum := sha256.Sum256(value)
	return append(hex.AppendEncode(nil, sum[:]), '\n')
}

// Fact returns what was stored under the key; a damaged fact is forgotten.
func (c *Cache) Fact(kind, key string) (value []byte, ok bool) {
	if !keyPattern.MatchString(kind) {
		return nil, false
	}
	defer func() { c.counted(factKind+kind, ok) }()
	path := c.factPath(kind, key)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, false
	}
	if fi, err := os.Stat(path); err == nil && time.Since(fi.ModTime()) > time.Hour {
		now := time.Now()
		_ = os.Chtimes(path, now, now) // else Trim thinks it unused
	}
	_, value, _ = bytes.Cut(text, []byte("\n"))
	return value, bytes.HasPrefix(text, factSum(value))
}

func (c *Cache) factPath(kind, key string) string {
	sum := sha256.Sum256([]byte(key))
	return filepath.Join(c.dir, factsDir, kind, hex.EncodeToString(sum[:]))
}

// TempDir makes an empty folder on the cache's file system. It goes with
// cleanup, with Close, or at the next Open after this process died.
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

// disk gives a full disk its kind, and leaves an error alone that has one.
func disk(err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fault.CacheDisk(err)
}

// ctxReader ends a copy when its context does.
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
