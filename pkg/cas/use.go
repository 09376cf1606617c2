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

// Each blob and each tree has a file in uses/, which says three things: its
// time, when the entry was last asked for; its content, how large the entry is;
// and a shared flock on it, that a living process may be reading the entry.
// The one who evicts takes the lock exclusively, and removes the file last.

// Names of kinds that are no tree's.
const (
	blobKind = "blob"
	factKind = "fact:" // and the fact's kind
)

func (c *Cache) usePath(name string) string { return filepath.Join(c.dir, usesDir, name) }

// pin is an entry that this process has asked for.
type pin struct {
	file *os.File
	last uint64 // when it was last asked for, on the cache's own count
}

// Begin marks the beginning of a piece of work, such as one build. What the
// cache hands out stays where it is until all pieces of work that had begun by
// then have ended, and until Close where none was begun.
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
			return // ended before
		}
		delete(c.works, id)
		oldest := uint64(math.MaxUint64)
		for w := range c.works {
			oldest = min(oldest, w)
		}
		for name, p := range c.pins {
			if p.last < oldest {
				_ = p.file.Close() // read-only; gives up the lock
				delete(c.pins, name)
			}
		}
	}
}

// use stamps an entry as used now, and keeps it from being evicted. It comes
// before the look whether the entry is there.
func (c *Cache) use(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	p := c.pins[name]
	if p == nil {
		f, err := lockUse(c.usePath(name), unix.LOCK_SH)
		if err != nil {
			return fmt.Errorf("mark %s as used: %w", name, err)
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

// unpin gives up every pin.
func (c *Cache) unpin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, p := range c.pins {
		_ = p.file.Close() // read-only
		delete(c.pins, name)
	}
}

// errInUse says that somebody has the entry.
var errInUse = errors.New("in use")

// lockUse opens a file of uses/ and locks it. One that was removed between the
// two is no lock on anything: then it starts over.
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

// size returns what an entry takes on the disk. It is measured once, since
// entries do not change.
func (c *Cache) size(name, path string) int64 {
	use := c.usePath(name)
	text, err := os.ReadFile(use)
	if n, perr := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && perr == nil {
		return n
	}
	n, _ := measure(path)
	info, err := os.Stat(use)
	if err != nil {
		return n // not used since there are stamps
	}
	// In place, since others lock this very file; and with its time as it was.
	if err := os.WriteFile(use, []byte(strconv.FormatInt(n, 10)), 0o644); err == nil {
		_ = os.Chtimes(use, info.ModTime(), info.ModTime()) // a stamp of now makes it stay longer, no more
	}
	return n
}
