package cas

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/fault"
)

// Kind describes all entries of one kind.
type Kind struct {
	// Name is "blob", the kind of a tree, "fact:" with the kind of a fact, or "logs". Other names are for files that
	// are not entries: "unfinished" (temporary files of running builds), "records" (locks, seals and use files), and
	// the name of each folder that does not belong to the cache.
	Name    string `json:"kind"`
	Entries int    `json:"entries"`
	Bytes   int64  `json:"bytes"`
	// InUse is the number of entries that a living process uses.
	InUse int `json:"inUse"`
	// LastUse is the time at which an entry of this kind was last used.
	LastUse time.Time `json:"lastUse,omitzero"`
}

// Limit has the bounds that Trim tries to meet. A field with its zero value sets no bound.
type Limit struct {
	// Bytes is the largest permitted size of the cache.
	Bytes int64
	// MinFree is the number of bytes that must be free on the cache's disk.
	MinFree int64
	// OlderThan is the longest time for which an unused entry may stay.
	OlderThan time.Duration
	// If DryRun is true, Trim removes nothing, and its result says what it would remove.
	DryRun bool
}

// Trimmed is the result of Trim.
type Trimmed struct {
	Removed int   `json:"removed"`
	Freed   int64 `json:"freedBytes"`
	// Left is the size of the cache afterwards, without folders that do not belong to it.
	Left int64 `json:"leftBytes"`
	// InUse is the number of entries that were not removed because a process uses them.
	InUse int `json:"inUse"`
	// Busy is true if another process is trimming the cache. Trim has then done nothing.
	Busy bool `json:"busy,omitempty"`
	// Kinds describes the removed entries by kind.
	Kinds []Kind `json:"kinds"`
}

// entry is a file or a folder of the cache that Trim can remove on its own.
type entry struct {
	kind, path string
	use        string // name of the use file in uses/; "" means none: the entry's own modification time is its last use
	seal       string // path of the seal, which is removed together with the entry
	used       time.Time
	bytes      int64
}

// rank is the order in which Trim removes entries; the lowest rank comes first.
func (e entry) rank() int {
	if strings.HasPrefix(e.kind, factKind) {
		return 1
	}
	return 0
}

// minAge is the minimum age of a removable log. A younger log may be incomplete.
const minAge = time.Hour

// Kinds describes the content of the cache, the largest kind first.
func (c *Cache) Kinds(ctx context.Context) ([]Kind, error) {
	entries, rest, foreign, err := c.entries(ctx)
	if err != nil {
		return nil, err
	}
	kinds := tally(entries, func(e entry) bool {
		if !c.hasStamp(e) {
			return false
		}
		f, err := lockUse(c.usePath(e.use), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			_ = f.Close() // read-only
		}
		return errors.Is(err, errInUse)
	})
	for _, k := range slices.Concat(rest, foreign) {
		if k.Entries > 0 {
			kinds = append(kinds, k)
		}
	}
	slices.SortFunc(kinds, func(a, b Kind) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes),
			cmp.Compare(a.Name, b.Name))
	})
	return kinds, nil
}

// hasStamp reports whether the entry has a use file. Entries of older versions of the program have none. A caller that
// calls lockUse for such an entry would create the file, and the entry would then count as used now.
func (c *Cache) hasStamp(e entry) bool {
	if e.use == "" {
		return false
	}
	_, err := os.Lstat(c.usePath(e.use))
	return err == nil
}

func tally(entries []entry, busy func(entry) bool) []Kind {
	at := map[string]int{}
	kinds := []Kind{}
	for _, e := range entries {
		i, ok := at[e.kind]
		if !ok {
			i = len(kinds)
			at[e.kind] = i
			kinds = append(kinds, Kind{Name: e.kind})
		}
		k := &kinds[i]
		k.Entries++
		k.Bytes += e.bytes
		if e.used.After(k.LastUse) {
			k.LastUse = e.used
		}
		if busy(e) {
			k.InUse++
		}
	}
	return kinds
}

// Trim removes the entries that were unused for the longest time, until the cache is within the limit. It never removes
// an entry that a living process still uses; see Begin. It never leaves an incomplete entry, even if the process is
// killed.
func (c *Cache) Trim(ctx context.Context, l Limit) (done *Trimmed, err error) {
	done = &Trimmed{Kinds: []Kind{}}
	gate := flock.New(filepath.Join(c.dir, "trim.lock"))
	switch ok, err := gate.TryLock(); {
	case err != nil:
		return done, disk(fmt.Errorf("trim cache: %w", err))
	case !ok:
		done.Busy = true
		return done, nil
	}
	defer func() { err = errors.Join(err, gate.Close()) }()
	entries, rest, _, err := c.entries(ctx)
	if err != nil {
		return done, err
	}
	for _, e := range entries {
		done.Left += e.bytes
	}
	for _, k := range rest {
		done.Left += k.Bytes
	}
	free, err := c.Free()
	if err != nil {
		return done, err
	}
	// Facts are removed last, because they are small and some took a long time to find out.
	slices.SortStableFunc(entries, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), a.used.Compare(b.used))
	})
	var gone []entry
	defer func() { done.Kinds = tally(gone, func(entry) bool { return false }) }()
	for _, e := range entries {
		if cause := context.Cause(ctx); cause != nil {
			return done, fmt.Errorf("trim cache: %w", cause)
		}
		tooOld := l.OlderThan > 0 && time.Since(e.used) > l.OlderThan
		tooMuch := l.Bytes > 0 && done.Left > l.Bytes || l.MinFree > 0 && free < l.MinFree
		if !tooOld && !tooMuch {
			continue
		}
		switch err := c.evict(e, l.DryRun); {
		case errors.Is(err, errInUse):
			done.InUse++
			continue
		case err != nil:
			return done, fmt.Errorf("trim cache: remove %s: %w", e.path, err)
		}
		gone = append(gone, e)
		done.Removed++
		done.Freed += e.bytes
		done.Left -= e.bytes
		free += e.bytes
	}
	return done, nil
}

// evict removes one entry, unless a process uses it, or has used it since the entries were listed.
func (c *Cache) evict(e entry, dry bool) (err error) {
	if e.use != "" && (!dry || c.hasStamp(e)) {
		f, err := lockUse(c.usePath(e.use), unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			return err
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil || info.Size() > 0 && info.ModTime().After(e.used) {
			return errors.Join(errInUse, err)
		}
	}
	if dry {
		return nil
	}
	grave, err := os.MkdirTemp(c.tmp(), "evicted-*")
	if err != nil {
		return err
	}
	if err := os.Rename(e.path, filepath.Join(grave, "entry")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, os.Remove(grave))
	}
	if e.seal != "" {
		err = ignoreAbsent(os.Remove(e.seal))
	}
	if e.use != "" {
		err = errors.Join(err, ignoreAbsent(os.Remove(c.usePath(e.use))))
	}
	return errors.Join(err, os.RemoveAll(grave))
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// entries lists the entries that can be removed, and the totals of all other files: rest for the cache's own files, and
// foreign for the folders that do not belong to the cache.
func (c *Cache) entries(ctx context.Context) (all []entry, rest, foreign []Kind, err error) {
	unfinished, records := Kind{Name: "unfinished"}, Kind{Name: "records"}
	top, err := os.ReadDir(c.dir)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("list cache: %w", err)
	}
	for _, d := range top {
		if cause := context.Cause(ctx); cause != nil {
			return nil, nil, nil, fmt.Errorf("list cache: %w", cause)
		}
		path := filepath.Join(c.dir, d.Name())
		switch d.Name() {
		case "blobs":
			err = eachEntry(filepath.Join(c.dir, blobsDir), func(name, path string, info fs.FileInfo) {
				all = append(all, c.entry(blobKind, name, path, info))
			})
		case treesDir:
			err = eachEntry(path, func(kind, path string, _ fs.FileInfo) {
				// An error means that the folder was removed meanwhile.
				_ = eachEntry(path, func(key, path string, info fs.FileInfo) {
					e := c.entry(kind, key, path, info)
					e.seal = c.sealPath(kind, key)
					all = append(all, e)
				})
			})
		case factsDir:
			err = eachEntry(path, func(kind, path string, _ fs.FileInfo) {
				// An error means that the folder was removed meanwhile.
				_ = eachEntry(path, func(_, path string, info fs.FileInfo) {
					all = append(all, entry{kind: factKind + kind, path: path, used: info.ModTime(), bytes: blocks(info)})
				})
			})
		case tmpDir, workDir:
			unfinished.add(path)
		case sealsDir, ownersDir, locksDir, usesDir:
			records.add(path)
		case logsDir:
			all = append(all, logFiles(path)...)
		default:
			if d.IsDir() {
				k := Kind{Name: d.Name()}
				k.add(path)
				foreign = append(foreign, k)
			}
		}
		if err != nil {
			return nil, nil, nil, fmt.Errorf("list cache: %w", err)
		}
	}
	return all, []Kind{unfinished, records}, foreign, nil
}

func (c *Cache) entry(kind, key, path string, info fs.FileInfo) entry {
	e := entry{kind: kind, path: path, use: useName(kind, key), used: info.ModTime()}
	if stamp, err := os.Stat(c.usePath(e.use)); err == nil {
		e.used = stamp.ModTime()
	}
	if info.Mode().IsRegular() {
		e.bytes = blocks(info)
	} else {
		e.bytes = c.size(e.use, path)
	}
	return e
}

func useName(kind, key string) string { return kind + "@" + key }

func (k *Kind) add(path string) {
	bytes, files := measure(path)
	k.Bytes += bytes
	k.Entries += files
}

// eachEntry passes every entry of a folder to the callback. It skips entries that were removed meanwhile.
func eachEntry(dir string, f func(name, path string, info fs.FileInfo)) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, d := range list {
		if info, err := d.Info(); err == nil {
			f(d.Name(), filepath.Join(dir, d.Name()), info)
		}
	}
	return nil
}

// logFiles returns the logs that can be removed: those that are not younger than minAge.
func logFiles(dir string) (all []entry) {
	// An error means that the folder was removed meanwhile.
	_ = eachEntry(dir, func(name, path string, info fs.FileInfo) {
		if info.Mode().IsRegular() && filepath.Ext(name) == ".log" && time.Since(info.ModTime()) >= minAge {
			all = append(all, entry{kind: logsDir, path: path, used: info.ModTime(), bytes: blocks(info)})
		}
	})
	return all
}

// measure returns the disk space that a file or folder takes, and its number of files.
func measure(path string) (bytes int64, files int) {
	_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // the file was removed while measure ran
		}
		if info, err := d.Info(); err == nil {
			bytes += blocks(info)
			files++
		}
		return nil
	})
	return bytes, files
}

func blocks(info fs.FileInfo) int64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return s.Blocks * 512
	}
	return info.Size()
}

// Free returns the number of bytes that this user may still write to the cache's disk.
func (c *Cache) Free() (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(c.dir, &s); err != nil {
		return 0, fmt.Errorf("read free space of %s: %w", c.dir, err)
	}
	return int64(s.Bavail) * s.Bsize, nil
}

// CheckFree returns an error of kind DiskFull if the cache's disk has fewer than need free bytes.
func (c *Cache) CheckFree(need int64) error {
	free, err := c.Free()
	if err != nil || free >= need {
		return err
	}
	return fault.New(fault.DiskFull,
		fmt.Sprintf("the disk of %s has %d MiB free; want %d MiB", c.dir, free>>20, (need+1<<20-1)>>20),
		"use another folder (--cache FOLDER), or free space, for example: builder cache trim --max-size 5GiB --cache "+c.dir)
}
