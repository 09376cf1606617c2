package cas

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Each blob and each tree has a use file, in the folder uses/:
//
//   - Its modification time is the time of the entry's last use.
//   - Its content is the entry's size.
//   - A shared flock on the use file means that a living process may be reading the entry.
//
// A process that removes the entry locks the use file exclusively, and removes the use file last.

// Names of the kinds of blobs and of facts. Every other kind is a kind of trees.
const (
	blobKind = "blob"
	factKind = "fact:" // followed by the fact's kind
)

func (c *Cache) usePath(name string) string { return filepath.Join(c.dir, usesDir, name) }

// pin is the lock on an entry that this process uses.
type pin struct {
	file *os.File
	last uint64 // value of the cache's counter at the last use
}

// Begin begins a piece of work, such as one build. The returned function ends it. After the cache has returned an
// entry, Trim cannot remove it until all pieces of work that run at that moment have ended. If no piece of work runs at
// that moment, the entry stays until the end of the next one, or until Close.
func (c *Cache) Begin() (end func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	id := c.count
	if c.works == nil {
		c.works = map[uint64]bool{}
	}
	c.works[id] = true
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.works[id] {
			return // end was called before
		}
		delete(c.works, id)
		oldest := uint64(math.MaxUint64)
		for w := range c.works {
			oldest = min(oldest, w)
		}
		for name, p := range c.pins {
			if p.last < oldest {
				_ = p.file.Close() // the file is read-only; closing it releases the lock
				delete(c.pins, name)
			}
		}
	}
}

// markUsed sets the time of an entry's use file to now, and locks the use file, so that no process removes the entry.
// Afterwards the caller must check that the entry exists: it may have been removed before the use file was locked.
func (c *Cache) markUsed(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	p := c.pins[name]
	if p == nil {
		f, err := lockUse(c.usePath(name), unix.LOCK_SH)
		if err != nil {
			return fmt.Errorf("mark the cache entry %s as used: %w", name, err)
		}
		if c.pins == nil {
			c.pins = map[string]*pin{}
		}
		p = &pin{file: f}
		c.pins[name] = p
	}
	p.last = c.count
	now := time.Now()
	return os.Chtimes(p.file.Name(), now, now)
}

// unpin releases the locks on all entries.
func (c *Cache) unpin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, p := range c.pins {
		_ = p.file.Close() // the file is read-only
		delete(c.pins, name)
	}
}

// errInUse means that a process uses the entry, which therefore must not be removed now.
var errInUse = errors.New("the entry is in use")

// lockUse opens a use file, or creates it if it is missing, and locks it with these flags of flock. If the flags
// include unix.LOCK_NB and another process has the lock, the error is errInUse. If the use file was removed meanwhile,
// the lock protects nothing, and lockUse starts again.
func lockUse(path string, how int) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o644)
		if err != nil {
			return nil, err
		}
		err = flockRetry(int(f.Fd()), how)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errInUse
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		mine, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if there, err := os.Stat(path); err == nil && os.SameFile(mine, there) {
			return f, nil
		}
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
}

func flockRetry(fd, how int) error {
	for {
		if err := unix.Flock(fd, how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// size returns the disk space that an entry takes. The space is measured only once, because entries do not change.
func (c *Cache) size(name, path string) int64 {
	use := c.usePath(name)
	text, err := os.ReadFile(use)
	if n, perr := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && perr == nil {
		return n
	}
	n, _ := measure(path)
	info, err := os.Stat(use)
	if err != nil {
		return n // an entry without a use file: an older version of the program made it
	}
	// Write the use file in place, because other processes may have locked this file. Then restore its time.
	if err := os.WriteFile(use, []byte(strconv.FormatInt(n, 10)), 0o644); err == nil {
		_ = os.Chtimes(use, info.ModTime(), info.ModTime()) // on failure, the entry only counts as used now
	}
	return n
}
